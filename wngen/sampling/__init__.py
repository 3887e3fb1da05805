"""Pictures of what a model has learned: samples, reconstructions, interpolations."""

from wngen.sampling.grids import grid, save_gif, save_png
from wngen.sampling.latent import back_and_forth, interpolate, reconstruct

__all__ = ["back_and_forth", "grid", "interpolate", "reconstruct", "save_gif", "save_png"]
