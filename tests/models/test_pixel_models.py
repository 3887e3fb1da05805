"""PixelCNN, PixelCNN++ and PixelSNAIL: causal, initialized throughout, rebuilt from what they are told."""

from __future__ import annotations

import pytest
import torch
from pixel_zoo import DEEP, MODELS, SIZES, each_deep_model, each_model, images, made, released, sized
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.models import PixelCNN, PixelCNNPP, PixelSNAIL
from wngen.nn import WeightNormalized, data_dependent_init


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


def test_trained_weights_leave_what_comes_later_unseen():
    model, digits = released()
    told = model.spec.scale(digits, torch.float).requires_grad_()
    predicted = model.predict(told)
    rows, columns = torch.arange(28)[:, None], torch.arange(28)
    for row, column in [(0, 0), (0, 1), (1, 0), (5, 27), (14, 13), (20, 0), (27, 27)]:
        (gradient,) = torch.autograd.grad(predicted[:, :, row, column].sum(), told, retain_graph=True)
        seen = (gradient != 0).any(dim=0)[0]
        before = 28 * rows + columns < 28 * row + column
        near = ((rows - row).abs() <= 3) & ((columns - column).abs() <= 3)
        assert not seen[~before].any()
        assert seen[before & near].all()


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
