"""What every test starts from: no network, no GPU, one thread, seeds, quiet libraries."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
if "gpu" not in sys.argv:  # All tests but those of `-m gpu` are the same on every machine.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import random
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers.utils import logging

signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell ignores it in processes in the background.
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def seeded():
    """The global generators start every test alike."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The directory of SmolLM2-135M-Instruct, for tests marked `real_model`."""
    directory = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
    if not directory.is_dir():
        pytest.skip(f"{directory} is missing: make real-model")
    return directory


@pytest.fixture
def server():
    """A server on loopback that scores, judges and misbehaves."""
    from helpers.server import Server

    with Server() as running:
        yield running


@pytest.fixture
def surroundings(monkeypatch):
    """No keys and no proxy from the environment, and back-off that starts at 20 ms."""
    from quarkrl.rewards.functions import endpoint as http

    for variable in ("PERSPECTIVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http, "FIRST_WAIT", 0.02)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; skips where it or playwright is not installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program = next(filter(None, programs), None)
    if program is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()
