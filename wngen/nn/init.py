"""Data-dependent initialization: one forward pass that gives every layer's outputs mean 0 and a chosen deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wngen.nn.layers import WeightNormalized

PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@torch.no_grad()
def data_dependent_init(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[str]:
    """Initialize a network from a batch of data (Salimans & Kingma 2016, section 3).

    Runs `model(*inputs, **kwargs)` once, in eval mode and without autocast. Each linear or convolutional
    layer, when it is first touched, gets g and bias such that each of its output units has mean 0 and
    standard deviation `layer.init_scale` (1 for layers without that attribute) on this batch, and hands
    the new output on, so that the next layer is initialized on what it will really see.

    A unit whose output does not vary over the batch, such as a fully masked one, keeps its default. A
    layer used twice is initialized at its first use. A layer initialized before is left alone, in this
    process or, by its persistent `initialized` buffer, in any that loads its state. Plain torch layers
    are initialized too (the paper's baseline) and get such a buffer.

    Call it before the model is copied, compiled or wrapped, in every process on the same batch.

    Args:
        model: any network.
        inputs: what its forward takes; a few hundred images serve well.
        kwargs: the same, by name.

    Returns:
        The names of the layers that were initialized.
    """
    touched: list[str] = []
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, (WeightNormalized, *PLAIN_LAYERS))
    }
    for layer in layers.values():
        if not hasattr(layer, "initialized"):
            layer.register_buffer("initialized", torch.tensor(False, device=layer.weight.device))

    def initialize(name: str, layer: nn.Module) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if bool(layer.initialized):
                return None
            touched.append(name)
            _set_moments(layer, output)
            return layer.forward(*args)

        return layer.register_forward_hook(hook)

    hooks = [initialize(name, layer) for name, layer in layers.items() if not bool(layer.initialized)]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            model(*inputs, **kwargs)
    finally:
        for handle in hooks:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return touched


def _set_moments(layer: nn.Module, output: Tensor) -> None:
    """Rescale g (or the weight) and the bias so that `output` would have had mean 0 and the wanted deviation."""
    channel = (
        output.dim() + 1 - layer.weight.dim()
    )  # the last dimension of a linear layer, before space in a convolution
    t = output.movedim(channel, 0).flatten(1)
    t = t if t.dtype == torch.float64 else t.float()
    std, mean = torch.std_mean(t, dim=1, correction=0)
    varies = std > 1e-6 + 1e-5 * mean.abs()  # less is rounding error, and would blow the weights up
    scale = torch.where(varies, getattr(layer, "init_scale", 1.0) / torch.where(varies, std, 1), 1).to(output.dtype)
    shift = torch.where(varies, -mean, 0).to(output.dtype)
    if isinstance(layer, WeightNormalized):
        layer.set_length(layer.length * layer.per_unit(scale))
    elif isinstance(layer, nn.ConvTranspose2d):
        by_group = layer.weight.unflatten(0, (layer.groups, -1))
        layer.weight.copy_((by_group * scale.view(layer.groups, 1, -1, 1, 1)).flatten(0, 1))
    else:
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.add_(shift).mul_(scale)
    layer.initialized.fill_(True)
