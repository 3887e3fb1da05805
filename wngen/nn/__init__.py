"""Weight-normalized layers, their initialization, and the blocks built of them."""

from wngen.nn.activations import concat_elu, elu
from wngen.nn.attention import CausalAttention
from wngen.nn.blocks import GatedResidualBlock, ResidualBlock
from wngen.nn.causal import CausalConv2d, CausalConvTranspose2d, Pointwise, down_shift, right_shift
from wngen.nn.convert import fold, from_torch_state_dict, to_torch_state_dict, weight_norm
from wngen.nn.convolutions import MaskedWNConv2d, WNConv1d, WNConv2d, WNConv3d, WNConvTranspose2d
from wngen.nn.init import data_dependent_init, data_free_init
from wngen.nn.layers import MaskedWNLinear, WeightNormalized, WNLinear
from wngen.nn.masks import causal_mask, made_degrees, made_mask
from wngen.nn.norm import MeanOnlyBatchNorm
from wngen.nn.normalization import normalize
from wngen.nn.recurrent import WNGRU, WNLSTM, WNGRUCell, WNLSTMCell
from wngen.nn.stem import ShiftedConv2d, Stem
from wngen.nn.walk import Walk

__all__ = [
    "WNGRU",
    "WNLSTM",
    "CausalAttention",
    "CausalConv2d",
    "CausalConvTranspose2d",
    "GatedResidualBlock",
    "MaskedWNConv2d",
    "MaskedWNLinear",
    "MeanOnlyBatchNorm",
    "Pointwise",
    "ResidualBlock",
    "ShiftedConv2d",
    "Stem",
    "WNConv1d",
    "WNConv2d",
    "WNConv3d",
    "WNConvTranspose2d",
    "WNGRUCell",
    "WNLSTMCell",
    "WNLinear",
    "Walk",
    "WeightNormalized",
    "causal_mask",
    "concat_elu",
    "data_dependent_init",
    "data_free_init",
    "down_shift",
    "elu",
    "fold",
    "from_torch_state_dict",
    "made_degrees",
    "made_mask",
    "normalize",
    "right_shift",
    "to_torch_state_dict",
    "weight_norm",
]
