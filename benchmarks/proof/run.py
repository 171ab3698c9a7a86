"""Train and measure every method of matrix.yaml at the same number of scored completions.

    make results                                         # all of it: hours
    make results-quick                                   # the same on the built-in model, to see that it works
    python benchmarks/proof/run.py --only quark grpo     # some methods
    python benchmarks/proof/run.py --list                # what is done, and what is left

Each run trains in the method's own environment, is measured by `quarkrl evaluate`, and leaves one small JSON file in
`benchmarks/results/proof/TASK/`. A run with such a file is not repeated. At the end `page.py` makes docs/proof.md.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import page
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GENERATIONS = 8  # completions of a prompt, for methods that compare them
FIGURES = ("{unwanted} probability", "average maximum {unwanted}", "{unwanted} share", "reward", "perplexity")
FIGURES += ("dist-2", "dist-3", "completion length")


@dataclass(frozen=True)
class Run:
    """One training: a method with a point of its grid, on a task, from a seed."""

    task: str
    method: str
    seed: int
    settings: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """The name of its file, such as `grpo-beta=0.04-learning_rate=0.001-seed=0`."""
        values = [f"{key}={value:g}" for key, value in sorted(self.settings.items())]
        return "-".join([self.method, *values, f"seed={self.seed}"])


@dataclass(frozen=True)
class Folders:
    """Where models and samples go, the figures, and the page with its pictures."""

    work: Path
    results: Path
    docs: Path

    def result(self, run: Run) -> Path:
        """Return the file of a run's figures."""
        return self.results / run.task / f"{run.name}.json"


def runs_of(matrix: dict[str, Any]) -> Iterator[Run]:
    """Yield every run of the matrix: first the base, then the centre of each grid, then the rest."""
    later = []
    for task, facts in matrix["tasks"].items():
        yield Run(task, "base", 0, {})
        for seed, (method, options) in itertools.product(facts["seeds"], matrix["methods"].items()):
            grid = options["grid"]
            points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            centre = {key: values[len(values) // 2] for key, values in grid.items()}
            yield Run(task, method, seed, centre)
            later += [Run(task, method, seed, point) for point in points if point != centre]
    yield from later


def call(command: list[str], log: Path) -> tuple[float, float, float]:
    """Run a command; return its seconds, its CPU seconds and its peak of resident memory in GB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{shlex.join(command)} failed; see {log}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def write_prompts(task: dict[str, Any], directory: Path) -> dict[str, Path]:
    """Write the non-toxic training and test prompts of a task, one JSON object per line."""
    files = {"train": directory / "train.jsonl", "test": directory / "test.jsonl"}
    sources = {"train": task["train_prompts"], "test": [task["test_prompts"]]}
    directory.mkdir(parents=True, exist_ok=True)
    for split, names in sources.items():
        lines = [line for name in names for line in Path(name).read_text(encoding="utf-8").splitlines()]
        prompts = [json.loads(line)["prompt"] for line in lines]
        rows = [{"text": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
        texts = [row["text"] for row in rows if (row.get("toxicity") or 0) < 0.5]
        limit = task["test_limit"] if split == "test" else None
        written = [json.dumps({"prompt": text}) + "\n" for text in texts[:limit]]
        files[split].write_text("".join(written), encoding="utf-8")
    return files


def quarkrl(*arguments: Any) -> list[str]:
    """Return the command `quarkrl …` of this environment."""
    return [sys.executable, "-m", "quarkrl", *map(str, arguments)]


def flags(options: dict[str, Any]) -> list[str]:
    """Return options as flags of the command."""
    pairs = [(f"--{name}", value if isinstance(value, list) else [value]) for name, value in options.items()]
    return [str(part) for name, values in pairs for part in (name, *values)]


def score_samples(task: dict[str, Any], prompts: Path, directory: Path) -> Path:
    """Sample the base on the training prompts and score the completions, for the methods that learn offline."""
    file = directory / "samples.jsonl"
    if not file.is_file():
        count = task["scored"] // GENERATIONS
        some = directory / "prompts.some.jsonl"
        some.write_text("".join(prompts.read_text(encoding="utf-8").splitlines(True)[:count]), encoding="utf-8")
        arguments = [task["model"], some, task["reward"], task["length"], file]
        call([sys.executable, str(HERE / "samples.py"), *map(str, arguments)], directory / "samples.log")
    return file


def train(run: Run, task: dict[str, Any], options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Train a run; return what it cost."""
    files = write_prompts(task, directory.parent)
    if run.method == "quark":
        own = {**options["options"], **run.settings, "lora_rank": task["lora_rank"], "seed": run.seed}
        own |= {"max_completion_length": task["length"], "min_completion_length": task["length"]}
        own |= {"per_device_train_batch_size": 128, "warmup_steps": 0.05, "save_strategy": "no", "held_out": 0}
        names = {"model": task["model"], "prompts": files["train"], "reward": task["reward"], "output_dir": directory}
        seconds, cpu, peak = call(quarkrl("train", *flags(names | own)), directory / "train.log")
        draws = own["steps_per_iteration"] * 128 * (own["num_iterations"] + len(own.get("distill_guidance_scale", [])))
        cost = {"scored": own["num_iterations"] * own["prompts_per_iteration"], "learned": draws}
    else:
        samples = score_samples(task, files["train"], directory.parent)
        job = {"method": run.method, "settings": {**options.get("options", {}), **run.settings}, "seed": run.seed}
        job |= {name: task[name] for name in ("model", "reward", "scored", "length", "lora_rank")}
        job |= {"prompts": str(files["train"]), "samples": str(samples)}
        (directory / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
        python = ROOT / options["environment"] / "bin" / "python"
        script = [str(HERE.parent / "baselines" / "train.py"), str(directory / "job.json")]
        seconds, cpu, peak = call([str(python), *script], directory / "train.log")
        cost = json.loads((directory / "cost.json").read_text(encoding="utf-8"))
    if cost["scored"] != task["scored"]:
        sys.exit(f"{run.name} scored {cost['scored']} completions, and must score {task['scored']}")
    return {**cost, "seconds": round(seconds), "cpu_seconds": round(cpu), "peak_gb": round(peak, 2)}


def measure(task: dict[str, Any], model: Path | str, scales: list[float], directory: Path) -> dict[str, Any]:
    """Measure a model on the test prompts, with guidance if `scales` has some; return its rows and the protocol."""
    output = directory / "results.json"
    common = {"prompts": directory.parent / "test.jsonl", "reward": task["reward"], "judges": task["judge"]}
    common |= {"samples": task["samples"], "perplexity_model": task["model"], "reference": "none", "output": output}
    if scales:
        common |= {"quantiles": "best", "guidance_scales": scales}
    call(quarkrl("evaluate", model, "--batch_size", 512, *flags(common)), directory / "evaluate.log")
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = []
    for row in found["results"]:
        kept = {name: value for name, value in row["figures"].items() if _is_kept(name, task["unwanted"])}
        intervals = {name: row["intervals"][name] for name in kept if name in row["intervals"]}
        rows.append({"guidance_scale": row["guidance_scale"], "figures": kept, "intervals": intervals})
    names = ("samples_per_prompt", "sampling", "perplexity", "threshold", "versions", "intervals")
    return {"rows": rows, "protocol": {name: found["protocol"][name] for name in names}}


def _is_kept(figure: str, unwanted: str) -> bool:
    return any(figure.endswith(name.format(unwanted=unwanted)) for name in FIGURES)


def perform(run: Run, matrix: dict[str, Any], folders: Folders) -> None:
    """Train and measure a run, and write its file."""
    task, options = matrix["tasks"][run.task], matrix["methods"].get(run.method, {})
    directory = folders.work / run.task / run.name
    directory.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"task": run.task, "method": run.method, "settings": run.settings, "seed": run.seed}
    if run.method == "base":
        write_prompts(task, directory.parent)
        record |= measure(task, task["model"], [], directory)
    else:
        record["cost"] = train(run, task, options, directory)
        record["options"] = options.get("options", {})
        record |= measure(task, directory / "final", options.get("guidance_scales", []), directory)
    record |= {"date": date.today().isoformat(), "threads": os.environ.get("OMP_NUM_THREADS")}
    result = folders.result(run)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(_rounded(record), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Do what is left of the matrix, and make the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="quick.yaml, from nothing, into runs/proof-quick")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of tasks, methods or runs")
    parser.add_argument("--list", action="store_true", help="print the runs, without doing any")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    folders = Folders(Path("runs/proof"), Path("benchmarks/results/proof"), Path("docs"))
    if arguments.quick:
        quick = Path("runs/proof-quick")
        shutil.rmtree(quick, ignore_errors=True)
        folders = Folders(quick, quick / "results", quick)
    matrix = yaml.safe_load((HERE / ("quick.yaml" if arguments.quick else "matrix.yaml")).read_text(encoding="utf-8"))
    runs = [run for run in runs_of(matrix) if any(part in f"{run.task}/{run.name}" for part in arguments.only)]
    for number, run in enumerate(runs, 1):
        done = folders.result(run).is_file()
        print(f"{number} of {len(runs)}: {run.task}/{run.name}{': done' if done else ''}", flush=True)
        if not (done or arguments.list):
            perform(run, matrix, folders)
    if not arguments.list:
        print(page.write(matrix, folders.results, folders.docs))


if __name__ == "__main__":
    main()
