"""Weight-normalized layers, their initialization, and the blocks built of them."""

from wngen.nn.activations import concat_elu, elu
from wngen.nn.blocks import GatedResidualBlock, ResidualBlock
from wngen.nn.init import data_dependent_init
from wngen.nn.layers import (
    MaskedWNConv2d,
    MaskedWNLinear,
    WeightNormalized,
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose2d,
    WNLinear,
)
from wngen.nn.masks import made_degrees, made_mask

__all__ = [
    "GatedResidualBlock",
    "MaskedWNConv2d",
    "MaskedWNLinear",
    "ResidualBlock",
    "WNConv1d",
    "WNConv2d",
    "WNConv3d",
    "WNConvTranspose2d",
    "WNLinear",
    "WeightNormalized",
    "concat_elu",
    "data_dependent_init",
    "elu",
    "made_degrees",
    "made_mask",
]
