"""The architectures, one file each, readable from top to bottom."""

from wngen.models.conv_vae import ConvVAE
from wngen.models.pixelcnn import PixelCNN
from wngen.models.pixelcnn_pp import PixelCNNPP
from wngen.models.pixelsnail import PixelSNAIL
from wngen.models.resnet_vae import ResNetVAE

__all__ = ["ConvVAE", "PixelCNN", "PixelCNNPP", "PixelSNAIL", "ResNetVAE"]
