"""The LightningModule that trains every model, its callbacks, and checkpoint writing."""

from wngen.training.checkpointing import AtomicCheckpointIO, write_safely
from wngen.training.ema import EMA
from wngen.training.forced_norm import ForcedWeightNorm
from wngen.training.images import ImageGrids
from wngen.training.module import Training
from wngen.training.noise_scale import NoiseScale
from wngen.training.objective import objective_nats
from wngen.training.resuming import Checkpoints
from wngen.training.schedule import learning_rate_factor
from wngen.training.weight_norm_health import WeightNormHealth

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "Checkpoints",
    "ForcedWeightNorm",
    "ImageGrids",
    "NoiseScale",
    "Training",
    "WeightNormHealth",
    "learning_rate_factor",
    "objective_nats",
    "write_safely",
]
