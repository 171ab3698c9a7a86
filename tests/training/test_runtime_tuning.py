"""oneDNN's caches stay small, and freed memory returns to the operating system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import small_trainer

from quarkrl.models.precision import bf16_is_fast


@pytest.mark.parametrize(("value", "expected"), [(None, "64"), ("1024", "1024")])
def test_a_trainer_limits_onednn_caches_unless_the_user_has_set_them(tmp_path, monkeypatch, value, expected):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    small_trainer(tmp_path)
    assert [os.environ[name] for name in names] == [expected, expected]


@pytest.mark.slow
@pytest.mark.skipif(not bf16_is_fast(), reason="oneDNN computes bf16 products on other processors only")
def test_many_shapes_in_bf16_use_no_more_memory_than_few(tmp_path):
    """A run has about as many lengths. Without a limit, the caches take 0.2 to 0.4 MB for each."""
    script = """
import sys
from pathlib import Path

import torch
from measure import held_bytes
from helpers.runs import small_trainer

from quarkrl.models.precision import bf16_is_fast

from quarkrl.training.runtime_tuning import trim_malloc

small_trainer(Path(sys.argv[1]))
weight = torch.ones(512, 128, dtype=torch.bfloat16)


def products(counts):
    for count in counts:
        torch.nn.functional.linear(torch.ones(count, 128, dtype=torch.bfloat16), weight)
    trim_malloc()  # What malloc keeps is not measured here.


products(range(1, 101))
before = held_bytes("cpu")
products(range(101, 1101))
print(held_bytes("cpu") - before)
"""
    paths = [
        str(Path(__file__).parents[1]),
        str(Path(__file__).parents[2] / "benchmarks"),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        environment.pop(name, None)
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    growth = int(process.stdout.splitlines()[-1])
    assert growth < 50e6, growth


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is a function of glibc")
def test_trim_malloc_returns_freed_memory():
    code = """
import numpy as np
from quarkrl.training.runtime_tuning import trim_malloc
def resident(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))
pieces = [np.ones(12_000) for _ in range(3000)]  # 96 kB each: from the heap, where the last one holds the others.
last, pieces = pieces[-1], None
held = resident()
trim_malloc()
print((held - resident()) / 1000)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(process.stdout) > 200  # MB, of 288
