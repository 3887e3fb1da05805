"""The LightningModule that trains every model, its callbacks, and checkpoint writing."""

from wngen.training.checkpointing import AtomicCheckpointIO, write_safely
from wngen.training.ema import EMA
from wngen.training.images import ImageGrids
from wngen.training.module import Training
from wngen.training.noise_scale import NoiseScale
from wngen.training.objective import objective_nats
from wngen.training.resuming import Checkpoints
from wngen.training.schedule import learning_rate_factor

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "Checkpoints",
    "ImageGrids",
    "NoiseScale",
    "Training",
    "learning_rate_factor",
    "objective_nats",
    "write_safely",
]
