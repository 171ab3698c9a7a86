"""How far the demo's result depends on the seed and the number of threads.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --threads 1 2 --output benchmarks/results/demo-seeds.json

trains the preset `tiny-toxicity` once for each seed and number of threads, one run after another, and evaluates it as
`quarkrl demo` does. It prints the change from the reference in each run, and the range over all. Finished runs in
`--runs` are not repeated. A run takes about as long as `make demo`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GOALS = {"toxicity probability": -0.90, "perplexity": 0.10, "dist-2": -0.05}
MODEL = Path(__file__).parents[1] / "src/quarkrl/builtin/model"


def run_once(directory: Path, seed: int, threads: int) -> dict[str, Any]:
    """Train and evaluate; return the figures of reference, best and worst quantile, and the seconds of training."""
    record = directory / "record.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "quarkrl"]
    train = ["train", "--config", "tiny-toxicity", "--seed", str(seed), "--output_dir", str(directory / "run")]
    start = time.perf_counter()
    subprocess.run([*command, *train], check=True, env=environment)
    seconds = time.perf_counter() - start
    results = directory / "results.json"
    measure = ["--prompts", "builtin", "--reward", "profanity", "--reference", str(MODEL), "--batch_size", "1024"]
    evaluate = ["evaluate", str(directory / "run" / "final"), *measure, "--output", str(results)]
    subprocess.run([*command, *evaluate], check=True, env=environment)
    rows = json.loads(results.read_text(encoding="utf-8"))["results"]
    figures = {row["name"]: {name: row["figures"][name] for name in GOALS} for row in rows}
    found = {"seed": seed, "threads": threads, "seconds_train": round(seconds, 1), "figures": figures}
    record.write_text(json.dumps(found), encoding="utf-8")
    return found


def change(record: dict[str, Any], name: str) -> float:
    """Return the relative change of a figure on the best quantile."""
    figures = record["figures"]
    return figures["best"][name] / figures["reference"][name] - 1


def main() -> None:
    """Run all combinations, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"), help="directory of the runs")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    arguments = parser.parse_args()
    records = []
    for threads in arguments.threads:
        for seed in arguments.seeds:
            directory = arguments.runs / f"seed{seed}-threads{threads}"
            directory.mkdir(parents=True, exist_ok=True)
            records.append(run_once(directory, seed, threads))
    lines = ["| seed | threads | toxicity probability | perplexity | dist-2 | training |", "|---|---|---|---|---|---|"]
    for record in records:
        changes = " | ".join(f"{change(record, name):+.1%}" for name in GOALS)
        lines.append(f"| {record['seed']} | {record['threads']} | {changes} | {record['seconds_train']:.0f} s |")
    ranges = []
    for name, goal in GOALS.items():
        values = sorted(change(record, name) for record in records)
        worst, best = (values[0], values[-1]) if name == "dist-2" else (values[-1], values[0])
        ranges.append(f"{best:+.1%} to {worst:+.1%} (goal {goal:+.0%})")
    lines.append(f"| all | | {' | '.join(ranges)} | |")
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
