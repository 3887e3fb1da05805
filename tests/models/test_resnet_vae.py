"""The ResNet VAE: every combination and size of it, its start, its copies, and the arguments that make none."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dependence import jacobian
from ladder_zoo import (
    INFERENCES,
    LIKELIHOODS,
    POSTERIORS,
    SIZES,
    TINY,
    assert_reaches_every_parameter,
    images,
    latent_sizes,
    noise,
    seeded,
    tiny,
)
from torch import Tensor

from wngen.checkpoint import load, save_release
from wngen.image import ImageSpec
from wngen.model import Bound
from wngen.models import ResNetVAE
from wngen.nn import WeightNormalized, data_dependent_init, fold

# Every combination


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("changes", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_every_combination_gives_a_bound_whose_gradient_reaches_every_parameter(
    inference: str, posterior: str, changes: dict[str, Any], num_classes: int | None
):
    is_modern = num_classes is not None
    modern: dict[str, Any] = {"std": "softplus", "residual_scale": None, "iaf_steps": 2} if is_modern else {}
    modern |= {"relative_posterior": is_modern and inference == "bidirectional"}
    model = tiny(inference=inference, posterior=posterior, num_classes=num_classes, **changes, **modern)
    x, y = images(model, 6)
    bound = model(x, y, noise(6))
    assert [kl.shape for kl in bound.kl_nats] == [(6, 2)] * 3
    assert bound.elbo_nats.isfinite().all()
    rate = torch.stack([kl.sum(dim=1) for kl in bound.kl_nats]).sum(dim=0)
    torch.testing.assert_close(bound.rate_nats, rate, rtol=1e-13, atol=0)
    assert_reaches_every_parameter(model, bound.elbo_nats.mean())
    samples = model.sample(3, None if y is None else y[:3])
    assert samples.shape == (3, *model.spec.shape)
    assert samples.dtype == torch.uint8
    assert int(samples.max()) < model.spec.levels


@pytest.mark.parametrize("iaf_form", ["gated", "location_scale", "location"])
@pytest.mark.parametrize("iaf_layers", [0, 2])
@pytest.mark.parametrize("iaf_steps", [1, 3])
def test_every_flow_gives_a_bound_whose_gradient_reaches_every_parameter(
    iaf_form: str, iaf_layers: int, iaf_steps: int
):
    model = tiny(iaf_form=iaf_form, iaf_layers=iaf_layers, iaf_steps=iaf_steps)
    x, _ = images(model, 6)
    assert_reaches_every_parameter(model, model(x, noise=noise(6)).elbo_nats.mean())


def sized(size: tuple[int, int, int, str, tuple[int, ...]]) -> dict[str, Any]:
    return dict(zip(("channels", "height", "width", "layers", "feature_maps"), size, strict=True))


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size[3])
def test_every_size_has_its_latents_and_every_pixel_is_seen_and_made(
    size: Any, inference: str, monkeypatch: pytest.MonkeyPatch
):
    model = tiny(**sized(size), inference=inference)
    x, _ = images(model, 4)
    shapes = []
    for name in reversed(size[3].split(", ")):
        height, count = map(int, name.split("x"))
        width, rows = size[2], size[1]
        while rows > height:
            rows, width = -(-rows // 2), -(-width // 2)
        shapes += [(2, height, width)] * count
    assert model.latent_shapes == tuple(shapes)
    bound = model(x, noise=noise(4))
    assert [kl.shape for kl in bound.kl_nats] == [(4, 2)] * len(shapes)
    assert bound.elbo_nats.isfinite().all()
    assert model.sample(2).shape == (2, *model.spec.shape)

    z = torch.randn(1, sum(latent_sizes(model)), dtype=torch.float64)
    by_latent = jacobian(lambda z: model.decode(z).mean.flatten(1), z)  # (C H W, Z)
    assert by_latent.any(dim=0).all()
    assert by_latent.any(dim=1).all()
    monkeypatch.setattr(ImageSpec, "scale", lambda self, x, dtype: x)
    real = torch.randn(1, *model.spec.shape, dtype=torch.float64)
    views: list[Callable[[Tensor], Tensor]] = [
        *(lambda x, i=i: model.encode(x)[i] for i in range(len(model.encode(real)))),
        *(lambda x, i=i: model.split(model.represent(x))[i] for i in range(len(shapes))),
    ]
    for view in views:
        by_pixel = jacobian(lambda x, view=view: view(x).flatten(1), real)
        assert by_pixel.any(dim=0).all()
        assert by_pixel.any(dim=1).all()


def parameters_of_a_convolution(inputs: int, outputs: int, kernel_size: int = 3) -> int:
    return outputs * (inputs * kernel_size**2 + 2)  # direction, and each output's length and bias


@pytest.mark.parametrize(("inference", "total"), [("bidirectional", 41_568_007), ("bottom-up", 35_983_367)])
def test_the_model_of_the_paper_has_as_many_parameters_as_counted_by_hand(inference: Any, total: int):
    maps, latents, depth, is_drawn_upwards = 160, 32, 20, inference == "bottom-up"
    code = 2 * latents + maps  # mean, log standard deviation, and what enters the flow
    seen_above = maps + latents if is_drawn_upwards else maps
    bottom_up = parameters_of_a_convolution(maps, code + maps) + parameters_of_a_convolution(seen_above, maps)
    top_down = parameters_of_a_convolution(maps, 2 * latents + (0 if is_drawn_upwards else code) + maps)
    top_down += parameters_of_a_convolution(latents + maps, maps)
    flow = parameters_of_a_convolution(latents, maps) + parameters_of_a_convolution(maps, maps)
    flow += parameters_of_a_convolution(maps, 2 * latents)
    # Nothing is above the topmost layer.
    unused = parameters_of_a_convolution(maps, maps) + parameters_of_a_convolution(seen_above, maps)
    between = 2 * parameters_of_a_convolution(maps, maps)  # from 16 x 16 to 8 x 8 and back
    ends = parameters_of_a_convolution(3, maps, 5) + parameters_of_a_convolution(maps, 3, 5)
    expected = depth * (bottom_up + top_down + flow) - unused + between + ends + maps * 8 * 8 + 1
    with torch.device("meta"):
        model = ResNetVAE(inference=inference)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == total
    assert len(model.top_down) == len(model.bottom_up) == depth
    assert model.latent_shapes == ((32, 8, 8),) * 10 + ((32, 16, 16),) * 10


# Initialization, memory, precision and copies


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_after_init_every_layer_has_its_mean_and_deviation(inference: str, posterior: str, num_classes: int | None):
    """In a second pass over the same images with the same noise, through the bottom-up and the top-down layers."""
    arguments = {"height": 11, "width": 9, "layers": "6x2, 3x2", "channels": 3, "levels": 256, "iaf_layers": 2}
    arguments |= {"feature_maps": (6, 8), "iaf_steps": 2}
    choices = {"inference": inference, "posterior": posterior, "num_classes": num_classes}
    model = ResNetVAE(**(TINY | arguments | choices)).double()
    x, y = images(model, 50)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, WeightNormalized)}
    assert set(data_dependent_init(model, x, y, noise(50))) == set(layers)
    outputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, output, name=name: outputs.update({name: output}))
    with torch.no_grad():
        bound = model(x, y, noise(50))
    for name, layer in layers.items():
        assert layer.initialized, name
        assert layer.length.isfinite().all(), name
        assert layer.length.max() < 30 * layer.init_scale, name
        units = outputs[name].transpose(0, 1).flatten(1)
        std = torch.full_like(units[:, 0], layer.init_scale)
        torch.testing.assert_close(units.std(dim=1, correction=0), std, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(units.mean(dim=1), torch.zeros_like(std), rtol=0, atol=1e-6)
    assert data_dependent_init(model, x, y, noise(50)) == []
    assert (bound.layer_kl_nats.mean(dim=0) > 0).all()
    assert bound.layer_kl_nats.mean() < 50


@pytest.mark.parametrize("layers", ["2x2", "2x1, 1x1"])
@pytest.mark.parametrize("inference", INFERENCES)
def test_init_sets_no_large_length_where_the_top_is_small(inference: str, layers: str):
    model = ResNetVAE(**(TINY | {"layers": layers, "inference": inference}))
    x, _ = images(model, 20)
    data_dependent_init(model, x, None, noise(20))
    for name, layer in model.named_modules():
        if isinstance(layer, WeightNormalized):
            assert layer.length.isfinite().all(), name
            assert layer.length.max() < 30, name
    assert model(x, noise=noise(20)).elbo_nats.isfinite().all()


def gradients(model: ResNetVAE, x: Tensor, y: Tensor | None) -> tuple[Bound, list[Tensor], int]:
    """The bound, the gradients of its mean, and how many numbers were kept for them in between."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        bound = model(x, y, noise(len(x)))
        loss = -bound.elbo_nats.mean()
    return bound, list(torch.autograd.grad(loss, list(model.parameters()))), kept


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_computing_activations_again_changes_no_gradient(inference: str, posterior: str):
    choices = {"inference": inference, "posterior": posterior, "num_classes": 3}
    model, same = (tiny(**choices, recompute=recompute) for recompute in (False, True))
    same.load_state_dict(model.state_dict())
    x, y = images(model, 6)
    (bound, plain, kept), (again, recomputed, kept_again) = (gradients(each, x, y) for each in (model, same))
    assert torch.equal(again.elbo_nats, bound.elbo_nats)
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)
    assert kept_again < kept / 4
    with torch.no_grad():
        assert torch.equal(same(x, y, noise(6)).elbo_nats, bound.elbo_nats)


@pytest.mark.parametrize("changes", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_autocast_gives_nearly_the_same_bound_in_single_precision(
    inference: Any, posterior: Any, changes: dict[str, Any]
):
    """And adds up the residual branches in it."""
    model = ResNetVAE(**(TINY | changes), inference=inference, posterior=posterior)
    x, _ = images(model, 16)
    data_dependent_init(model, x, None, noise(16))
    single = model(x, noise=noise(16))
    streams = set()
    for layer in (*(layer.first for layer in (*model.bottom_up, *model.top_down)), model.output):
        layer.register_forward_pre_hook(lambda _, args: streams.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, noise=noise(16))
    assert streams == {torch.float32}
    assert {tensor.dtype for tensor in (mixed.distortion_nats, *mixed.kl_nats)} == {torch.float32}
    torch.testing.assert_close(mixed.elbo_nats, single.elbo_nats, rtol=0.02, atol=0)
    (-mixed.elbo_nats.mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


ELABORATE: dict[str, Any] = TINY | {"channels": 3, "levels": 8, "likelihood": "mixture", "num_classes": 4}
ELABORATE |= {"iaf_steps": 2, "iaf_form": "gated", "std": "softplus", "relative_posterior": True}


def initialized() -> tuple[ResNetVAE, Tensor, Tensor | None]:
    model = ResNetVAE(**ELABORATE)
    x, y = images(model, 8)
    data_dependent_init(model, x, y, noise(8))
    return model.eval(), x, y


def test_the_configuration_builds_the_same_model():
    model = ResNetVAE(**ELABORATE)
    config = json.loads(json.dumps(model.config))
    assert config.pop("model") == "ResNetVAE"
    again = ResNetVAE(**config)
    assert json.dumps(again.config) == json.dumps(model.config)
    again.load_state_dict(model.state_dict(), strict=True)
    assert config.keys() >= {"channels", "height", "width", "levels", "layers", "recompute"}


@torch.no_grad()
def test_a_released_model_is_the_same_to_the_bit_and_a_folded_one_nearly(tmp_path: Path):
    model, x, y = initialized()
    expected = model(x, y, noise(8))
    save_release(model, tmp_path / "release")
    again = load(tmp_path / "release")
    assert isinstance(again, ResNetVAE)
    assert torch.equal(again(x, y, noise(8)).layer_kl_nats, expected.layer_kl_nats)
    assert torch.equal(again(x, y, noise(8)).elbo_nats, expected.elbo_nats)
    assert torch.equal(again.sample(8, y, generator=seeded()), model.sample(8, y, generator=seeded()))
    assert data_dependent_init(again, x, y, noise(8)) == []
    folded = fold(model.double())
    assert not any(isinstance(layer, WeightNormalized) for layer in folded.modules())
    torch.testing.assert_close(
        folded(x, y, noise(8)).elbo_nats, model(x, y, noise(8)).elbo_nats, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(expected.elbo_nats.double(), model(x, y, noise(8)).elbo_nats, rtol=1e-5, atol=1e-3)
    assert torch.equal(folded.sample(4, y[:4], generator=seeded()), model.sample(4, y[:4], generator=seeded()))


# Arguments


def test_feature_maps_may_be_one_number_for_all():
    one, also_one, each = (ResNetVAE(**(TINY | {"feature_maps": maps})) for maps in (4, (4,), [4, 4]))
    assert one.resolutions == also_one.resolutions == each.resolutions
    assert [resolution.maps for resolution in one.resolutions] == [4, 4]


@pytest.mark.parametrize(
    "layers", ["", "x", "3x2; 2x1", "3 2", "3x2,", "2x1, 3x2", "3x2, 3x1", "4x1", "6x1", "3x0", "-3x1", "0x1"]
)
def test_layers_that_name_no_hierarchy_are_refused(layers: str):
    with pytest.raises(ValueError, match=r"such as '16x10, 8x10'; heights of 5, 3, 2, 1, each at most once") as refused:
        ResNetVAE(**(TINY | {"layers": layers}))
    assert f"layers={layers!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_maps": ()}, r"feature_maps=\(\): wanted one number, or one for each of 2 heights"),
        ({"feature_maps": [4, 4, 4]}, r"feature_maps=\[4, 4, 4\]: wanted one number, or one for each of 2 heights"),
        ({"feature_maps": (4, 0)}, r"feature_maps=\(4, 0\)"),
        ({"feature_maps": 0}, "feature_maps=0: wanted one number"),
        ({"residual_scale": 0.0}, r"residual_scale=0\.0: wanted a positive number, or None"),
        ({"residual_scale": -0.1}, r"residual_scale=-0\.1: wanted a positive number"),
        ({"residual_scale": math.nan}, "residual_scale=nan: wanted a positive number"),
        ({"inference": "bottom-up", "relative_posterior": True}, "relative_posterior is for bidirectional inference"),
        ({"inference": "top-down"}, "inference='top-down': wanted one of bidirectional, bottom-up"),
        ({"posterior": "gaussian"}, "posterior='gaussian': wanted one of diagonal, iaf"),
        ({"iaf_form": "affine"}, "iaf_form='affine': wanted one of gated"),
        ({"iaf_form": "affine", "posterior": "diagonal"}, "iaf_form='affine': wanted one of gated"),
        ({"std": "exp"}, "std='exp': wanted one of exponential, softplus"),
        ({"likelihood": "gaussian"}, "likelihood='gaussian': wanted one of auto, bernoulli, mixture"),
        ({"likelihood": "categorical"}, "likelihood='categorical': wanted one of auto, bernoulli, mixture"),
        ({"likelihood": "bernoulli", "levels": 256}, "likelihood='bernoulli' is for levels=2, got levels=256"),
        ({"channels": 5}, "channels=5: wanted 1 to 4"),
        ({"height": 0}, "height=0"),
        ({"levels": 257}, "levels=257"),
        ({"latent_channels": 0}, "latent_channels=0: wanted at least 1"),
        ({"components": 0}, "components=0: wanted at least 1"),
        ({"iaf_steps": 0}, "iaf_steps=0: wanted at least 1"),
        ({"iaf_layers": -1}, "iaf_layers=-1: wanted at least 0"),
        ({"num_classes": 0}, "num_classes=0: wanted at least 1, or None"),
        ({"feature_maps": (2,), "latent_channels": 3}, r"feature_maps=\(2,\): wanted at least latent_channels=3"),
        ({"feature_maps": 2, "latent_channels": 3}, "feature_maps=2: wanted at least latent_channels=3"),
    ],
)
def test_arguments_that_make_no_model_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ResNetVAE(**(TINY | changes))


def test_wrong_images_and_labels_are_refused():
    model, conditional = tiny(), tiny(num_classes=3)
    (x, _), y = images(model, 3), torch.zeros(3, dtype=torch.long)
    z = torch.randn(3, sum(latent_sizes(model)), dtype=torch.float64)
    for call in (model, model.encode, model.represent, model.log_likelihood):
        with pytest.raises(TypeError, match=r"images are uint8 levels 0 to 1, got torch\.float32"):
            call(x.float())
        with pytest.raises(ValueError, match=r"images have shape \(3, 1, 7, 5\), the model wants \(B, 1, 5, 7\)"):
            call(x.mT)
        with pytest.raises(ValueError, match="built without num_classes"):
            call(x, y)
    calls = (conditional, conditional.encode, conditional.represent, conditional.log_likelihood)
    for call, argument in (
        *((call, x) for call in calls),
        *((c, z) for c in (conditional.decode,)),
        (conditional.sample, 3),
        (conditional.prior, 3),
    ):
        with pytest.raises(ValueError, match=r"conditioned on 3 classes: y must have shape \(3,\), got None"):
            call(argument)


def test_latents_that_end_within_a_layer_are_refused():
    model = tiny()
    ends = [0, *itertools.accumulate(latent_sizes(model))]
    z = torch.zeros(2, ends[-1] + 1, dtype=torch.float64)
    for wrong in (z, z[:, :3], z[:, : ends[1]].view(2, *model.latent_shapes[0])):
        with pytest.raises(ValueError, match=rf"where layers end at {', '.join(map(str, ends))}"):
            model.prior(2, given=wrong)
        with pytest.raises(ValueError, match="wanted"):
            model.decode(wrong)


def test_latents_of_another_number_of_images_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="n=3, but 2 rows of latents are given"):
        model.prior(3, given=model.prior(2))
