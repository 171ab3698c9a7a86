"""Helpers of the benchmarks: random models and prompts, clocks, memory, counts of operations, and reports.

Each measurement runs in its own process (`child`), so that measurements do not share memory. The peak is that of the
whole process: loading, sampling, scoring and learning.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results"
EOS = "<|endoftext|>"

# Tokens per prompt in RealToxicityPrompts: its 32-quantiles, scaled to the mean of 16.5 under GPT-2's tokenizer.
LENGTHS: tuple[int, ...] = (7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 15, 15, 15)
LENGTHS += (15, 16, 16, 17, 18, 18, 19, 20, 21, 22, 23, 24, 25, 26, 29, 35)


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2. `positions` is the context length."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocab: int = 50_257
    positions: int = 1024

    @property
    def block_parameters(self) -> int:
        """The weights of all layers: 4 w² for queries, keys, values and output, and 8 w² for the feed-forward part."""
        return self.layers * 12 * self.width**2


SHAPES = {
    "gpt2": Shape(),
    "gpt2-medium": Shape(24, 1024, 16),
    "gpt2-large": Shape(36, 1280, 20),
    "gpt2-xl": Shape(48, 1600, 25),
    "quick": Shape(4, 256, 4, 16_384, 256),
    "micro": Shape(2, 32, 2, 300, 64),
}


def make_model(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Save a GPT-2 with random weights, whose tokens are the words w0, w1, … and EOS.

    Each token is a word, so that decoding and tokenizing again gives the same tokens. The official code learns from
    tokenized text, and must learn from as many tokens as quarkrl. There is no dropout, as in the official code.
    """
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_positions=shape.positions,
        bos_token_id=shape.vocab - 1,
        eos_token_id=shape.vocab - 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    words = {f"w{i}": i for i in range(shape.vocab - 1)} | {EOS: shape.vocab - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, bos_token=EOS).save_pretrained(directory)


def make_prompts(
    count: int, shape: Shape, source: Path | None = None, tokenizer: Path | None = None, seed: int = 0
) -> list[str]:
    """Return prompts made of the words of `make_model`'s tokenizer.

    Args:
        count: number of prompts.
        shape: of the model that reads them.
        source: RealToxicityPrompts as JSONL; None gives random tokens, with `LENGTHS` as lengths.
        tokenizer: directory of the tokenizer for `source`.
        seed: for the random tokens.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.resize(LENGTHS, count))
    rows = [rng.integers(0, shape.vocab - 1, length) for length in lengths]
    if source is not None:
        lines = source.read_text(encoding="utf-8").splitlines()[:count]
        texts = [json.loads(line)["prompt"]["text"] for line in lines]
        ids = AutoTokenizer.from_pretrained(tokenizer)(texts)["input_ids"]
        rows = [np.array(row) % (shape.vocab - 1) for row in ids]
    return [" ".join(f"w{i}" for i in row) for row in rows]


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Return the mean of the numbers of a completion's words, which is cheap and has few ties."""
    return [statistics.fmean(int(word[1:]) for word in text.split() if word != EOS) for text in completions]


class Clock:
    """Sums seconds by name: `with clock("sampling"): …`."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = now(self.device)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now(self.device) - began


def now(device: str) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def held_bytes(device: str) -> int:
    """Return the memory in use, of the process or of the GPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def peak_bytes(device: str) -> int:
    """Return the peak of the memory in use.

    Unlike `ru_maxrss`, `VmHWM` does not count the memory that the process had before it started this program.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.open(encoding="utf-8") if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def learning_flops(shape: Shape, prompt_lengths: Iterable[int], completion_lengths: Iterable[int]) -> float:
    """Return the floating-point operations that learning from these samples needs, without padding.

    A parameter of the layers costs 2 operations per token forward, and 4 backward. The policy runs both and reads one
    reward token more; the reference runs forward only. The output embedding counts at completion tokens only. In each
    layer, causal attention over n tokens has two products with n (n + 1) / 2 pairs of positions, each `width`
    multiplications and additions.
    """
    total = 0.0
    for prompt, completion in zip(prompt_lengths, completion_lengths, strict=True):
        for ways, n in ((3, prompt + 1 + completion), (1, prompt + completion)):
            total += ways * 2 * shape.block_parameters * n
            total += ways * 2 * shape.layers * shape.width * n * (n + 1)
            total += ways * 2 * shape.width * shape.vocab * completion
    return total


@torch.no_grad()
def matmul_rate(shape: Shape, tokens: int, completion_tokens: int, device: str, bf16: bool) -> float:
    """Return the operations per second of plain matrix products in the shapes of a learning step.

    The products of one layer and of the output embedding are timed: forward, and for both gradients. Each is weighted
    by its number in a step, which has two forward passes (policy and reference) and one backward pass.
    """
    dtype, w = torch.bfloat16 if bf16 else torch.float32, shape.width
    layer = [(tokens, w, 3 * w), (tokens, w, w), (tokens, w, 4 * w), (tokens, 4 * w, w)]
    flops = seconds = 0.0
    products = [(*size, shape.layers) for size in layer] + [(completion_tokens, w, shape.vocab, 1)]
    for rows, inner, columns, times in products:
        sizes = (rows, inner), (inner, columns), (rows, columns)
        x, weight, y = (torch.randn(size, device=device).to(dtype) for size in sizes)
        for weight_in_step, a, b, target in ((2, x, weight, y), (1, y, weight.T, x), (1, x.T, y, weight)):
            median = _median_seconds(partial(torch.mm, a, b, out=torch.empty_like(target)), device)
            seconds += weight_in_step * times * median
            flops += weight_in_step * times * 2.0 * rows * inner * columns
    return flops / seconds


def peak_rate(device: str, bf16: bool) -> float:
    """Return the operations per second of one large square product, to which MFU is relative."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    return 2.0 * size**3 / _median_seconds(partial(torch.mm, a, b), device)


def _median_seconds(call: Callable[[], Any], device: str, times: int = 3) -> float:
    call()
    seconds = []
    for _ in range(times):
        began = now(device)
        call()
        seconds.append(now(device) - began)
    return statistics.median(seconds)


def child(script: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Run `script` on a task in its own process, and return its answer.

    Raises:
        RuntimeError: the process failed. The message has the end of its output.
    """
    command = [sys.executable, script, "--child", json.dumps(task)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{Path(script).name} {dict(task)}\n{process.stdout[-2000:]}{process.stderr[-4000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def answer(figures: Mapping[str, Any]) -> None:
    """Send the figures from a child process to its parent."""
    print(json.dumps(figures), flush=True)


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def device_name(device: str) -> str:
    """Return the name of the device."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def facts(device: str) -> dict[str, str]:
    """Return the device, the versions, the command and the date of a measurement."""
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table, with numbers rounded to three digits."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "–" if value is None else str(value)

    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(
    name: str, device: str, tables: Mapping[str, Sequence[Mapping[str, Any]]], output: Path | None, **others: Any
) -> None:
    """Print tables, and write them to `NAME.md` and `NAME.json`.

    Args:
        name: of the files, without extension.
        device: "cpu" or "cuda".
        tables: rows by title.
        output: the directory to write to; None writes nothing.
        others: values that are written to the JSON file only.
    """
    about = facts(device)
    body = "\n\n".join(f"**{title}**\n\n{markdown(rows)}" for title, rows in tables.items())
    print(body, flush=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        details = "\n".join(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in about.items())
        (output / f"{name}.md").write_text(f"# {name}\n\n{details}\n\n{body}\n", encoding="utf-8")
        content = {"facts": about, "tables": tables, **others}
        (output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"\n{output / name}.md", flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark. `--child` is for `child` only."""
    result = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    result.add_argument("--output", type=Path, help="directory for NAME.md and NAME.json; default: write nothing")
    result.add_argument(
        "--quick", action="store_true", help="a small and short run that checks the results, not the speed"
    )
    result.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return result


def as_json(shape: Shape) -> dict[str, int]:
    """Return a shape as part of a task."""
    return asdict(shape)
