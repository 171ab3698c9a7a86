"""Compare an iteration of LoRA training with a straightforward loop: seconds and memory, for SmolLM2 by default.

    make real-model && python benchmarks/real_model.py --output benchmarks/results
    python benchmarks/real_model.py --shape smollm2 --device cuda --output benchmarks/results

Both sides train the same adapter on the same prompts, with the same arithmetic. Sides:

    loop        `LoraLoop`: `generate` of transformers, logits of all positions, the adapter switched off for p_0
    quarkrl     `QuarkTrainer`

Each runs in its own process, and the sides take turns. Figures are medians over the repeats. The first iteration, which
samples from p_0, is not counted. EOS is suppressed, so that both sides do the same work. `--quick` is a micro model; it
compares loss and gradients, and fails where they differ. Slow results never fail.

Beside the ratios are bounds: the operations that the work needs, divided by the rate of plain matrix products of the
same shapes, or the weights' bytes divided by the memory's bandwidth, whichever takes longer.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from iteration import GRADIENT_TOLERANCE, LOSS_TOLERANCE, quarkrl_trainer, run_quarkrl
from measure import SHAPES, Clock, Shape
from peft import get_peft_model
from textbook import Textbook
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quarkrl.models.precision import bf16_is_fast

DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-instruct"
SIDES = ("loop", "quarkrl")


class LoraLoop(Textbook):
    """A straightforward loop that trains an adapter. Prompts and completions are token ids.

    Args:
        directory: the model and its tokenizer.
        lora_rank: of the adapter.
        options: `num_quantiles`, `length`, `device` and `autocast`, as in `Textbook`.
    """

    def __init__(self, directory: str | Path, lora_rank: int, **options: Any):
        self.num_quantiles, self.length = options["num_quantiles"], options["length"]
        self.device, self.autocast = options.get("device", "cpu"), options.get("autocast", False)
        self.top_p, self.kl_coef, self.entropy_coef = 0.9, 0.05, 0.06
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.tokenizer.pad_token = self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(self.device)
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(self.vocab_size + self.num_quantiles, mean_resizing=False)
        config = measure.lora_config(lora_rank)
        self.reward_ids = list(range(self.vocab_size, self.vocab_size + self.num_quantiles))
        config.trainable_token_indices = self.reward_ids
        self.policy = get_peft_model(model, config)
        self.optimizer = torch.optim.AdamW([w for w in self.policy.parameters() if w.requires_grad], lr=1e-5)
        self.pool, self.quantiles, self.explorations = [], [], 0

    @contextmanager
    def reference_model(self) -> Iterator[torch.nn.Module]:
        """Provide the policy with its adapter switched off."""
        with self.policy.disable_adapter():
            yield self.policy

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], best: bool, greedy: bool = False) -> list[list[int]]:
        """Return a completion of each prompt, by `generate`."""
        if best:
            prompts = [[self.reward_ids[-1], *ids] for ids in prompts]
        ids, mask = self._pad(prompts, "left")
        options: dict[str, Any] = {"max_new_tokens": self.length, "min_new_tokens": self.length}
        options |= {"do_sample": False} if greedy else {"do_sample": True, "top_p": self.top_p, "top_k": 0}
        options |= {"suppress_tokens": self.reward_ids, "pad_token_id": self.tokenizer.pad_token_id}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            if best:
                output = self.policy.generate(input_ids=ids, attention_mask=mask, **options)
            else:
                with self.policy.disable_adapter():
                    output = self.policy.generate(input_ids=ids, attention_mask=mask, **options)
        return output[:, ids.shape[1] :].tolist()

    def _tokens(self, rows: Any) -> tuple[Tensor, Tensor]:
        return self._pad(rows, "right")

    def _pad(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)


def run_loop(directory: Path, prompts: list[str], task: dict[str, Any]) -> tuple[list[Clock], Any, int]:
    """Run the straightforward loop. Return each iteration's clock and lengths, and the number of completion tokens."""
    options = {name: task[name] for name in ("lora_rank", "num_quantiles", "length", "device")}
    loop = LoraLoop(directory, **options, autocast=task["bf16"])
    prompt_ids = loop.tokenizer(prompts)["input_ids"]
    clocks, learned = [], []
    for _ in range(task["iterations"]):
        clocks.append(clock := Clock(task["device"]))
        with clock("sampling"):
            loop.explore(prompt_ids, task["batch_size"], measure.reward)
        with clock("quantizing"):
            loop.quantize()
        lengths: tuple[list[int], list[int]] = [], []
        with clock("learning"):
            for _ in range(task["batches"]):
                batch = loop.draw(task["batch_size"])
                loop.step(batch)
                lengths[0].extend(batch.prompt_mask.sum(1).tolist())
                lengths[1].extend(batch.completion_mask.sum(1).tolist())
        learned.append(lengths)
    return clocks, learned, sum(len(completion) for *_, completion in loop.pool)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Measure a side: seconds of the iterations after the first, and peak memory beyond the weights."""
    directory, device = Path(task["directory"]), task["device"]
    prompts = Path(task["prompts"]).read_text(encoding="utf-8").splitlines()
    before = measure.held_bytes(device)
    runs: dict[str, Callable[..., Any]] = {"loop": run_loop, "quarkrl": run_quarkrl}
    clocks, learned, tokens = runs[task["side"]](directory, prompts, task)
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    figures: dict[str, Any] = {"tokens": tokens, "lengths": learned[-1]}
    names = list(clocks[0].seconds)
    for unit, of in (("s", "seconds"), ("CPU s", "cpu_seconds")):
        for name in names:
            figures[f"{name}, {unit}"] = statistics.mean(getattr(clock, of)[name] for clock in clocks[1:])
        figures[f"iteration, {unit}"] = sum(figures[f"{name}, {unit}"] for name in names)
    for name in ("sampling", "learning"):
        figures[f"{name}, bytes"] = max(clock.peak_bytes[name] for clock in clocks) - before - weights
    figures["iteration, bytes"] = max(figures["sampling, bytes"], figures["learning, bytes"])
    return figures


def bounds(shape: Shape, task: dict[str, Any], lengths: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[dict]:
    """Return the least seconds of sampling and learning at this machine's matmul rate and memory bandwidth.

    Args:
        shape: of the model.
        task: the options.
        lengths: of the prompts and completions that an iteration learned from.
        prompts: lengths of the prompts that an iteration samples.
    """
    device, bf16, batches = task["device"], task["bf16"], task["batches"]
    completion_tokens = sum(lengths[1]) // batches
    tokens = sum(lengths[0]) // batches + completion_tokens
    rate = measure.matmul_rate(shape, tokens, completion_tokens, device, bf16, frozen=True)
    decoding = measure.decoding_rate(shape, task["batch_size"], device, bf16)
    reading, writing = measure.sampling_flops(shape, [n + 1 for n in prompts], task["length"])
    learning = measure.learning_flops(shape, *lengths, lora_rank=task["lora_rank"])
    width = 2 if bf16 else 4
    weights = width * (shape.block_parameters + shape.width * shape.vocab) * batches * (task["length"] - 1)
    bandwidth = measure.bandwidth(device)
    rows = [("learning", learning, rate, None), ("sampling: prompts", reading, rate, None)]
    rows.append(("sampling: tokens", writing, decoding, weights))
    return [
        {
            "part": part,
            "TFLOP": flops / 1e12,
            "GFLOP/s of matmuls": speed / 1e9,
            "s by FLOP": flops / speed,
            "GB": None if moved is None else moved / 1e9,
            "s by bandwidth": None if moved is None else moved / bandwidth,
        }
        for part, flops, speed, moved in rows
    ]


def shares(
    runs: dict[str, dict[str, float]], limits: Sequence[dict[str, Any]], device: str, bf16: bool
) -> list[dict[str, Any]]:
    """Return the shares of the bounds that the sides reach, and on a GPU the share of its peak rate while learning."""
    learning, *sampling = limits
    least = sum(max(row["s by FLOP"], row["s by bandwidth"] or 0) for row in sampling)
    peak = 1e12 * (measure.data_sheet_tflops(device) or 0) or measure.peak_rate(device, bf16)
    rows = []
    for side, run in runs.items():
        row: dict[str, Any] = {"side": side, "sampling": least / run["sampling, s"]}
        row["learning"] = learning["s by FLOP"] / run["learning, s"]
        row["learning, GFLOP/s"] = learning["TFLOP"] * 1e3 / run["learning, s"]
        row["of the peak"] = row["learning, GFLOP/s"] * 1e9 / peak
        rows.append(row)
    return rows


def disagreements(directory: Path, prompts: list[str], task: dict[str, Any]) -> list[str]:
    """Describe where loss and gradients of the two sides differ, with the same weights and samples."""
    differences = []
    with tempfile.TemporaryDirectory() as work:
        trainer = quarkrl_trainer(directory, prompts, Path(work), {**task, "device": "cpu"})
        loop = LoraLoop(directory, **{name: task[name] for name in ("lora_rank", "num_quantiles", "length")})
        policy = trainer.accelerator.unwrap_model(trainer.model)
        loop.policy.load_state_dict(policy.state_dict())
        trainer.explore(0)
        trainer.quantize(0)
        samples = [trainer.pool[int(i)] for i in trainer.draws[: task["batch_size"]]]
        batch = loop.collate([(int(s.quantiles[0]), s.prompt_ids.tolist(), s.completion_ids.tolist()) for s in samples])
        trainer.args.min_completion_length = 0  # The loop keeps EOS in the loss.
        expected = loop.loss(batch)
        expected.backward()
        loss = trainer.compute_loss(trainer.model, trainer.collate(range(task["batch_size"])))
        loss.backward()
        if not abs(loss.item() - expected.item()) <= LOSS_TOLERANCE * abs(expected.item()):
            differences.append(f"loss {loss.item()}, loop {expected.item()}")
        gradients = {name: weight.grad for name, weight in loop.policy.named_parameters() if weight.requires_grad}
        for name, weight in policy.named_parameters():
            if weight.requires_grad:
                other = gradients[name]
                difference = (weight.grad - other).norm() / other.norm().clamp(min=1e-12)
                if not difference <= GRADIENT_TOLERANCE:
                    differences.append(f"gradient of {name}: differs by {difference:.1e} of its norm")
    return differences


def make_prompts(directory: Path, count: int, shape: Shape) -> list[str]:
    """Return prompts with the lengths of RealToxicityPrompts, made of words that are one token each."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token[:1] == "Ġ" and token[1:].isascii())
    words = [word for word in words if word.isalpha()]
    if not words:
        return measure.make_prompts(count, shape)
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.resize(measure.LENGTHS, count))
    return [" ".join(rng.choice(words, length)) for length in lengths]


def make_tables(runs: dict[str, dict[str, float]], task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return tables of the sides' medians and of their ratios."""
    samples, tables = task["batches"] * task["batch_size"], {}
    tables["sides"] = [
        {
            "side": side,
            "iteration, s": run["iteration, s"],
            "CPU s": run["iteration, CPU s"],
            "sampling, completions/s": samples / run["sampling, s"],
            "learning, samples/s": samples / run["learning, s"],
            "sampling, GB": run["sampling, bytes"] / 1e9,
            "learning, GB": run["learning, bytes"] / 1e9,
        }
        for side, run in runs.items()
    ]
    if len(runs) == 2:
        loop, quarkrl = runs["loop"], runs["quarkrl"]
        tables["loop / quarkrl"] = [
            {
                "part": part,
                "times faster": loop[f"{part}, s"] / quarkrl[f"{part}, s"],
                "times less CPU time": loop[f"{part}, CPU s"] / quarkrl[f"{part}, CPU s"],
                "memory, ratio": quarkrl[f"{part}, bytes"] / loop[f"{part}, bytes"],
            }
            for part in ("iteration", "sampling", "learning")
        ]
    return tables


def main() -> None:
    """Measure the sides, compare them and report."""
    parser = measure.parser(__doc__)
    parser.add_argument("--model", type=Path, help="directory; default models/smollm2-135m-instruct")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this size instead of --model")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=1, help="runs per side")
    parser.add_argument("--iterations", type=int, default=2, help="iterations per run; the first is not counted")
    parser.add_argument("--batches", type=int, default=4, help="batches that an iteration samples, and learns from")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=20, help="tokens per completion")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--num_quantiles", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", choices=("auto", "true", "false"), default="auto", help="autocast on both sides")
    options = parser.parse_args()
    if options.child:
        with redirect_stdout(sys.stderr):
            figures = run(options.child)
        return measure.answer(figures)
    counts = ("iterations", "batches", "batch_size", "length", "num_quantiles", "lora_rank", "device")
    task: dict[str, Any] = {name: getattr(options, name) for name in counts}
    task["bf16"] = bf16_is_fast() if options.bf16 == "auto" else options.bf16 == "true"
    if options.quick:
        task |= {"batch_size": min(options.batch_size, 8), "length": min(options.length, 6)}
    with tempfile.TemporaryDirectory() as work:
        directory, name = options.model or DEFAULT_MODEL, "real_model"
        if shape_name := options.shape or ("micro-llama" if options.quick and not options.model else None):
            directory, name = Path(work) / "model", f"real_model-{shape_name}"
            measure.make_model(directory, SHAPES[shape_name], device=options.device)
        if not (directory / "config.json").exists():
            sys.exit(f"--model {directory}: must be the directory of a model. Run make real-model, or set --shape.")
        shape = Shape.of(AutoConfig.from_pretrained(directory))
        prompts = make_prompts(directory, task["batches"] * task["batch_size"], shape)
        (Path(work) / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
        task |= {"directory": str(directory), "prompts": str(Path(work) / "prompts.txt")}
        few = {**task, "batch_size": 8, "batches": 1, "bf16": False}  # The loop that it is compared with is float32.
        if options.quick and (differences := disagreements(directory, prompts[:8], few)):
            sys.exit("\n".join(["loop and quarkrl differ:", *differences]))
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
        for repeat in range(options.repeats):
            for side in options.sides:
                print(f"repeat {repeat}: {side}", file=sys.stderr, flush=True)
                runs[side].append(measure.child(__file__, {**task, "side": side}))
        lengths = next(iter(runs.values()))[-1]["lengths"]
        prompt_lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(directory)(prompts)["input_ids"]]
    if len(counted := {run["tokens"] for side in runs.values() for run in side}) > 1:
        sys.exit(f"the sides sampled different numbers of tokens: {sorted(counted)}")
    figures = {side: measure.medians([_scalars(run) for run in several]) for side, several in runs.items()}
    tables = make_tables(figures, task)
    tables["bounds of an iteration"] = bounds(shape, task, lengths, prompt_lengths)
    tables["share of the bounds"] = shares(figures, tables["bounds of an iteration"], options.device, task["bf16"])
    name += "-cuda" if options.device == "cuda" else ""
    measure.report(options.name or name, options.device, tables, options.output, task=task, runs=runs)


def _scalars(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if not isinstance(value, list)}


if __name__ == "__main__":
    main()
