"""Networks of plain torch layers into weight-normalized ones and back, and the state dicts of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wngen.nn.layers import (
    Gain,
    MaskedWNConv2d,
    MaskedWNLinear,
    WeightNormalized,
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose2d,
    WNLinear,
)
from wngen.nn.recurrent import WNGRU, WNLSTM, WNGRUCell, WNLSTMCell, WNRecurrent

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
# Our layers, torch's, and the settings, which have the same names in both.
_LAYERS: dict[type[nn.Module], tuple[type[nn.Module], tuple[str, ...]]] = {
    WNLinear: (nn.Linear, ("in_features", "out_features")),
    WNConv1d: (nn.Conv1d, (*_CONV, "padding_mode")),
    WNConv2d: (nn.Conv2d, (*_CONV, "padding_mode")),
    WNConv3d: (nn.Conv3d, (*_CONV, "padding_mode")),
    WNConvTranspose2d: (nn.ConvTranspose2d, (*_CONV, "output_padding")),
    MaskedWNLinear: (nn.Linear, ("in_features", "out_features")),
    MaskedWNConv2d: (nn.Conv2d, (*_CONV, "padding_mode")),
    WNLSTMCell: (nn.LSTMCell, ("input_size", "hidden_size")),
    WNGRUCell: (nn.GRUCell, ("input_size", "hidden_size")),
    WNLSTM: (nn.LSTM, ("input_size", "hidden_size", "batch_first")),
    WNGRU: (nn.GRU, ("input_size", "hidden_size", "batch_first")),
}


def weight_norm(model: nn.Module, gain: Gain = "linear", initialized: bool = True) -> nn.Module:
    """Give an existing network weight-normalized layers, without changing what it computes.

    Replaces, in place, every `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and `nn.ConvTranspose2d` by
    ours, with v the old weight and g its norm. Subclasses of these, and everything else, stay. A layer used
    twice stays one layer, and layers that share their weight go on sharing it with each other (not with a
    layer of another kind, such as an embedding). Make optimizers afterwards: the parameters are new.

    Args:
        model: any network. If it is itself such a layer, only the returned one is normalized.
        gain: `linear` or `exponential` parameterization of g.
        initialized: whether the weights are worth keeping. `data_dependent_init` passes over the layers of
            a trained network; say False for a fresh one that it is to initialize.

    Returns:
        The network.

    Raises:
        ValueError: a weight that is computed from other parameters, as by torch's own weight norm; or a
            unit without any weight for an exponential gain.
    """
    ours = {_LAYERS[kind][0]: kind for kind in (WNLinear, WNConv1d, WNConv2d, WNConv3d, WNConvTranspose2d)}
    by_weight: dict[nn.Parameter, WeightNormalized] = {}

    @torch.no_grad()
    def normalized(name: str, layer: nn.Module) -> nn.Module | None:
        if parametrize.is_parametrized(layer, "weight") or (type(layer) in ours and not _is_parameter(layer, "weight")):
            raise ValueError(
                f"the weight of layer {name!r} is computed from other parameters; first take that away, with "
                "torch.nn.utils.remove_weight_norm or torch.nn.utils.parametrize.remove_parametrizations"
            )
        if type(layer) not in ours:
            return None
        weight = layer.get_parameter("weight")
        new = _like(layer, ours[type(layer)], gain=gain, device=weight.device, dtype=weight.dtype)
        assert isinstance(new, WeightNormalized)
        if layer.bias is not None:
            new.bias = layer.get_parameter("bias")
        if weight in by_weight:
            first = by_weight[weight]
            new.v = first.v
            setattr(new, "g" if gain == "linear" else "log_g", first.gain_parameter)
        else:
            by_weight[weight] = new
            new.v = nn.Parameter(torch.empty_like(weight).normal_(std=0.05), weight.requires_grad)  # in its memory format
            try:
                new.set_weight(weight)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            new.gain_parameter.requires_grad_(weight.requires_grad)
        new.initialized.fill_(initialized)
        return new

    return _replaced(model, normalized)


def fold(model: nn.Module) -> nn.Module:
    """A copy of a network with plain torch layers in the place of weight-normalized ones, for inference.

    Masked layers and recurrent ones are folded too. Subclasses of our layers are left as they are.
    """

    @torch.no_grad()
    def plain(name: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) not in _LAYERS:
            return None
        new = _like(layer, _LAYERS[type(layer)][0], device="meta")  # which draws no random numbers
        tensors = layer.weights() if isinstance(layer, WNRecurrent) else [layer.weight, layer.bias]
        for (parameter, _), tensor in zip(list(new.named_parameters()), tensors, strict=False):
            setattr(new, parameter, nn.Parameter(tensor.detach()))
        if isinstance(new, nn.RNNBase):
            new.flatten_parameters()
        return new

    return _replaced(copy.deepcopy(model), plain)


def _is_parameter(layer: nn.Module, name: str) -> bool:
    return name in dict(layer.named_parameters(recurse=False))


def _like(layer: nn.Module, kind: type[nn.Module], **more: object) -> nn.Module:
    """A layer of another kind with the settings of this one."""
    ((_, settings),) = [entry for ours, entry in _LAYERS.items() if kind in (ours, entry[0]) and type(layer) in (ours, entry[0])]
    arguments = {name: getattr(layer, name) for name in settings}
    return kind(**arguments, bias=layer.bias not in (None, False), **more).train(layer.training)


def _replaced(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """`model` with what `replacement` gives for the name and the module put in the module's place, wherever it stands."""
    new = {module: replacement(name, module) for name, module in model.named_modules()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and new[child] is not None:
                setattr(parent, name, new[child])
    return new[model] or model
