"""What every test runs under: fixed seeds, one thread, no network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # the order of a sum, and so its last bits, depends on the number of threads

# Examples are the same in every run, and none is called slow on a busy machine.
hypothesis.settings.register_profile("wngen", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("wngen")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds MNIST/raw and FashionMNIST/raw as torchvision lays them out."""
    if "WNGEN_DATA" not in os.environ:
        pytest.skip(
            "needs real data: set WNGEN_DATA to a folder that torchvision has downloaded MNIST and FashionMNIST to"
        )
    return Path(os.environ["WNGEN_DATA"])
