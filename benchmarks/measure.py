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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

RESULTS = Path(__file__).parent / "results"
EOS = "<|endoftext|>"

# Tokens per prompt in RealToxicityPrompts: its 32-quantiles, scaled to the mean of 16.5 under GPT-2's tokenizer.
LENGTHS: tuple[int, ...] = (7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 15, 15, 15)
LENGTHS += (15, 16, 16, 17, 18, 18, 19, 20, 21, 22, 23, 24, 25, 26, 29, 35)


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2, or of a Llama if it has `kv_heads`. `positions` is the context length."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocab: int = 50_257
    positions: int = 1024
    kv_heads: int = 0
    inner: int = 0  # The width of a Llama's feed-forward part.

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The inputs and outputs of each matrix of a layer."""
        w = self.width
        if not self.kv_heads:
            return [(w, 3 * w), (w, w), (w, 4 * w), (4 * w, w)]
        narrow = w * self.kv_heads // self.heads
        return [(w, w), (w, narrow), (w, narrow), (w, w), (w, self.inner), (w, self.inner), (self.inner, w)]

    @property
    def block_parameters(self) -> int:
        """The weights of all layers, without biases and norms."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices)

    def lora_parameters(self, rank: int) -> int:
        """The weights of adapters of this rank on all matrices of the layers."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.matrices)

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Return the sizes in the config of a GPT-2 or a Llama."""
        kv_heads = getattr(config, "num_key_value_heads", 0)
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.vocab_size,
            config.max_position_embeddings,
            kv_heads,
            config.intermediate_size if kv_heads else 0,
        )


SHAPES = {
    "gpt2": Shape(),
    "gpt2-medium": Shape(24, 1024, 16),
    "gpt2-large": Shape(36, 1280, 20),
    "gpt2-xl": Shape(48, 1600, 25),
    "smollm2": Shape(30, 576, 9, 49_152, 8192, 3, 1536),
    "quick": Shape(4, 256, 4, 16_384, 256),
    "micro": Shape(2, 32, 2, 300, 64),
    "micro-llama": Shape(2, 32, 4, 300, 64, 2, 96),
}


def make_model(directory: Path, shape: Shape, seed: int = 0, device: str = "cpu") -> None:
    """Save a model with random weights, whose tokens are the words w0, w1, … and EOS.

    Each token is a word, so that decoding and tokenizing again gives the same tokens. The official code learns from
    tokenized text, and must learn from as many tokens as quarkrl. There is no dropout, as in the official code.
    """
    words = {f"w{i}": i for i in range(shape.vocab - 1)} | {EOS: shape.vocab - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(seed)
    with torch.device(device):  # A GPU draws the weights of GPT-2 XL in less than a second.
        model = _random_model(shape)
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, bos_token=EOS).save_pretrained(directory)


def _random_model(shape: Shape) -> PreTrainedModel:
    sizes = {"vocab_size": shape.vocab, "bos_token_id": shape.vocab - 1, "eos_token_id": shape.vocab - 1}
    sizes |= {"num_hidden_layers": shape.layers, "hidden_size": shape.width, "num_attention_heads": shape.heads}
    sizes["max_position_embeddings"] = shape.positions
    if shape.kv_heads:
        grouped = {"num_key_value_heads": shape.kv_heads, "intermediate_size": shape.inner}
        return LlamaForCausalLM(LlamaConfig(**sizes, **grouped, tie_word_embeddings=True))
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


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


def reward(prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **_: Any) -> list[float]:
    """Return the mean of a completion's token ids, which is cheap and has few ties.

    The textbook passes no ids: its completions are texts whose words are the tokens, or ids themselves.
    """
    if completion_ids is not None:
        return [statistics.fmean(ids) for ids in completion_ids]
    if completions and isinstance(completions[0], str):
        completions = [[int(word[1:]) for word in text.split() if word != EOS] for text in completions]
    return [statistics.fmean(ids) for ids in completions]


def lora_config(rank: int) -> Any:
    """Return the configuration of an adapter on all linear layers, without dropout."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


class Clock:
    """Sums seconds by name, and keeps the peak of the memory in use: `with clock("sampling"): …`.

    CPU seconds are those of all threads. On a machine that runs other programs they vary less than seconds.
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        reset_peak(self.device)
        began, began_cpu = now(self.device), time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now(self.device) - began
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - began_cpu
        self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak_bytes(self.device))


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


def reset_peak(device: str) -> None:
    """Start a new peak, so that `peak_bytes` is the largest from here on, where the system allows it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def learning_flops(
    shape: Shape, prompt_lengths: Iterable[int], completion_lengths: Iterable[int], lora_rank: int = 0
) -> float:
    """Return the floating-point operations that learning from these samples needs, without padding.

    A parameter of the layers costs 2 operations per token forward, and 4 backward: 2 for the gradient of its input, and
    2 for its own, which a frozen one has not. The policy runs both and reads one reward token more; the reference runs
    forward only. The output embedding counts at completion tokens only. In each layer, causal attention over n tokens
    has two products with n (n + 1) / 2 pairs of positions, each `width` multiplications and additions.
    """
    total, backward = 0.0, 2 if lora_rank else 3  # Passes of the policy through a matrix.
    for prompt, completion in zip(prompt_lengths, completion_lengths, strict=True):
        for ways, attention_ways, n in ((backward, 3, prompt + 1 + completion), (1, 1, prompt + completion)):
            total += ways * 2 * shape.block_parameters * n
            total += attention_ways * 2 * shape.layers * shape.width * n * (n + 1)
            total += ways * 2 * shape.width * shape.vocab * completion
        total += 3 * 2 * shape.lora_parameters(lora_rank) * (prompt + 1 + completion)
    return total


def sampling_flops(shape: Shape, prompt_lengths: Iterable[int], completion_length: int) -> tuple[float, float]:
    """Return the operations to read the prompts, and to sample the completions token by token, without padding."""
    lengths = list(prompt_lengths)
    per_token, head = 2 * shape.block_parameters, 2 * shape.width * shape.vocab
    reading = sum(per_token * n + 2 * shape.layers * shape.width * n * (n + 1) + head for n in lengths)
    steps = completion_length - 1  # The last token is not read.
    pairs = sum(steps * n + steps * (steps + 1) // 2 for n in lengths)
    return reading, len(lengths) * steps * (per_token + head) + 4.0 * shape.layers * shape.width * pairs


@torch.no_grad()
def matmul_rate(
    shape: Shape, tokens: int, completion_tokens: int, device: str, bf16: bool, frozen: bool = False
) -> float:
    """Return the operations per second of plain matrix products in the shapes of a learning step.

    The products of one layer and of the output embedding are timed: forward, and for both gradients, or for that of the
    input only if the weights are frozen. Each is weighted by its number in a step, which has two forward passes (policy
    and reference) and one backward pass.
    """
    products = [(tokens, *size, shape.layers) for size in shape.matrices]
    ways = (2, 1, 0 if frozen else 1)
    return _rate_of([*products, (completion_tokens, shape.width, shape.vocab, 1)], ways, device, bf16)


@torch.no_grad()
def decoding_rate(shape: Shape, batch_size: int, device: str, bf16: bool) -> float:
    """Return the operations per second of the matrix products that sample one token of each completion."""
    products = [(batch_size, *size, shape.layers) for size in shape.matrices]
    return _rate_of([*products, (batch_size, shape.width, shape.vocab, 1)], (1, 0, 0), device, bf16)


def _rate_of(
    products: Sequence[tuple[int, int, int, int]], ways: tuple[int, int, int], device: str, bf16: bool
) -> float:
    """Return the rate of products (rows, inputs, outputs, times); `ways`: forward, gradients of input and of weight."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    flops = seconds = 0.0
    for rows, inner, columns, times in products:
        x = torch.randn(rows, inner, device=device).to(dtype)
        weight = torch.randn(columns, inner, device=device).to(dtype).T  # As a linear layer stores it.
        y = torch.randn(rows, columns, device=device).to(dtype)
        for weight_in_step, a, b in zip(ways, (x, y, x.T), (weight, weight.T, y), strict=True):
            if weight_in_step:
                out = torch.empty(len(a), b.shape[1], device=device, dtype=dtype)
                seconds += weight_in_step * times * _median_seconds(partial(torch.mm, a, b, out=out), device)
                flops += weight_in_step * times * 2.0 * rows * inner * columns
    return flops / seconds


def bandwidth(device: str) -> float:
    """Return the bytes per second that a sum over an array of 256 MB reads."""
    array = torch.ones(2**26, device=device)
    return array.nbytes / _median_seconds(array.sum, device)


def peak_rate(device: str, bf16: bool) -> float:
    """Return the operations per second of one large square product, to which MFU is relative."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    return 2.0 * size**3 / _median_seconds(partial(torch.mm, a, b), device)


def data_sheet_tflops(device: str) -> float | None:
    """Return the dense bf16 rate of a GPU in its data sheet, in TFLOP/s; None for a GPU that is not listed."""
    rates = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((float(rate) for part, rate in rates.items() if part in name), None)


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
    result.add_argument("--name", help="of the two files of --output; by default that of the script and its model")
    result.add_argument("--output", type=Path, help="directory for NAME.md and NAME.json; default: write nothing")
    result.add_argument(
        "--quick", action="store_true", help="a small and short run that checks the results, not the speed"
    )
    result.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return result


def as_json(shape: Shape) -> dict[str, int]:
    """Return a shape as part of a task."""
    return asdict(shape)
