"""Initialization of a whole network: from a batch of data, or from the sizes of its layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from wngen.nn.blocks import GatedResidualBlock, ResidualBlock
from wngen.nn.convolutions import WNConvTranspose2d
from wngen.nn.layers import WeightNormalized
from wngen.nn.norm import MeanOnlyBatchNorm

PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@torch.no_grad()
def data_dependent_init(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[str]:
    """Initialize a network from a batch of data (Salimans & Kingma 2016, section 3).

    Runs `model(*inputs, **kwargs)` once, in eval mode and without autocast. Each linear or convolutional
    layer, when it is first touched, gets g and bias such that each of its output units has mean 0 and
    standard deviation `layer.init_scale` (1 for layers without that attribute) on this batch, and hands
    the new output on, so that the next layer is initialized on what it will really see. The running mean
    of a `MeanOnlyBatchNorm` becomes the mean of the batch.

    A unit whose output does not vary over the batch, such as a fully masked one, keeps its default. A
    layer used twice is initialized at its first use, and so are layers that share their weight. A layer
    initialized before is left alone, in this process or, by its persistent `initialized` buffer, in any
    that loads its state. Recurrent layers are left alone too.

    Plain torch layers are initialized as well: the paper's baseline. Their mark lasts for this process and
    for copies, but not in their state dict, which stays torch's.

    Call it before the model is copied, compiled or wrapped, in every process on the same batch.

    Args:
        model: any network.
        inputs: what its forward takes; a few hundred images serve well.
        kwargs: the same, by name.

    Returns:
        The names of the layers that were initialized, in the order of their use.

    Raises:
        ValueError: the outputs of a layer are not all finite.
    """
    layers: dict[nn.Module, str] = {
        layer: name
        for name, layer in model.named_modules()
        if isinstance(layer, (WeightNormalized, MeanOnlyBatchNorm, *PLAIN_LAYERS))
    }
    for layer in layers:
        if not hasattr(layer, "initialized"):
            unmarked = torch.tensor(False, device=layer.get_parameter("weight").device)
            layer.register_buffer("initialized", unmarked, persistent=False)
    pending = [layer for layer in layers if not _initialized(layer)]
    touched: list[str] = []

    def initialize(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if _initialized(layer):
            return None
        if not bool(output.isfinite().all()):
            raise ValueError(f"the outputs of {layers[layer] or type(layer).__name__} on this batch are not all finite")
        _set_moments(layer, output)
        for other in layers:
            if _scaled(other) is _scaled(layer):
                other.get_buffer("initialized").fill_(True)
        touched.append(layers[layer])
        return layer.forward(*args, **kwargs)

    training = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_hook(initialize, with_kwargs=True) for layer in pending]
    model.eval()
    try:
        if pending:
            with torch.autocast(pending[0].get_buffer("initialized").device.type, enabled=False):
                model(*inputs, **kwargs)
    finally:
        for handle in hooks:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return touched


def _initialized(layer: nn.Module) -> bool:
    return bool(layer.get_buffer("initialized"))


def _scaled(layer: nn.Module) -> nn.Parameter:
    """The parameter that initialization scales; layers that share it are initialized together."""
    if isinstance(layer, WeightNormalized):
        return layer.gain_parameter
    return layer.get_parameter("bias" if isinstance(layer, MeanOnlyBatchNorm) else "weight")


def _set_moments(layer: nn.Module, output: Tensor) -> None:
    """Choose g (or the weight) and the bias so that `output` would have had mean 0 and the wanted deviation."""
    if isinstance(layer, MeanOnlyBatchNorm):
        mean = _by_channel(output, 1).mean(dim=1)
        layer.running_mean.add_(mean - layer.bias)
        return
    weight = layer.weight if isinstance(layer, WeightNormalized) else layer.get_parameter("weight")
    # The last dimension of a linear layer's output, the one before space of a convolution's.
    std, mean = torch.std_mean(_by_channel(output, output.dim() + 1 - weight.dim()), dim=1, correction=0)
    varies = std > 1e-6 + 1e-5 * mean.abs()  # less is rounding error, and would blow the weights up
    scale = torch.where(varies, getattr(layer, "init_scale", 1.0) / torch.where(varies, std, 1), 1)
    if isinstance(layer, WeightNormalized):
        layer.set_length(layer.length * layer.per_unit(scale))
    elif isinstance(layer, nn.ConvTranspose2d):
        by_group = weight.unflatten(0, (layer.groups, -1))  # (groups, in / groups, out / groups, height, width)
        weight.copy_((by_group * scale.view(layer.groups, 1, -1, 1, 1)).flatten(0, 1))
    else:
        weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
    if isinstance(layer.bias, Tensor):
        layer.bias.sub_(torch.where(varies, mean, 0)).mul_(scale)


def _by_channel(output: Tensor, channel: int) -> Tensor:
    """`(C, everything else)`, in at least single precision."""
    return output.movedim(channel, 0).flatten(1).to(torch.promote_types(output.dtype, torch.float32))


@torch.no_grad()
def data_free_init(model: nn.Module, gain: float = 2.0, gains: Mapping[str, float] | None = None) -> list[str]:
    """Initialize weight-normalized layers so that they keep the norm of what passes, without any data.

    v is orthogonal, g = sqrt(gain * fan_in / fan_out) and the bias 0. The gain of the first convolution of
    a residual block is `gain`, and that of its last one 1 / (number of residual blocks in the same
    container). A stem and other layers whose input no nonlinearity has halved want a gain of 1: name them
    in `gains`, as in `data_free_init(model, gains={"stem": 1, "*.down.*": 1})`.

    Layers that are initialized already are left alone, and so are recurrent ones. It is derived for ReLU:
    elsewhere, and where there is data, `data_dependent_init` is the better one.

    Args:
        model: any network.
        gain: of every layer that nothing else is said about; 2 makes up for what ReLU takes away.
        gains: other gains, by pattern of the layer's name; the last that matches counts.

    Returns:
        The names of the layers that were initialized.

    Raises:
        ValueError: a pattern that no weight-normalized layer's name matches.

    References:
        How to initialize your network? Robust initialization for WeightNorm & ResNets (Arpit et al., 2019).
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, WeightNormalized)}
    chosen = dict.fromkeys(layers.values(), gain)
    for container in model.modules():
        blocks = [child for child in container.children() if isinstance(child, (ResidualBlock, GatedResidualBlock))]
        for block in blocks:
            chosen.update({layer: 1 / len(blocks) for layer in block.second.modules() if layer in chosen})
    for pattern, value in (gains or {}).items():
        named = [layer for name, layer in layers.items() if fnmatchcase(name, pattern)]
        if not named:
            raise ValueError(f"gains: no weight-normalized layer is called {pattern!r}; there are {', '.join(layers)}")
        chosen.update(dict.fromkeys(named, value))
    pending = {name: layer for name, layer in layers.items() if not _initialized(layer)}
    for layer in pending.values():
        layer.v.copy_(_orthogonal(layer))
        layer.set_length(torch.full_like(layer.length, (chosen[layer] * layer.fan_ratio) ** 0.5))
        if layer.bias is not None:
            layer.bias.zero_()
        layer.initialized.fill_(True)
    return list(pending)


def _orthogonal(layer: WeightNormalized) -> Tensor:
    """A weight whose output units are orthogonal to each other, as many as there is room for."""
    units = layer.gain_parameter.numel()
    rows = nn.init.orthogonal_(torch.empty(units, layer.v.numel() // units))
    if isinstance(layer, WNConvTranspose2d):
        by_group = rows.view(layer.groups, units // layer.groups, -1, *layer.kernel_size)
        return by_group.transpose(1, 2).flatten(0, 1)
    return rows.view_as(layer.v)
