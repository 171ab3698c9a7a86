"""Run directories that are written by hand, without a model: pool, metrics, options, and an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from quarkrl.algorithm.pool import DataPool
from quarkrl.builtin import model_path
from quarkrl.models.loading import load_tokenizer

ROWS = (("reference", None, 0.4), ("best", 2, 0.9), ("worst", 0, 0.2))


@cache
def builtin_tokenizer():
    """The tokenizer of the built-in model, which can encode any text."""
    return load_tokenizer(str(model_path()))


def write_run(
    directory: Path,
    prompts: Sequence[str] = ("You are", "They said"),
    completions: Sequence[str] = (" kind.", " rude!", " away"),
    iterations: int = 2,
    evaluated: bool = True,
    reward: str = "kindness",
    **options,
) -> Path:
    """Write a run of `iterations` in which each prompt has each completion; reward i / n for the i-th of n samples."""
    directory.mkdir(parents=True, exist_ok=True)
    encode = builtin_tokenizer().encode
    pairs = [(prompt, completion) for prompt in prompts for completion in completions]
    pool = DataPool(3)
    for number in range(iterations):
        rewards = [i / len(pairs) for i in range(len(pairs))]
        ids = zip(*((encode(prompt), encode(completion)) for prompt, completion in pairs), strict=True)
        pool.add(*ids, rewards, iteration=number)
    pool.save(directory / "pool")
    identity = {"options": {"num_quantiles": 3, "steps_per_iteration": 2, **options}, "num_iterations": iterations}
    identity |= {"rewards": [{"name": reward, "weight": 1.0}], "versions": {"torch": "2"}}
    (directory / "run.json").write_text(json.dumps(identity), encoding="utf-8")
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": "builtin", **options}), encoding="utf-8")
    rows = []
    for number in range(iterations):
        rows += [{"step": 2 * number, "iteration": number, "reward": 0.4 + number / 10, "eos_share": 0.5}]
        rows += [{"step": 2 * number + 2, "loss": 1.0, "nll": 1.0, "kl": 0.1 * (number + 1), "entropy": 2.0}]
    lines = [json.dumps(row) for row in rows] + ['{"step": 9, "incompl']
    (directory / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if evaluated:
        write_results(directory / "results.json", prompts, completions)
    return directory


def write_results(path: Path, prompts: Sequence[str], completions: Sequence[str]) -> None:
    """Write what `Evaluation.save` writes: three rows, with one completion of each prompt."""
    entries = [
        {
            "prompts": "prompts",
            "name": name,
            "quantile": quantile,
            "guidance_scale": 1.0,
            "figures": {"reward": reward, "perplexity": 3.0},
            "intervals": {"reward": [reward - 0.1, reward + 0.1], "perplexity": [2.5, 3.5]},
        }
        for name, quantile, reward in ROWS
    ]
    lines = [
        {
            "prompts": "prompts",
            "prompt_number": i,
            "prompt": prompt,
            "row": name,
            "sample": 0,
            "completion": completions[(i + k) % len(completions)],
            "reward": reward,
        }
        for k, (name, _, reward) in enumerate(ROWS)
        for i, prompt in enumerate(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(lines), path.with_suffix(".parquet"))
    document = {
        "protocol": {
            "date": "2026-01-01",
            "samples_per_prompt": 1,
            "prompts": {"prompts": {"count": len(prompts)}},
        },
        "results": entries,
        "completions": path.with_suffix(".parquet").name,
    }
    path.write_text(json.dumps(document), encoding="utf-8")
