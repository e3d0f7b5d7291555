"""One thread: on a busy machine more are slower, and bits depend on their number."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_stray_randomness():
    """Whoever draws from the global generator must not change what others see."""
    torch.manual_seed(0)
