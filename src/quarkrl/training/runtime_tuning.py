"""Settings of oneDNN and malloc that lower a run's memory use on a CPU, each with the reason that was measured."""

import ctypes
import os
import platform

from transformers import TrainerCallback

from quarkrl.training.config import QuarkConfig

# oneDNN keeps a compiled primitive for each shape of a matrix product, and PyTorch's bridge to oneDNN keeps it again.
# Each cache holds 1024 shapes by default. In bf16 on a CPU they took 0.65 GB of a run of the built-in model, whose
# varying lengths have as many shapes. With 64 the run is as fast. See pytorch/pytorch#29893 and
# https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html.
_CACHE_CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
# Steps between two calls of `malloc_trim`. After every 10 steps it cost a tenth of the time of a 6M-parameter model.
_STEPS_BETWEEN_TRIMS = 100
# Positions of a part of a batch. Smaller parts are no faster (docs/notebook/2026-11-26-smollm2-speed.md). In bf16 each
# part casts the weights again, which four times as many positions outweigh.
_PART_POSITIONS, _PART_POSITIONS_BF16 = 512, 2048


def positions_of_parts(options: QuarkConfig) -> int:
    """Return the most positions that learning computes at a time; 0 for whole batches, as on a GPU.

    Processes that exchange gradients would exchange those of each part.
    """
    if options.device.type != "cpu" or options.world_size > 1 or options.deepspeed or options.fsdp:
        return 0
    positions = _PART_POSITIONS_BF16 if options.bf16 or options.fp16 else _PART_POSITIONS
    return positions // (3 if options.dpo_coef else 1)  # A draw and its pair are three sequences.


def limit_onednn_caches() -> None:
    """Limit oneDNN's caches by environment variables, which it reads at the first product. A user's values are kept."""
    for name, capacity in _CACHE_CAPACITIES.items():
        os.environ.setdefault(name, capacity)


def trim_malloc() -> None:
    """Return freed memory to the operating system, where the C library is glibc.

    glibc keeps freed memory in fragments that are too small for the next batch, whose shapes differ. A run of a
    6M-parameter model held 2.8 GB after one iteration and 5 GB after fourteen, of which 1.2 GB were in use. PyTorch has
    no call for this yet (pytorch/pytorch#192078).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class MallocTrimCallback(TrainerCallback):
    """Calls `trim_malloc` at the start of each iteration and after every hundredth step."""

    def on_epoch_begin(self, args, state, control, **_):
        """Trim after exploring."""
        trim_malloc()

    def on_step_end(self, args, state, control, **_):
        """Trim every so many steps."""
        if state.global_step % _STEPS_BETWEEN_TRIMS == 0:
            trim_malloc()
