"""Train and measure every method of matrix.yaml at the same number of scored completions.

    make results                                         # all of it: hours
    make results-quick                                   # the same on the built-in model, to see that it works
    python benchmarks/proof/run.py --only quark grpo     # some methods
    python benchmarks/proof/run.py --list                # what is done, and what is left
    python benchmarks/proof/run.py --jobs 8              # several at a time, on a machine with as many cores to spare
    make ablations                                       # variants of Quark, in ablations.yaml

A task may change methods: what it says under `methods` replaces the method's grid, options or scales. Each run trains
in the method's own environment, is measured by `quarkrl evaluate`, and leaves one small JSON file in
`benchmarks/results/proof/TASK/`. A run with such a file is not repeated. At the end `page.py` makes docs/proof.md, or
what the matrix names as `page`.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import yaml
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GENERATIONS = 8  # completions of a prompt, for methods that compare them
OFFLINE = ("dpo", "sft")
FIGURES = ("{unwanted} probability", "average maximum {unwanted}", "{unwanted} share", "reward", "perplexity")
FIGURES += ("dist-2", "dist-3", "completion length")


class Failure(Exception):
    """A run that cannot be finished; the others go on."""


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
        for seed, method in itertools.product(facts["seeds"], matrix["methods"]):
            grid = method_of(matrix, task, method)["grid"]
            points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            centre = {key: values[len(values) // 2] for key, values in grid.items()}
            yield Run(task, method, seed, centre)
            later += [Run(task, method, seed, point) for point in points if point != centre]
    yield from later


def method_of(matrix: dict[str, Any], task: str, method: str) -> dict[str, Any]:
    """Return what the matrix says of a method, changed by what the task says of it."""
    return {**matrix["methods"].get(method, {}), **matrix["tasks"][task].get("methods", {}).get(method, {})}


def call(command: list[str], log: Path) -> tuple[float, float, float]:
    """Run a command; return its seconds, its CPU seconds and its peak of resident memory in GB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise Failure(f"{shlex.join(command)} failed; see {log}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def write_prompts(task: dict[str, Any], directory: Path) -> dict[str, Path]:
    """Write the non-toxic prompts of a task: to train on, to choose a setting by (maybe none), and to report.

    Without files of its own, every fifth prompt by its hash is held out. Prompts of another domain are reported alone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    training, held_out = read_prompts(task["train_prompts"]), read_prompts(task.get("test_prompts", []))
    if not held_out:
        held_out = [text for text in training if _hash(text) % 5 == 0]
        training = [text for text in training if _hash(text) % 5]
    chosen, limit = task["select_limit"], task["test_limit"]
    splits = {"train": training, "select": held_out[:chosen], "test": held_out[chosen : chosen + limit]}
    splits["other"] = read_prompts(task.get("other_prompts", []))[:limit]
    with FileLock(directory / "lock"):  # Other runs of the task wait.
        for split, texts in splits.items():
            lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
            temporary = directory / f"{split}.jsonl.part"
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.replace(directory / f"{split}.jsonl")
    return {split: directory / f"{split}.jsonl" for split in splits}


def prepare(task: dict[str, Any], directory: Path) -> None:
    """Make the task's model and prompts by its script, if it has one and they are not there."""
    with FileLock(directory / "lock"):  # Other runs of the task wait.
        if "script" in task and not Path(task["model"]).is_dir():
            call([sys.executable, task["script"]], directory / "script.log")


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def read_prompts(files: list[str]) -> list[str]:
    """Return the prompts of files, without those that are toxic themselves."""
    lines = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    prompts = [json.loads(line)["prompt"] for line in lines]
    rows = [{"text": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    return [row["text"] for row in rows if (row.get("toxicity") or 0) < 0.5]


def flags(options: dict[str, Any]) -> list[str]:
    """Return options as flags of the command."""
    pairs = [(f"--{name}", value if isinstance(value, list) else [value]) for name, value in options.items()]
    return [str(part) for name, values in pairs for part in (name, *values)]


def score_samples(task: dict[str, Any], prompts: Path, directory: Path) -> tuple[Path, float]:
    """Sample the base and score the completions, for the methods that learn offline; return file and CPU seconds."""
    file, cost = directory / "samples.jsonl", directory / "samples.cost.json"
    with FileLock(directory / "lock"):  # Other runs of the task wait.
        if not cost.is_file():
            count = task["scored"] // GENERATIONS
            some = directory / "prompts.some.jsonl"
            lines = itertools.cycle(prompts.read_text(encoding="utf-8").splitlines(True))  # There may be few.
            some.write_text("".join(itertools.islice(lines, count)), encoding="utf-8")
            arguments = [task["model"], some, task["reward"], task["length"], file]
            command = [sys.executable, str(HERE / "samples.py"), *map(str, arguments)]
            cost.write_text(json.dumps(call(command, directory / "samples.log")[1]), encoding="utf-8")
    return file, json.loads(cost.read_text(encoding="utf-8"))


def train_quark(run: Run, task: dict[str, Any], options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Train with quarkrl; return what it cost."""
    own = {"lora_rank": task["lora_rank"], "per_device_train_batch_size": 128, "warmup_steps": 0.05}
    own |= {**options["options"], **run.settings, "seed": run.seed}
    own |= {"max_completion_length": task["length"], "min_completion_length": task["length"]}
    own |= {"save_strategy": "no", "held_out": 0, "raw": True, "defaults": "paper"}  # Not those fitted to the model.
    names = {"model": task["model"], "reward": task["reward"], "prompts": directory.parent / "train.jsonl"}
    run_directory = directory / "run"
    train = ["train", *flags(names | own), "--output_dir", str(run_directory)]
    script = [str(HERE / "variants.py"), variant] if (variant := options.get("variant")) else ["-m", "quarkrl"]
    seconds, cpu, peak = call([sys.executable, *script, *train], directory / "train.log")
    (run_directory / "final").rename(directory / "final")
    scored = sum(parquet.read_metadata(file).num_rows for file in (run_directory / "pool").glob("iteration-*.parquet"))
    iterations = own["num_iterations"] + len(own.get("distill_guidance_scale", [])) * own.get("distill_iterations", 1)
    sequences = 3 if own.get("dpo_coef") else 1  # A sample, and both of its pair.
    cost = {
        "scored": scored,
        "learned": iterations * own["steps_per_iteration"] * own["per_device_train_batch_size"] * sequences,
    }
    return cost | {"seconds": seconds, "cpu_seconds": cpu, "peak_gb": peak}


def train_baseline(run: Run, task: dict[str, Any], options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Train with TRL, in its own environment; return what it cost, with the sampling that it learns from."""
    job = {"method": run.method, "settings": {**options.get("options", {}), **run.settings}, "seed": run.seed}
    job |= {name: task[name] for name in ("model", "reward", "scored", "length", "lora_rank")}
    job |= {"prompts": str(directory.parent / "train.jsonl"), "samples": ""}
    sampling = 0.0
    if run.method in OFFLINE:
        samples, sampling = score_samples(task, directory.parent / "train.jsonl", directory.parent)
        job["samples"] = str(samples)
    (directory / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    python = ROOT / options["environment"] / "bin" / "python"
    script = [str(HERE.parent / "baselines" / "train.py"), str(directory / "job.json")]
    seconds, cpu, peak = call([str(python), *script], directory / "train.log")
    cost = json.loads((directory / "cost.json").read_text(encoding="utf-8"))
    return cost | {"seconds": seconds + sampling, "cpu_seconds": cpu + sampling, "peak_gb": peak}


def measure(
    task: dict[str, Any], model: Path | str, decoding: dict[str, Any], directory: Path, rerank: int = 0
) -> dict[str, Any]:
    """Measure a model on the files of held-out prompts, at each temperature.

    Args:
        task: of the matrix.
        model: a directory.
        decoding: further options of `quarkrl evaluate`, such as scales of guidance.
        directory: where its output goes.
        rerank: so many completions are sampled for each, and the best by the reward counts; 0 for none.
    """
    rows: list[dict[str, Any]] = []
    protocol: dict[str, Any] = {}
    for temperature in task["temperatures"]:
        found = evaluate(task, model, {**decoding, "temperature": temperature}, directory, rerank)
        for row in found["results"]:
            kept = {name: value for name, value in row["figures"].items() if _is_kept(name, task["unwanted"])}
            intervals = {name: row["intervals"][name] for name in kept if name in row["intervals"]}
            described = {"prompts": row["prompts"], "guidance_scale": row["guidance_scale"], "temperature": temperature}
            described |= {"steers": True} if "steered_by" in decoding else {}
            rows.append({**described, "figures": kept, "intervals": intervals})
        names = ("samples_per_prompt", "sampling", "perplexity", "threshold", "versions", "intervals")
        protocol = {name: found["protocol"][name] for name in names}
    return {"rows": rows, "protocol": protocol}


def evaluate(
    task: dict[str, Any], model: Path | str, decoding: dict[str, Any], directory: Path, rerank: int
) -> dict[str, Any]:
    """Return the results of `quarkrl evaluate`; the arguments are as in `measure`."""
    stem = f"{'steered-' if 'steered_by' in decoding else ''}{decoding['temperature']:g}"
    output = directory / f"results-{stem}.json"
    files = [
        file for name in ("select", "test", "other") if (file := directory.parent / f"{name}.jsonl").stat().st_size
    ]
    common = {"prompts": files, "reward": task["reward"], "judges": task["judge"], "samples": task["samples"]}
    common |= {"max_new_tokens": task["length"], "min_new_tokens": task["length"]}
    common |= {"perplexity_model": task["model"], "reference": "none", "output": output}
    common |= {"threshold": task["threshold"]} if "threshold" in task else {}
    script = [str(HERE / "rerank.py"), str(rerank)] if rerank else ["-m", "quarkrl"]
    command = [sys.executable, *script, "evaluate", str(model), "--raw", "--batch_size", "512"]
    call([*command, *flags(common | decoding)], directory / f"evaluate-{stem}.log")
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def _is_kept(figure: str, unwanted: str) -> bool:
    is_judged = ": " in figure and figure.endswith((" share", " probability"))
    return is_judged or any(figure.endswith(name.format(unwanted=unwanted)) for name in FIGURES)


def perform(run: Run, matrix: dict[str, Any], folders: Folders) -> None:
    """Train and measure a run, and write its file."""
    task, options = matrix["tasks"][run.task], method_of(matrix, run.task, run.method)
    directory = folders.work / run.task / run.name
    shutil.rmtree(directory, ignore_errors=True)  # What an interrupted run has left.
    directory.mkdir(parents=True)
    prepare(task, directory.parent)
    write_prompts(task, directory.parent)
    record: dict[str, Any] = {"task": run.task, "method": run.method, "settings": run.settings, "seed": run.seed}
    record["digest"] = digest(run, matrix)
    if run.method == "base":
        record |= measure(task, task["model"], {}, directory)
    elif run.method == "rerank":
        record |= measure(task, task["model"], {}, directory, rerank=run.settings["n"])
    else:
        train = train_baseline if "environment" in options else train_quark
        cost = record["cost"] = train(run, task, options, directory)
        if cost["scored"] != task["scored"]:
            raise Failure(f"{run.name} scored {cost['scored']} completions, and must score {task['scored']}")
        record["options"] = options.get("options", {})
        decoding = {}
        if train is train_quark:
            decoding = {"quantiles": "best", "guidance_scales": options.get("guidance_scales", [1])}
        record |= measure(task, directory / "final", decoding, directory)
        if steering := options.get("steering_scales"):
            decoding = {"steered_by": directory / "final", "guidance_scales": steering}
            record["rows"] += measure(task, task["model"], decoding, directory)["rows"]
    record |= {"date": date.today().isoformat(), "threads": os.environ.get("OMP_NUM_THREADS"), "device": device()}
    result = folders.result(run)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(rounded(record), indent=1) + "\n", encoding="utf-8")


def digest(run: Run, matrix: dict[str, Any]) -> str:
    """Return what a run's figures depend on, so that they are not kept when it changes."""
    method = {name: value for name, value in method_of(matrix, run.task, run.method).items() if name != "grid"}
    task = {name: value for name, value in matrix["tasks"][run.task].items() if name not in ("seeds", "methods")}
    text = json.dumps([task, method, run.settings, run.seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_done(run: Run, matrix: dict[str, Any], folders: Folders) -> bool:
    """Return whether the figures of a run are there, and are those of this matrix."""
    file = folders.result(run)
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["digest"] == digest(run, matrix)


def device() -> str:
    """Return the name of the GPU that runs use, or cpu."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def rounded(value: Any) -> Any:
    """Return a value of JSON with five significant digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Do what is left of the matrix, and make the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matrix", type=Path, default=HERE / "matrix.yaml", help="what to run")
    parser.add_argument("--quick", action="store_true", help="quick.yaml, from nothing, into runs/proof-quick")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of tasks, methods or runs")
    parser.add_argument("--list", action="store_true", help="print the runs, without doing any")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    matrix = yaml.safe_load((HERE / "quick.yaml" if arguments.quick else arguments.matrix).read_text(encoding="utf-8"))
    os.chdir(ROOT)
    folders = Folders(Path("runs/proof"), Path("benchmarks/results/proof"), Path("docs"))
    if arguments.quick:
        quick = Path("runs/proof-quick")
        shutil.rmtree(quick, ignore_errors=True)
        folders = Folders(quick, quick / "results", quick)
    runs = [run for run in runs_of(matrix) if any(part in f"{run.task}/{run.name}" for part in arguments.only)]
    left = [run for run in runs if not is_done(run, matrix, folders)]
    print(f"{len(runs)} runs, {len(left)} to do", flush=True)

    if arguments.list:
        return print(*(f"{run.task}/{run.name}" for run in left), sep="\n")

    def attempt(run: Run) -> bool:
        print(f"{run.task}/{run.name}", flush=True)
        try:
            perform(run, matrix, folders)
        except Failure as failure:
            print(failure, file=sys.stderr, flush=True)
            return False
        return True

    with ThreadPoolExecutor(arguments.jobs) as threads:  # Each waits for the processes of a run.
        succeeded = all(list(threads.map(attempt, left)))
    page = importlib.import_module(matrix.get("page", "page"))  # Its library is not needed where runs are.
    print(page.write(matrix, folders.results, folders.docs))
    if not succeeded:
        sys.exit(1)


if __name__ == "__main__":
    main()
