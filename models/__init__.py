"""The architectures, one file each, readable from top to bottom."""

from wngen.models.conv_vae import ConvVAE

__all__ = ["ConvVAE"]
