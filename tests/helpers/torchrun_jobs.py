"""Runs of several processes: start them with torchrun, as a user does. This file is also the script that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.killed_runs import Trap, in_a_process, reward, trainer_of
from helpers.runs import model_of

from quarkrl.cli import main as cli
from quarkrl.runs.gloo_shutdown import gloo_threads, shut_down_gloo

TWO = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}  # Of 4 draws a step, as `RUN` has in one process.


@dataclass
class JobResult:
    """The exit code of a job and its output."""

    code: int
    output: str


def environment() -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_job(directory: Path, processes: int = 2, **spec: Any) -> JobResult:
    """Start a run of `killed_runs.RUN` with torchrun at a free port; one process starts without torchrun.

    Args:
        directory: the run directory.
        processes: the number of processes.
        spec: `options`; `model`, fields of its config; `resume`; `trap`, {rank: the arguments of a `killed_runs.Trap`}
            for processes that must die; `fails`, the reward raises in the second process; `apart`, a working directory
            for each process; or, with `trap`, `argv`: the command runs, and the first process prints late.
    """
    if processes == 1:
        code, output = in_a_process(alone, directory, spec)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        python_path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        job = subprocess.run(
            [*launcher, __file__, json.dumps({"directory": str(directory), **spec})],
            env={**os.environ, **quiet, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        code, output = job.returncode, job.stdout
    return JobResult(code, output)


def alone(directory: Path, spec: dict[str, Any]) -> int:
    return main({"directory": str(directory), **spec})


def final_state(directory: Path, rank: int = 0) -> dict[str, Any]:
    """Return what a process had in memory at the end of the run."""
    return json.loads(Path(f"{directory}.rank-{rank}.json").read_text(encoding="utf-8"))


def scored_completions(directory: Path) -> list[str]:
    """Return the completions that were scored, repeated as often as they were scored, sorted."""
    return sorted(Path(f"{directory}.scored").read_text(encoding="utf-8").splitlines())


def main(spec: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    directory, rank = Path(spec["directory"]), os.environ.get("RANK", "0")
    if trap := spec.get("trap", {}).get(rank):
        Trap(*trap).set()
    if "argv" in spec:
        note = cli.note
        cli.note = lambda text: (time.sleep(6 if rank == "0" else 0), note(text))
        return cli.main(spec["argv"])
    place = directory
    if spec.get("apart"):
        home = directory.parent / f"rank-{rank}"
        home.mkdir()
        os.chdir(home)
        place = Path("run")

    scored_here = 0

    def listed(completion_ids):
        nonlocal scored_here
        scored_here += len(completion_ids)
        return reward(completion_ids, scored=f"{directory}.scored")

    def fails(completion_ids):
        if rank == "1":
            raise ValueError("the scorer is down")
        return reward(completion_ids)

    model = model_of(**spec.get("model", {}))
    scorer = fails if spec.get("fails") else listed
    options = {**spec.get("options", {}), "disable_tqdm": True}
    trainer = trainer_of(place, model=model, scorer=scorer, **options)
    trainer.train(resume_from_checkpoint=spec.get("resume", False))
    trainer.save_final()
    pool = trainer.pool
    facts = {
        "rewards": pool.rewards.tolist(),
        "quantiles": pool.quantiles.tolist(),
        "completions": [sample.completion_ids.tolist() for sample in pool],
        "drawn": trainer.draws.tolist(),
        "scored": scored_here,
        "logs": trainer.state.log_history,
        "layers": [
            type(next(model.transformer.h.parameters())).__name__ for model in (trainer.model, trainer.ref_model)
        ],
    }
    Path(f"{directory}.rank-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    return 0


def shut_down_gloo_under_load(_log: Path) -> None:
    """Call `shut_down_gloo` on a busy core until a gloo thread held a tensor before the call five times.

    In some versions of torch a thread never holds a tensor after it reports completion. 300 rounds are enough then.
    """
    core = min(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    groups, held = [], 0
    try:
        for process in (busy.pid, 0):
            os.sched_setaffinity(process, {core})
        while held < 5 and len(groups) < 300:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
            groups.append(torch.distributed.group.WORLD)  # As sharded weights do.
            for thread in gloo_threads():
                os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
            tensors = [torch.ones(10)]
            reference = weakref.ref(tensors[0])
            torch.distributed.all_reduce(tensors[0])
            tensors.clear()
            held += reference() is not None
            shut_down_gloo()
            assert reference() is None
    finally:
        busy.kill()
        busy.wait()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
