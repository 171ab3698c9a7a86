"""What every test starts from: no network, one thread, seeded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The global generators start every test alike."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
