"""What the processes of one run do together: explore in step, agree on the pool, go on as more or fewer.

Only the first process writes. What it writes does not depend on how many there are, but for what each has for itself
(`training/process-N.safetensors` of a checkpoint), so that a run goes on with another number of them.
"""

import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from quarkrl.errors import UserError
from quarkrl.rewards.scorer import Scores
from quarkrl.runs.checkpoints import load_state, states_path
from quarkrl.training.exploration import Rollout, side_by_side


class Rounds:
    """The batches of an exploration, shared out: each process takes one, then they meet, and so on.

    Where they meet they pass on what is scored, stop together where one is asked to, and fail together where one's
    scores have failed. Iterating gives this process's batches and meets in between; it ends when all is scored.

    Args:
        batches: those of all processes.
        rank, size: which process this is, and of how many.
        score: scores what was sampled of a slice.
        keep: is given each batch that any process has scored; None where this one does not write.
        asked: whether this process is to stop.
        along: is given a slice to sample for nothing where this process has no batch and the others need its part of
            the weights; None where they do not.

    Attributes:
        parts: what all processes have scored.
        stopping: one of them is to stop; no further batch begins.
    """

    def __init__(
        self,
        batches: Sequence[slice],
        rank: int,
        size: int,
        score: Callable[[slice, list[list[int]]], Scores],
        keep: Callable[[Rollout], None] | None,
        asked: Callable[[], bool],
        along: Callable[[slice], Any] | None = None,
    ):
        self.batches, self.rank, self.size = batches, rank, size
        self.parts: list[Rollout] = []
        self.stopping = False
        self._score, self._keep, self._asked, self._along = score, keep, asked, along
        self._scored: deque[Rollout] = deque()
        self._begun = self._told = 0
        self._failed: BaseException | None = None

    def side_by_side(
        self, sample: Callable[[slice], list[list[int]]], rows: list[int], stop: Callable[[], None]
    ) -> list[Rollout]:
        """`rollout.side_by_side` for this process's batches; gives what all processes have scored."""
        side_by_side(sample, self.score, rows, self, stop, self.scored, lambda: self.stopping)
        self.meet()  # Where they have stopped, what was under way.
        return self.parts

    def __iter__(self) -> Iterator[slice]:
        for first in range(0, len(self.batches), self.size):
            self.meet()
            if self.stopping:
                return
            if first + self.rank < len(self.batches):
                self._begun += 1
                yield self.batches[first + self.rank]
            elif self._along is not None:
                self._along(self.batches[first])
        while self.meet() and not self.stopping:
            time.sleep(0.1)

    def score(self, batch: slice, completions: list[list[int]]) -> Scores:
        """Score a batch of this process; what that raises ends all of them when they next meet."""
        try:
            return self._score(batch, completions)
        except BaseException as error:
            self._failed = error
            raise

    def scored(self, part: Rollout) -> None:
        """A batch of this process is scored: to be passed on. May be called in another thread."""
        self._scored.append(part)

    def meet(self) -> bool:
        """Pass on what is new; gives whether any process has something under way.

        Raises:
            UserError: scoring has failed in another process; where it was this one, what it raised.
        """
        new = [self._scored.popleft() for _ in range(len(self._scored))]
        self._told += len(new)
        error = self._failed  # Which may come while they meet: then it is told the next time.
        failed = None if error is None else f"process {self.rank}: {error}"
        told = gather_object([(new, self._told < self._begun, self._asked(), failed)])
        for parts, *_ in told:
            self.parts += parts
            for part in parts if self._keep is not None else ():
                self._keep(part)  # type: ignore[misc]
        if error is not None:
            raise error
        if failures := [failed for *_, failed in told if failed is not None]:
            raise UserError(failures[0])
        self.stopping |= any(asked for _, _, asked, _ in told)
        return any(busy for _, busy, _, _ in told)


def same_pool(pool: Any, directory: Path) -> None:
    """See that all processes have read the same samples.

    Raises:
        UserError: they have not, in all of them.
    """
    found = gather_object([(len(pool), zlib.crc32(pool.rewards.tobytes()))])
    if len(set(found)) > 1:
        raise UserError(
            f"processes have read different samples from {str(directory)!r} ({', '.join(str(n) for n, _ in found)}): "
            "to resume, want an output_dir that all machines share"
        )


def own_state(checkpoint: Path, rank: int, size: int) -> dict[str, Any]:
    """What a process had for itself, for this one; where there were more or fewer, their sums stay what they were.

    Args:
        checkpoint: where `process-N` are.
        rank, size: which process this is, and of how many.
    """
    saved = len(list(states_path(checkpoint, "process-0").parent.glob("process-*.safetensors")))
    if saved == size:
        return load_state(states_path(checkpoint, f"process-{rank}"))
    states = [load_state(states_path(checkpoint, f"process-{number}")) for number in range(saved)]
    state = dict(states[min(rank, saved - 1)])
    if rank >= saved:
        del state["random"]  # It goes on as it has begun.
    # Of the loss the processes log the mean; of the others the sum, which is the first one's to add.
    state["loss"] = (sum(each["loss"][0] for each in states) / saved, *states[0]["loss"][1:])
    learned = [sum(values) for values in zip(*(each["learned"] for each in states), strict=True)]
    state["learned"] = learned if rank == 0 else [0.0] * len(learned)
    entropy = sum(each["health"]["entropy"] for each in states)
    state["health"] = {**state["health"], "entropy": entropy if rank == 0 else torch.zeros_like(entropy)}
    return state


def wait_for_all() -> None:
    """Return once all processes are here: where one has ended, launchers kill the others, whatever they had to say."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave(patience: float = 20.0) -> None:
    """Take down gloo and wait until its threads are at rest.

    One that lets go of a tensor when the interpreter has begun to end aborts the process, up to Python 3.13. torch
    waits for them only once nothing refers to their group, and sharded weights do to the last.

    Args:
        patience: after so many seconds it is left to chance.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != "gloo":
        return
    torch.distributed.destroy_process_group()
    before, until = None, time.monotonic() + patience
    while (now := gloo_threads()) != before or any(facts["State"][0] != "S" for facts in now.values()):
        if time.monotonic() > until:
            return
        before = now
        time.sleep(0.02)  # Without Python's lock: one that waits for it runs now, and is not as before.


def gloo_threads() -> dict[str, dict[str, str]]:
    """Of each of gloo's threads that do work whether it sleeps, and how often it has run; none but on Linux."""
    threads = {}
    for path in Path("/proc/self/task").glob("*/status"):
        with suppress(OSError):  # It has ended.
            facts = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
            if facts["Name"].strip().startswith("pt_gloo"):
                told = ("State", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
                threads[path.parent.name] = {name: facts[name].strip() for name in told}
    return threads
