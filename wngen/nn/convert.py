"""Networks of plain torch layers into weight-normalized ones and back, and the state dicts of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wngen.nn.convolutions import MaskedWNConv2d, WNConv1d, WNConv2d, WNConv3d, WNConvTranspose2d
from wngen.nn.layers import Gain, MaskedWNLinear, WeightNormalized, WNLinear
from wngen.nn.normalization import normalize
from wngen.nn.recurrent import WNGRU, WNLSTM, WNGRUCell, WNLSTMCell, WNRecurrent

Spelling = Literal["parametrization", "hook"]

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    WNLinear: nn.Linear,
    WNConv1d: nn.Conv1d,
    WNConv2d: nn.Conv2d,
    WNConv3d: nn.Conv3d,
    WNConvTranspose2d: nn.ConvTranspose2d,
    MaskedWNLinear: nn.Linear,
    MaskedWNConv2d: nn.Conv2d,
    WNLSTMCell: nn.LSTMCell,
    WNGRUCell: nn.GRUCell,
    WNLSTM: nn.LSTM,
    WNGRU: nn.GRU,
}
_NORMALIZED = {_PLAIN[ours]: ours for ours in (WNLinear, WNConv1d, WNConv2d, WNConv3d, WNConvTranspose2d)}
# Settings have the same names in our layers and in torch's.
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: (*_CONV, "padding_mode"),
    nn.Conv2d: (*_CONV, "padding_mode"),
    nn.Conv3d: (*_CONV, "padding_mode"),
    nn.ConvTranspose2d: (*_CONV, "output_padding"),
    nn.LSTMCell: ("input_size", "hidden_size"),
    nn.GRUCell: ("input_size", "hidden_size"),
    nn.LSTM: ("input_size", "hidden_size", "batch_first"),
    nn.GRU: ("input_size", "hidden_size", "batch_first"),
}


def weight_norm(model: nn.Module, gain: Gain = "linear", initialized: bool = True) -> nn.Module:
    """Give an existing network weight-normalized layers, without changing what it computes.

    Replaces, in place, every `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and `nn.ConvTranspose2d` by
    ours, with v the old weight and g its norm. Subclasses of these, and everything else, stay. A layer used
    twice stays one layer, and layers of one kind that share their weight go on sharing it (but not with
    anything of another kind, such as an embedding). Make optimizers afterwards: the parameters are new.

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
    by_weight: dict[tuple[type[nn.Module], nn.Parameter], WeightNormalized] = {}

    @torch.no_grad()
    def normalized(name: str, layer: nn.Module) -> nn.Module | None:
        kind = parametrize.type_before_parametrizations(layer)
        if kind not in _NORMALIZED:
            return None
        if "weight" not in dict(layer.named_parameters(recurse=False)):
            raise ValueError(
                f"the weight of layer {name!r} is computed from other parameters; first take that away, with "
                "torch.nn.utils.remove_weight_norm or torch.nn.utils.parametrize.remove_parametrizations"
            )
        weight = layer.get_parameter("weight")
        new = _like(layer, kind, _NORMALIZED[kind], gain=gain, device=weight.device, dtype=weight.dtype)
        assert isinstance(new, WeightNormalized)
        if layer.bias is not None:
            new.bias = layer.get_parameter("bias")
        first = by_weight.setdefault((kind, weight), new)
        if first is not new:
            new.v = first.v
            setattr(new, "g" if gain == "linear" else "log_g", first.gain_parameter)
        else:
            new.v = nn.Parameter(torch.empty_like(weight).copy_(new.v))  # takes over the memory format
            try:
                new.set_weight(weight)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            new.v.requires_grad_(weight.requires_grad)
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
        if type(layer) not in _PLAIN:
            return None
        kind = _PLAIN[type(layer)]
        new = _like(layer, kind, kind, device="meta")  # which draws no random numbers
        if isinstance(layer, WNRecurrent):
            tensors = layer.weights()
        else:
            assert isinstance(layer, WeightNormalized)
            tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        for (parameter, _), tensor in zip(list(new.named_parameters()), tensors, strict=True):
            setattr(new, parameter, nn.Parameter(tensor.detach()))
        if isinstance(new, nn.RNNBase):
            new.flatten_parameters()
        return new

    return _replaced(copy.deepcopy(model), plain)


def _like(layer: nn.Module, plain: type[nn.Module], kind: type[nn.Module], **more: object) -> nn.Module:
    """A `kind` with the settings that `layer` shares with the `plain` one."""
    settings = {name: getattr(layer, name) for name in _SETTINGS[plain]}
    bias = layer.bias if isinstance(layer, WNRecurrent) else layer.bias is not None
    return kind(**settings, bias=bias, **more).train(layer.training)


def _replaced(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """`model` with what `replacement` gives for a module's name and the module in its place, wherever it stands."""
    new = {module: replacement(name, module) for name, module in model.named_modules()}
    for parent in new:
        for name, child in list(parent._modules.items()):  # named_children would leave out a second use
            if child is not None and new[child] is not None:
                setattr(parent, name, new[child])
    replaced = new[model]
    return model if replaced is None else replaced


class _Place(NamedTuple):
    """Where a weight-normalized layer stands in our state dict, and where in that of torch's network."""

    layer: WeightNormalized
    prefix: str
    torch_prefix: str
    torch_weight: str
    torch_bias: str

    def torch_names(self, spelling: Spelling) -> tuple[str, str]:
        """Of g and v."""
        if spelling == "hook":
            return f"{self.torch_prefix}{self.torch_weight}_g", f"{self.torch_prefix}{self.torch_weight}_v"
        parametrized = f"{self.torch_prefix}parametrizations.{self.torch_weight}."
        return f"{parametrized}original0", f"{parametrized}original1"


def _places(model: nn.Module) -> Iterator[_Place]:
    parts = set()
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, WNRecurrent):
            number = "_l0" if isinstance(module, (WNLSTM, WNGRU)) else ""
            for part, layer in (("ih", module.ih), ("hh", module.hh)):
                parts.add(layer)
                yield _Place(layer, f"{prefix}{part}.", prefix, f"weight_{part}{number}", f"bias_{part}{number}")
        elif isinstance(module, WeightNormalized) and module not in parts:
            yield _Place(module, prefix, prefix, "weight", "bias")


@torch.no_grad()
def to_torch_state_dict(
    model: nn.Module, spelling: Spelling = "parametrization", transposed_dim: Literal[0, 1] = 0
) -> dict[str, Tensor]:
    """The state dict of the same network made of torch layers under torch's own weight norm.

    Args:
        model: a network with weight-normalized layers.
        spelling: `parametrization` for `torch.nn.utils.parametrizations.weight_norm`, whose tensors are
            called `parametrizations.weight.original0` and `original1`; `hook` for the older
            `torch.nn.utils.weight_norm` with `weight_g` and `weight_v`.
        transposed_dim: the `dim` that torch's weight norm was given for transposed convolutions. Its default
            takes one norm for each input channel, which is not ours: their v becomes the effective weight.

    Returns:
        A state dict with which torch's network computes what `model` does. The weight of a masked layer
        comes with its zeros, that of a unit without any as g = 0 (torch would make 0 / 0 of it).

    Raises:
        ValueError: an unknown spelling.
    """
    if spelling not in get_args(Spelling):
        raise ValueError(f"spelling={spelling!r}: wanted one of {', '.join(get_args(Spelling))}")
    state = dict(model.state_dict())
    for place in _places(model):
        layer = place.layer
        for name in ("v", "g", "log_g", "initialized"):
            state.pop(place.prefix + name, None)
        if layer.bias is not None:
            state[place.torch_prefix + place.torch_bias] = state.pop(place.prefix + "bias")
        v, g, dims = layer.direction.detach(), layer.length.detach(), layer.dims
        if isinstance(layer, WNConvTranspose2d) and (transposed_dim == 0 or layer.groups > 1):
            v, dims = layer.weight, tuple(dim for dim in range(4) if dim != transposed_dim)
            g = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
        empty = torch.linalg.vector_norm(v, dim=dims, keepdim=True) == 0
        g_name, v_name = place.torch_names(spelling)
        state[g_name], state[v_name] = torch.where(empty, 0, g), torch.where(empty, 1, v)
    return state


@torch.no_grad()
def from_torch_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from that of the same network made of torch layers.

    Takes both spellings of torch's weight norm, with whatever `dim`, and layers without it. Where torch's g
    is not one number for each output unit, v becomes the effective weight, so that the network computes the
    same in every case. All layers count as initialized.

    Args:
        model: a network with weight-normalized layers, which is left as it is.
        state_dict: of torch's network.

    Returns:
        A state dict for `model.load_state_dict`.

    Raises:
        ValueError: a layer whose weight is missing or has another shape.
    """
    state = dict(state_dict)
    for place in _places(model):
        layer = copy.deepcopy(place.layer)
        weight_name = place.torch_prefix + place.torch_weight
        names = [pair for pair in map(place.torch_names, get_args(Spelling)) if pair[0] in state and pair[1] in state]
        if names:
            g, v = state.pop(names[0][0]), state.pop(names[0][1])
        elif weight_name in state:
            g, v = None, state.pop(weight_name)
        else:
            wanted = ", ".join(place.torch_names(spelling)[1] for spelling in get_args(Spelling))
            raise ValueError(f"no weight for layer {place.prefix[:-1]!r}: looked for {wanted}, {weight_name}")
        if v.shape != layer.v.shape:
            raise ValueError(f"layer {place.prefix[:-1]!r}: v is {tuple(v.shape)}, wanted {tuple(layer.v.shape)}")
        if layer.bias is not None and place.torch_prefix + place.torch_bias in state:
            state[place.prefix + "bias"] = state.pop(place.torch_prefix + place.torch_bias)
        ours = g is not None and g.shape == layer.length.shape and layer.mask is None
        if g is not None and ours and (layer.gain == "linear" or bool((g > 0).all())):
            layer.v.copy_(v)
            layer.set_length(g)
        elif g is not None:
            dims = tuple(dim for dim in range(v.dim()) if g.dim() == 0 or g.shape[dim] == 1)
            layer.set_weight(normalize(v, g, dims))
        else:
            layer.set_weight(v)
        layer.initialized.fill_(True)
        for name, tensor in layer.state_dict().items():
            if name != "bias":
                state[place.prefix + name] = tensor
    return state
