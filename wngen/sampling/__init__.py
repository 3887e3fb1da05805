"""Pictures of what a model has learned: samples, completions, reconstructions, what each layer carries."""

from wngen.sampling.completion import autoregressive, completions, mask_from_png, upper_rows
from wngen.sampling.grids import grid, save_gif, save_png
from wngen.sampling.latent import back_and_forth, interpolate, ladder, reconstruct, resample
from wngen.sampling.samples import draw_samples
from wngen.sampling.watching import Film, watched

__all__ = [
    "Film",
    "autoregressive",
    "back_and_forth",
    "completions",
    "draw_samples",
    "grid",
    "interpolate",
    "ladder",
    "mask_from_png",
    "reconstruct",
    "resample",
    "save_gif",
    "save_png",
    "upper_rows",
    "watched",
]
