"""PixelCNN, PixelCNN++ and PixelSNAIL: causal, normalized, and the same pixel by pixel as at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recording import recorded
from scipy.stats import chisquare
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.decoder import Decoder, Drawn, Given
from wngen.distributions import PixelDistribution
from wngen.models import PixelCNN, PixelCNNPP, PixelSNAIL
from wngen.nn import Walk, WeightNormalized, data_dependent_init
from wngen.noise import Noise

MODELS: dict[str, tuple[type[AutoregressiveModel], dict[str, Any]]] = {
    "pixelcnn": (PixelCNN, {"filters": 9, "blocks": 4}),
    "pixelcnn++": (PixelCNNPP, {"filters": 4, "blocks": 1, "components": 3}),
    "pixelsnail": (PixelSNAIL, {"filters": 5, "layers": 2, "blocks": 1, "keys": 3, "values": 4, "components": 2}),
}
DEEP: dict[str, tuple[type[AutoregressiveModel], dict[str, Any]]] = {  # enough to see all of the sizes below
    "pixelcnn": (PixelCNN, {"filters": 24, "blocks": 5}),
    "pixelcnn-5x5": (PixelCNN, {"filters": 24, "blocks": 4, "kernel_size": 5}),
    "pixelcnn++": (PixelCNNPP, {"filters": 4, "blocks": 2, "components": 3}),
    "pixelcnn++-flat": (PixelCNNPP, {"filters": 4, "blocks": 4, "components": 2, "scales": 1}),
    "pixelsnail": MODELS["pixelsnail"],
}
SIZES = [  # channels, height, width, levels, classes
    (1, 6, 5, 2, None),
    (3, 4, 3, 4, 3),
    (2, 3, 5, 3, None),
    (1, 1, 6, 5, 2),
    (3, 5, 1, 2, None),
]
TINY = [(1, 2, 2, 2, None), (3, 1, 2, 2, None), (2, 2, 1, 3, 2), (1, 1, 1, 7, None)]
Size = tuple[int, int, int, int, int | None]


def sized(sizes: list[Size]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size[:4])))


each_model = pytest.mark.parametrize("name", MODELS)
each_deep_model = pytest.mark.parametrize("name", DEEP)


def made(
    name: str, size: Size, dtype: torch.dtype = torch.double, among: dict[str, Any] = MODELS
) -> AutoregressiveModel:
    """A small model whose parameters are all far from where they begin, as after training."""
    torch.manual_seed(0)
    kind, arguments = among[name]
    channels, height, width, levels, num_classes = size
    model = kind(channels, height, width, levels, num_classes=num_classes, **arguments).double()
    with torch.no_grad():
        for called, parameter in model.named_parameters():
            if called.endswith(".g"):
                parameter.uniform_(0.8, 1.6)
            elif called.endswith(".v"):
                parameter.normal_()
            else:
                parameter.normal_(std=0.3)
    return model.eval().to(dtype)


def images(model: AutoregressiveModel, n: int) -> tuple[Tensor, Tensor | None]:
    """Random levels, and labels where the model wants them."""
    y = None if model.num_classes is None else torch.arange(n) % model.num_classes
    return torch.randint(model.spec.levels, (n, *model.spec.shape), dtype=torch.uint8), y


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dependence(model: AutoregressiveModel, repeats: int = 4) -> Tensor:
    """`(H, W, C, H, W, C)`: how far each sub-pixel's log-probability depends on what the network is told of another."""
    height, width, channels = model.spec.height, model.spec.width, model.spec.channels
    total = torch.zeros(model.spec.dims, height, width, channels, dtype=torch.double)
    for _ in range(repeats):
        x, y = images(model, 1)
        x = x.repeat(model.spec.dims, 1, 1, 1)  # one copy for each sub-pixel, so that one pass gives all gradients
        told = model.spec.scale(x, torch.double).requires_grad_()
        predicted = model.predict(told, None if y is None else y.repeat(len(x)))
        log_prob = model.distribution(predicted).log_prob(x).permute(0, 2, 3, 1).flatten(1)
        (gradient,) = torch.autograd.grad(log_prob.diagonal().sum(), told)
        total += gradient.abs().permute(0, 2, 3, 1)
    return total.view(height, width, channels, height, width, channels)


# What a pixel depends on


@each_deep_model
@sized([(1, 8, 8, 2, None), (3, 6, 5, 4, 3), (2, 5, 7, 3, None), (1, 1, 8, 5, 2), (3, 7, 1, 2, None)])
def test_a_sub_pixel_depends_on_all_before_it_and_on_none_after(name, size):
    model = made(name, size, among=DEEP)
    seen = dependence(model) > 0
    place = torch.arange(model.spec.dims).view(seen.shape[:3])
    if not model.by_channel:  # a pixel's channels are told apart by their distribution alone
        place = place // model.spec.channels
    before = place[..., None, None, None] > place
    assert torch.equal(seen, before)


def test_two_stacks_have_no_blind_spot():
    """Two layers see four rows up and four columns to either side: the whole of it, to the right too."""
    torch.manual_seed(0)
    model = PixelCNN(channels=1, height=9, width=11, levels=2, filters=8, blocks=2).double()
    seen = dependence(model)[:, :, 0, :, :, 0] > 0
    up = torch.arange(9)[:, None, None, None] - torch.arange(9)[:, None]
    left = torch.arange(11)[:, None, None] - torch.arange(11)
    rows_above = (up >= 1) & (up <= 4) & (left.abs() <= 4)
    on_the_left = (up == 0) & (left >= 1) & (left <= 4)
    assert torch.equal(seen, rows_above | on_the_left)


def test_attention_sees_beyond_the_reach_of_convolutions():
    model = made("pixelsnail", (1, 12, 20, 2, None))
    x, _ = images(model, 4)
    told = model.spec.scale(x, torch.double).requires_grad_()
    (gradient,) = torch.autograd.grad(model.predict(told)[:, :, 9, 3].sum(), told)
    assert torch.equal(gradient.abs().sum(dim=0).flatten() > 0, torch.arange(240) < 9 * 20 + 3)


@each_model
@sized(SIZES)
def test_what_comes_later_leaves_no_trace(name, size):
    model = made(name, size)
    x, y = images(model, 1)
    pixels = model.spec.height * model.spec.width
    clean = model.spec.scale(x, torch.double).repeat(pixels, 1, 1, 1)
    labels = None if y is None else y.repeat(pixels)
    # A sum over all pixels weighted by zeros, as of attention, passes NaN on; other numbers it does not.
    poison = 1e6 if name == "pixelsnail" else float("nan")
    late = torch.ones(pixels, pixels, dtype=torch.bool).triu(1 if model.by_channel else 0)
    poisoned = clean.masked_fill(late.view(pixels, 1, *clean.shape[2:]), poison)

    def at_the_edge(x: Tensor) -> Tensor:
        return model.predict(x, labels).flatten(2).diagonal(dim1=0, dim2=2)

    with torch.no_grad():
        assert at_the_edge(poisoned).isfinite().all()
        assert torch.equal(at_the_edge(poisoned), at_the_edge(clean))


@each_model
@sized(SIZES)
def test_a_channel_is_conditioned_on_those_before_it_in_its_pixel(name, size):
    model = made(name, size)
    x, y = images(model, 8)
    distribution = model.distribution(model.predict(model.spec.scale(x, torch.double), y))
    log_prob = distribution.log_prob(x)
    mixed = model.spec.channels > 1 and not model.by_channel
    for c in range(model.spec.channels):
        other = x.clone()
        other[:, c] = (x[:, c] + 1) % model.spec.levels
        changed = (distribution.log_prob(other) != log_prob).flatten(2).any(dim=2).any(dim=0)
        assert changed.tolist() == [j == c or (mixed and j > c) for j in range(model.spec.channels)]


# Pixel by pixel


@each_deep_model
@sized(SIZES)
@pytest.mark.parametrize(("n", "dtype", "tolerance"), [(1, torch.double, 1e-10), (5, torch.float, 1e-4)])
def test_the_decoder_predicts_what_forward_predicts(name, size, n, dtype, tolerance):
    model = made(name, size, dtype, DEEP)
    x, y = images(model, n)
    with torch.no_grad():
        wanted = model.predict(model.spec.scale(x, dtype), y)
    decoder = Decoder(model)
    predict_pixel = decoder.model.predict_pixel
    predicted = torch.zeros_like(wanted)

    def watched(left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        step = predict_pixel(left, here, y, walk)
        predicted[:, :, walk.row, walk.column] = step[:, :, 0, 0]
        return step

    decoder.model.predict_pixel = watched
    copied, _ = decoder.run(n, Given(x, torch.ones(x.shape[2:], dtype=torch.bool), never), y)
    assert torch.equal(copied, x)
    torch.testing.assert_close(predicted, wanted, rtol=tolerance, atol=tolerance)


def never(distribution: PixelDistribution, row: int, column: int) -> Tensor:
    raise AssertionError


@each_model
@sized(SIZES)
def test_each_channel_is_taken_from_its_distribution_given_those_before(name, size):
    model = made(name, size)
    x, y = images(model, 5)
    parts: list[Tensor] = []

    def told(distribution: PixelDistribution, row: int, column: int) -> Tensor:
        level = x[:, :, row : row + 1, column : column + 1]
        log_prob = distribution.log_prob(level)
        step = len(parts) % model.spec.channels
        parts.append(log_prob[:, step] if model.by_channel else log_prob.sum(dim=1))
        return level

    _, nats = Decoder(model).run(5, told, y)
    torch.testing.assert_close(torch.stack(parts).sum(dim=(0, 2, 3)), nats, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(nats, model.log_likelihood(x, y), rtol=1e-10, atol=1e-10)


@each_model
@sized(SIZES)
def test_a_step_that_was_captured_replays_at_every_pixel(name, size):
    model = made(name, size)
    n, (_, y) = 3, images(model, 3)
    eager, eager_nats = Decoder(model).run(n, drawn(model, n), y)
    replayed, replayed_nats = Decoder(model, capture=recorded).run(n, drawn(model, n), y)
    assert torch.equal(replayed, eager)
    torch.testing.assert_close(replayed_nats, eager_nats, rtol=1e-10, atol=1e-10)


def drawn(model: AutoregressiveModel, n: int) -> Drawn:
    return Drawn(Noise(3, torch.arange(n)), model.spec.width)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs want a GPU")
@each_model
@pytest.mark.parametrize("n", [1, 16])
def test_a_gpu_draws_what_its_steps_uncaptured_draw(name, n):
    model = made(name, SIZES[1]).float().cuda()
    noise, y = Noise(0, torch.arange(n, device="cuda")), torch.arange(n, device="cuda") % 3
    captured, eager = Decoder(model), Decoder(model)
    eager.capture = None
    images, nats = captured.run(n, Drawn(noise, model.spec.width), y)
    again, nats_again = eager.run(
        n, Given(images, torch.ones(images.shape[2:], dtype=torch.bool), Drawn(noise, model.spec.width)), y
    )
    assert torch.equal(images, again)
    torch.testing.assert_close(nats, nats_again, rtol=0, atol=1e-4)
    torch.testing.assert_close(nats, model.log_likelihood(images, y).cpu(), rtol=0, atol=1e-4)


@each_model
def test_where_nothing_can_be_captured_the_steps_run_as_they_stand(name):
    model = made(name, SIZES[1])
    n, (_, y) = 2, images(model, 2)
    eager, eager_nats = Decoder(model).run(n, drawn(model, n), y)
    captures = itertools.count()

    def some(step: Any) -> Any:
        if next(captures) == 2:
            raise RuntimeError("out of graphs")
        return recorded(step)

    with pytest.warns(UserWarning, match="goes on without CUDA graphs, more slowly: out of graphs"):
        images_, nats = Decoder(model, capture=some).run(n, drawn(model, n), y)
    assert next(captures) == 3
    assert torch.equal(images_, eager)
    torch.testing.assert_close(nats, eager_nats, rtol=1e-10, atol=1e-10)


# Probabilities and samples


def every_image(model: AutoregressiveModel) -> Tensor:
    levels = itertools.product(range(model.spec.levels), repeat=model.spec.dims)
    return torch.tensor(list(levels), dtype=torch.uint8).view(-1, *model.spec.shape)


def classes(model: AutoregressiveModel) -> Iterator[int | None]:
    yield from [None] if model.num_classes is None else range(model.num_classes)


def repeated(label: int | None, n: int) -> Tensor | None:
    return None if label is None else torch.full((n,), label)


@each_model
@sized([*TINY, (3, 2, 2, 2, None)])
def test_the_probabilities_of_all_images_sum_to_one(name, size):
    model = made(name, size)
    x = every_image(model)
    for label in classes(model):
        log_prob = model.log_likelihood(x, repeated(label, len(x)))
        torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-10)
        assert log_prob.std() > 1e-3  # or this would say little


@each_model
@sized(TINY)
def test_samples_come_as_often_as_they_are_probable(name, size):
    model = made(name, size)
    x, n = every_image(model), 2000
    for label in classes(model):
        probs = model.log_likelihood(x, repeated(label, len(x))).exp()
        samples = model.sample(n, repeated(label, n), generator=seeded(), chunk=n)
        digits = model.spec.levels ** torch.arange(model.spec.dims).flip(0)
        counts = torch.bincount((samples.flatten(1) * digits).sum(dim=1), minlength=len(x)).double()
        rare = probs * n < 5  # which the test wants together
        merged = [torch.cat([part[~rare], part[rare].sum()[None]]) for part in (counts, probs * n)]
        observed, expected = (part[merged[1] > 0] for part in merged)
        assert chisquare(observed.numpy(), (expected * n / expected.sum()).numpy()).pvalue > 1e-3


@each_model
@sized(SIZES[:3])
def test_a_seed_gives_the_same_images_however_many_are_drawn_at_once(name, size):
    model = made(name, size)
    _, y = images(model, 3)
    samples = model.sample(3, y, generator=seeded(5))
    assert torch.equal(model.sample(3, y, generator=seeded(5), chunk=2), samples)
    assert not torch.equal(model.sample(3, y, generator=seeded(6)), samples)


@each_model
@sized(SIZES)
def test_the_decoder_adds_up_the_likelihood_of_its_samples(name, size):
    model = made(name, size)
    _, y = images(model, 4)
    samples, nats = Decoder(model).run(4, drawn(model, 4), y)
    torch.testing.assert_close(nats, model.log_likelihood(samples, y), rtol=1e-10, atol=1e-10)


@each_model
def test_nothing_is_random_at_temperature_zero(name):
    model = made(name, SIZES[2])
    greedy = model.sample(3, temperature=0, generator=seeded(1))
    assert torch.equal(model.sample(3, temperature=0, generator=seeded(2)), greedy)
    assert torch.equal(greedy, greedy[:1].expand_as(greedy))
    warm = model.sample(3, generator=seeded(1))
    assert not torch.equal(warm, warm[:1].expand_as(warm))


@each_model
@sized(SIZES[:2])
def test_completion_keeps_what_is_known_and_draws_the_rest(name, size):
    model = made(name, size)
    x, y = images(model, 3)
    known = torch.rand(model.spec.height, model.spec.width, generator=seeded()) < 0.5
    known[-1, -1] = False
    complete = model.complete(x, known, y, generator=seeded())
    assert torch.equal(complete[:, :, known], x[:, :, known])
    assert (complete != x)[:, :, ~known].any()
    assert torch.equal(model.complete(x, known, y, generator=seeded(), chunk=2), complete)
    other = torch.where(known, x, (x + 1) % model.spec.levels)  # what is hidden does not matter
    assert torch.equal(model.complete(other, known, y, generator=seeded()), complete)
    nothing = torch.zeros_like(known)
    assert torch.equal(model.complete(x, nothing, y, generator=seeded()), model.sample(3, y, generator=seeded()))


@each_model
def test_the_images_are_shown_as_they_grow(name):
    model = made(name, SIZES[1])
    x, y = images(model, 2)
    known = torch.zeros(4, 3, dtype=torch.bool)
    known[:2] = True
    shown: list[Tensor] = []
    complete = model.complete(x, known, y, watch=lambda images, done: shown.append(images.clone()))
    assert len(shown) == 12
    for done, image in enumerate(shown, start=1):
        grown = (torch.arange(12) < done).view(4, 3)
        assert torch.equal(image, complete * grown)


def test_labels_and_levels_of_another_kind_are_refused():
    model = made("pixelcnn++", (1, 4, 4, 4, 3))
    x, y = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="the highest level is 200, wanted 0 to 3"):
        model.log_likelihood(x + 200, y)
    with pytest.raises(ValueError, match="the highest level is 4, wanted 0 to 3"):
        model.complete(x + 4, torch.zeros(4, 4, dtype=torch.bool), y)
    for wrong, kind in ((y.float(), r"torch\.float32"), ([0, 2], "list")):
        with pytest.raises(TypeError, match=f"classes y are {kind}, wanted a tensor of int64"):
            model.log_likelihood(x, wrong)


def test_completion_refuses_what_it_cannot_complete():
    model = made("pixelcnn", SIZES[1])
    x, y = images(model, 2)
    known = torch.zeros(4, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"known is torch\.uint8, wanted bool"):
        model.complete(x, known.byte(), y)
    with pytest.raises(ValueError, match=r"known has shape \(3, 4\), wanted \(4, 3\)"):
        model.complete(x, known.T, y)
    with pytest.raises(ValueError, match="there is nothing to complete"):
        model.complete(x, ~known, y)
    with pytest.raises(ValueError, match=r"the model wants \(B, 3, 4, 3\)"):
        model.complete(x[..., :2], known, y)
    with pytest.raises(TypeError, match="do not scale them yourself"):
        model.complete(x.float(), known, y)
    with pytest.raises(ValueError, match="conditioned on 3 classes"):
        model.complete(x, known)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.complete(x, known, y, temperature=-1)


# Initialization, size, arguments


@each_model
@sized([(1, 6, 5, 2, None), (3, 5, 6, 4, 3), (2, 5, 7, 3, None)])
def test_data_dependent_init_holds_through_the_whole_network(name, size):
    torch.manual_seed(1)
    kind, arguments = MODELS[name]
    model = kind(*size[:4], num_classes=size[4], **arguments).double().eval()
    x, y = images(model, 32)
    layers = {module: name for name, module in model.named_modules() if isinstance(module, WeightNormalized)}
    assert set(data_dependent_init(model, x, y)) == set(layers.values())
    outputs: dict[str, Tensor] = {}
    for layer, called in layers.items():
        layer.register_forward_hook(lambda _, __, output, called=called: outputs.update({called: output}))
    model(x, y)
    for layer, called in layers.items():
        std, mean = torch.std_mean(outputs[called].movedim(1, 0).flatten(1), dim=1, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9, msg=called)
        torch.testing.assert_close(std, torch.full_like(std, layer.init_scale), msg=called)


@each_model
def test_every_parameter_learns(name):
    model = made(name, SIZES[1]).train()
    model(*images(model, 8)).elbo_nats.sum().backward()
    for called, parameter in model.named_parameters():
        assert parameter.grad is not None, called
        assert parameter.grad.abs().max() > 0, called


@each_model
def test_mixed_precision_gives_about_the_same_likelihood(name):
    model = made(name, SIZES[0], torch.float)
    x, y = images(model, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, y).elbo_nats
    assert mixed.dtype == torch.float
    torch.testing.assert_close(mixed, model(x, y).elbo_nats, rtol=0.05, atol=0.5)


def test_the_paper_s_model_has_53_66_million_parameters():
    with torch.device("meta"):
        model = PixelCNNPP()
    assert sum(parameter.numel() for parameter in model.parameters()) == 53_659_080


@each_model
@pytest.mark.parametrize("kept", [{}, {"num_classes": 4, "filters": 9}])
def test_a_model_is_rebuilt_from_its_configuration(name, kept):
    kind, arguments = MODELS[name]
    model = kind(**{"channels": 1, "height": 4, "width": 5, "levels": 3} | arguments | kept)
    config = model.config
    assert config.pop("model") == kind.__name__
    again = kind(**config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())


BAD = [
    (PixelCNN, {"likelihood": "mixture"}, "likelihood='mixture': wanted one of auto, bernoulli, categorical"),
    (PixelCNN, {"likelihood": "bernoulli", "levels": 3}, "likelihood='bernoulli' is for levels=2, got levels=3"),
    (PixelCNN, {"filters": 2}, "filters=2: wanted at least one for each of the channels=3"),
    (PixelCNN, {"blocks": 0}, "blocks=0"),
    (PixelCNN, {"kernel_size": 4}, "kernel_size=4: wanted an odd number"),
    (PixelCNN, {"kernel_size": 1}, "kernel_size=1"),
    *((kind, {"num_classes": 0}, "num_classes=0") for kind in (PixelCNN, PixelCNNPP, PixelSNAIL)),
    *((kind, {"height": 0}, "height=0") for kind in (PixelCNN, PixelCNNPP, PixelSNAIL)),
    *((PixelCNNPP, {key: 0}, f"{key}=0") for key in ("filters", "blocks", "scales", "components")),
    *((PixelSNAIL, {key: 0}, f"{key}=0") for key in ("filters", "layers", "blocks", "keys", "values", "components")),
    *((kind, {"dropout": 1.0}, r"dropout=1\.0: wanted a probability") for kind in (PixelCNNPP, PixelSNAIL)),
    *((kind, {"likelihood": "categorical"}, "wanted one of auto, bernoulli, mix") for kind in (PixelCNNPP, PixelSNAIL)),
    *((kind, {"likelihood": "bernoulli"}, "got levels=256") for kind in (PixelCNNPP, PixelSNAIL)),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), BAD)
def test_arguments_that_make_no_model(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
