"""wngen: likelihood-based models of images from weight-normalized layers."""

from wngen.checkpoint import load
from wngen.image import Batch, ImageSpec
from wngen.latent import LatentVariableModel
from wngen.model import Bound, LikelihoodModel
from wngen.noise import Noise

__all__ = ["Batch", "Bound", "ImageSpec", "LatentVariableModel", "LikelihoodModel", "Noise", "load"]
