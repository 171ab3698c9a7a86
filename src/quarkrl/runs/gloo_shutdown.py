"""Workaround: end a process without an abort in gloo's threads.

Up to Python 3.13, a gloo thread that frees a tensor while the interpreter shuts down aborts the process. PyTorch joins
these threads only when nothing refers to their process group any more, and sharded weights refer to it to the end.
Upstream: https://github.com/pytorch/pytorch/issues/190489 and https://github.com/pytorch/pytorch/issues/157193.

Remove this file when the oldest supported torch joins gloo's threads in `destroy_process_group` (not in 2.13).
"""

import atexit
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch


@cache
def register_gloo_shutdown() -> None:
    """Shut gloo down at exit. Only the first call registers."""
    atexit.register(shut_down_gloo)


def shut_down_gloo(timeout: float = 20.0) -> None:
    """Destroy the gloo process group and wait until its threads are idle.

    Args:
        timeout: seconds after which the process ends anyway.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != "gloo":
        return
    torch.distributed.destroy_process_group()
    previous, deadline = None, time.monotonic() + timeout
    while (threads := gloo_threads()) != previous or any(status["State"][0] != "S" for status in threads.values()):
        if time.monotonic() > deadline:
            return
        previous = threads
        time.sleep(0.02)  # Releases Python's lock: a thread that waits for it runs now, and its counters change.


def gloo_threads() -> dict[str, dict[str, str]]:
    """Return the state and the context-switch counters of each gloo worker thread, by thread id (Linux only)."""
    threads = {}
    for path in Path("/proc/self/task").glob("*/status"):
        with suppress(OSError):  # The thread has ended.
            status = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
            if status["Name"].strip().startswith("pt_gloo"):
                names = ("State", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
                threads[path.parent.name] = {name: status[name].strip() for name in names}
    return threads
