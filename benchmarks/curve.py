"""Plot the mean reward and the mean KL of runs by iteration.

    python benchmarks/curve.py RUN [RUN ...] --output docs/images/curve.png

reads `RUN/metrics.jsonl`. It needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


def read(run: Path) -> tuple[list[float], list[float], list[float]]:
    """Return, by iteration, the mean reward, its standard deviation, and the mean KL per token while learning."""
    rewards: list[float] = []
    spreads: list[float] = []
    kls: list[list[float]] = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "unscored" in entry:
            rewards.append(entry["reward"])
            spreads.append(entry["reward_std"])
            kls.append([])
        elif "kl" in entry and kls:
            kls[-1].append(entry["kl"])
    return rewards, spreads, [sum(values) / len(values) if values else float("nan") for values in kls]


def main() -> None:
    """Plot the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    for run in arguments.runs:
        rewards, _, kls = read(run)
        top.plot(rewards, marker="o", markersize=3, label=run.name)
        bottom.plot(kls, marker="o", markersize=3, label=run.name)
    top.set_ylabel("mean reward of the exploration")
    bottom.set_ylabel("KL, nats per token")
    bottom.set_xlabel("iteration")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(arguments.runs) > 1:
        top.legend()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)
    print(arguments.output)


if __name__ == "__main__":
    main()
