"""Break ten central lines, one at a time, and show that a test notices each: `make mutations`.

A mutation is an exact replacement in a copy of `src/`. The named tests run against the copy and must fail. The
original code must pass them first.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """A change that must not go unnoticed: in `file` below src/quarkrl, `old` becomes `new`; `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = [
    Mutation(
        "loss sign",
        "algorithm/sliced_loss.py",
        "dz.scatter_add_(-1, target, torch.full_like(nll.value, -1 / temperature))",
        "dz.scatter_add_(-1, target, torch.full_like(nll.value, 1 / temperature))",
        ("tests/algorithm/test_loss.py",),
    ),
    Mutation(
        "KL direction",
        "algorithm/sliced_loss.py",
        'settings.kl_direction == "policy_ref"',
        'settings.kl_direction == "ref_policy"',
        ("tests/algorithm/test_loss.py",),
    ),
    Mutation(
        "quantile edge",
        "algorithm/pool.py",
        "ranks = -(-np.arange(1, parts) * len(rewards) // parts)",
        "ranks = -(-np.arange(1, parts) * len(rewards) // parts) + 1",
        ("tests/algorithm/test_pool.py",),
    ),
    Mutation(
        "EOS in the completion",
        "sampling/sampler.py",
        "return ids[: position + 1]",
        "return ids[:position]",
        ("tests/sampling/test_sampler.py", "tests/sampling/test_generator.py"),
    ),
    Mutation(
        "reward-token suppression",
        "sampling/sampler.py",
        "check_and_mask(logits[:, :vocab_size].float(), ruled_out)",
        "check_and_mask(logits.float(), ruled_out)",
        ("tests/sampling/test_sampler.py", "tests/sampling/test_generator.py"),
    ),
    Mutation(
        "draw seed",
        "training/trainer.py",
        "np.random.default_rng((args.seed, iteration, 1))",
        "np.random.default_rng((args.seed, 1))",
        ("tests/training/test_trainer.py",),
    ),
    Mutation(
        "resume position",
        "training/resumption.py",
        "return -(-step // steps_per_iteration)",
        "return step // steps_per_iteration",
        ("tests/training/test_resumption.py",),
    ),
    Mutation(
        "score cache key",
        "rewards/cached_calls.py",
        "dict(zip(arguments, row, strict=True))",
        "dict(zip(arguments, row[:1], strict=False))",
        ("tests/rewards/test_cached_calls.py", "tests/rewards/test_cache.py"),
    ),
    Mutation(
        "metric denominator",
        "metrics.py",
        "counts = (~np.isnan(scores)).sum(axis=1)",
        "counts = np.full(len(scores), scores.shape[1])",
        ("tests/test_metrics.py",),
    ),
    Mutation(
        "dist-n",
        "metrics.py",
        "values[i] = len(ngrams) / total",
        "values[i] = len(ngrams) / max(total - (n - 1) * len(words), 1)",
        ("tests/test_metrics.py",),
    ),
]


def run_tests(source: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run tests against the package in `source`; return pytest's exit code and the first test that failed."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    failed = [line.split(" ")[1] for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return ended.returncode, failed[0] if failed else ""


def main() -> int:
    """Apply each mutation; return 1 if a test fails without one, or none fails with one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutations to apply (default: all)")
    names = parser.parse_args().names
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    unnoticed = 0
    code, failed = run_tests(ROOT / "src", tuple(sorted({test for mutation in chosen for test in mutation.tests})))
    if code:
        print(f"the tests fail without any mutation: {failed}")
        return 1
    for mutation in chosen:
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "src"
            shutil.copytree(ROOT / "src", source)
            path = source / "quarkrl" / mutation.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                print(f"{mutation.name}: {mutation.file} must contain {mutation.old!r} once")
                return 1
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            code, failed = run_tests(source, mutation.tests)
        unnoticed += code != 1
        print(f"{mutation.name}: {f'caught by {failed}' if code == 1 else 'NOT CAUGHT'}", flush=True)
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
