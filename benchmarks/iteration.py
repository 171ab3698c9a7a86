"""Compare an iteration of quarkrl with one of the textbook: seconds, samples per second and memory.

    python benchmarks/iteration.py --output benchmarks/results
    python benchmarks/iteration.py --prompts ../shared/data/realtoxicityprompts.train.jsonl \
        --tokenizer ../shared/models/webmix-gpt2
    python benchmarks/iteration.py --device cuda --shape gpt2-xl --batch_size 128 --output benchmarks/results

Each side explores the same prompts and learns from the same number of samples. It runs in its own process, and the
sides take turns (A B C A B C …); figures are medians over the repeats. The first iteration, which samples from p_0, is
not counted. All completions have the full length, so that all sides do the same work. Sides:

    textbook        textbook.py in float32, as the official code
    textbook-bf16   the same under autocast
    quarkrl         `QuarkTrainer` in float32
    quarkrl-bf16    the same with `bf16=True`, and the reference's weights in bfloat16
    quarkrl-micro   the same steps in four micro-batches each (`gradient_accumulation_steps=4`); also -micro-bf16
    generate        only sampling, by transformers' `generate` with top-p
    generate-bf16   the same with the weights in bfloat16

`--quick` also compares the results of textbook and quarkrl, and fails where they differ. Slow results never fail.
"""

import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import measure
import torch
from measure import SHAPES, Clock, Shape
from textbook import Textbook
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer
from quarkrl.models.precision import bf16_is_fast

SIDES = tuple(side + dtype for side in ("textbook", "quarkrl", "quarkrl-micro", "generate") for dtype in ("", "-bf16"))
MICRO_BATCHES = 4
# The largest difference from the textbook in float32: of the loss, and of each gradient, relative to its norm.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3


def default_sides() -> list[str]:
    """Return the sides to compare: with bf16 only where it is fast, because elsewhere it takes 30 times as long."""
    return ["textbook", "quarkrl", *(["quarkrl-bf16"] if bf16_is_fast() else [])]


class TimedTrainer(QuarkTrainer):
    """A `QuarkTrainer` that records a clock per iteration and the lengths of the samples that it learns from."""

    def __init__(self, model: str, config: QuarkConfig, prompts: list[str], device: str, lora_rank: int = 0):
        self.clocks: list[Clock] = []
        self.learned: list[tuple[list[int], list[int]]] = []
        self.device = device
        adapter = measure.lora_config(lora_rank) if lora_rank else None
        super().__init__(model, measure.reward, config, prompts, peft_config=adapter, callbacks=[_Learning(self)])

    def explore(self, iteration: int) -> None:
        self.clocks.append(Clock(self.device))
        with self.clocks[-1]("sampling"):
            super().explore(iteration)

    def quantize(self, iteration: int) -> None:
        with self.clocks[-1]("quantizing"):
            super().quantize(iteration)
        samples = [self.pool[int(i)] for i in self.draws]
        self.learned.append(([len(s.prompt_ids) for s in samples], [len(s.completion_ids) for s in samples]))


class _Learning(TrainerCallback):
    """Times learning. Its epoch event follows exploring and quantizing, as the trainer's own callbacks come first."""

    def __init__(self, trainer: TimedTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **_):
        self.running = self.trainer.clocks[-1]("learning")
        self.running.__enter__()

    def on_epoch_end(self, args, state, control, **_):
        self.running.__exit__(None, None, None)


def quarkrl_trainer(directory: Path, prompts: list[str], work: Path, task: dict[str, Any]) -> TimedTrainer:
    """Return a trainer that does the same task as the textbook."""
    micro_batches = MICRO_BATCHES if task.get("side") == "quarkrl-micro" else 1
    config = QuarkConfig(
        output_dir=str(work / "run"),
        num_quantiles=task["num_quantiles"],
        num_iterations=task["iterations"],
        steps_per_iteration=task["batches"],
        prompts_per_iteration=task["batches"] * task["batch_size"],
        generation_batch_size=task["batch_size"],
        per_device_train_batch_size=task["batch_size"] // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_completion_length=task["length"],
        min_completion_length=task["length"],
        top_p=0.9,
        bf16=task["bf16"],
        ref_dtype="bfloat16" if task["bf16"] and not task.get("lora_rank") else "same",
        use_cpu=task["device"] == "cpu",
        on_collapse="warn",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    return TimedTrainer(str(directory), config, prompts, task["device"], task.get("lora_rank", 0))


def run_quarkrl(directory: Path, prompts: list[str], task: dict[str, Any]) -> tuple[list[Clock], Any, int]:
    """Run quarkrl. Return each iteration's clock and lengths, and the number of completion tokens in the pool."""
    with tempfile.TemporaryDirectory() as work:
        trainer = quarkrl_trainer(directory, prompts, Path(work), task)
        trainer.train()
    return trainer.clocks, trainer.learned, sum(len(trainer.pool[i].completion_ids) for i in range(len(trainer.pool)))


def run_textbook(directory: Path, prompts: list[str], task: dict[str, Any]) -> tuple[list[Clock], Any, int]:
    """Run the textbook. Return the same as `run_quarkrl`."""
    options = {name: task[name] for name in ("num_quantiles", "length", "device")}
    textbook = Textbook(directory, **options, autocast=task["bf16"])
    clocks, learned = [], []
    for _ in range(task["iterations"]):
        clocks.append(clock := Clock(task["device"]))
        with clock("sampling"):
            textbook.explore(prompts, task["batch_size"], measure.reward)
        with clock("quantizing"):
            textbook.quantize()
        lengths: tuple[list[int], list[int]] = [], []
        with clock("learning"):
            for _ in range(task["batches"]):
                batch = textbook.draw(task["batch_size"])
                textbook.step(batch)
                lengths[0].extend(batch.prompt_mask.sum(1).tolist())
                lengths[1].extend(batch.completion_mask.sum(1).tolist())
        learned.append(lengths)
    return clocks, learned, sum(len(textbook.tokenizer(text)["input_ids"]) for *_, text in textbook.pool)


def run_generate(directory: Path, prompts: list[str], task: dict[str, Any]) -> tuple[list[Clock], Any, int]:
    """Sample by transformers' `generate`. Return the same as `run_quarkrl`, without lengths."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    dtype = torch.bfloat16 if task["bf16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(task["device"])
    clocks, length, tokens = [], task["length"], 0
    for _ in range(task["iterations"]):
        clocks.append(clock := Clock(task["device"]))
        with clock("sampling"):
            for start in range(0, len(prompts), task["batch_size"]):
                batch = prompts[start : start + task["batch_size"]]
                inputs = tokenizer(batch, return_tensors="pt", padding=True).to(task["device"])
                options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_p": 0.9}
                output = model.generate(**inputs, **options, top_k=0, pad_token_id=tokenizer.pad_token_id)
                tokens += output[:, inputs["input_ids"].shape[1] :].numel()
    return clocks, [], tokens


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Measure a side: seconds of the iterations after the first, memory beyond the models, and matmul throughput."""
    directory, device, shape = Path(task["directory"]), task["device"], Shape(**task["shape"])
    prompts = (directory / "prompts.txt").read_text(encoding="utf-8").splitlines()
    before = measure.held_bytes(device)
    sides = {"textbook": run_textbook, "quarkrl": run_quarkrl, "generate": run_generate}
    clocks, learned, tokens = sides[task["side"].removesuffix("-micro")](directory, prompts, task)
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))  # Bytes of one model in float32.
    # The policy and the reference, which is in bfloat16 for quarkrl-bf16.
    models = 1.5 if task["bf16"] and task["side"].startswith("quarkrl") else 2.0
    figures: dict[str, Any] = {"tokens": tokens, "models_bytes": models * weights, "optimizer_bytes": 3 * weights}
    peak = max(peak for clock in clocks for peak in clock.peak_bytes.values())
    figures["beyond_bytes"] = peak - before - figures["models_bytes"]
    counted = [clock.seconds for clock in clocks[1:]]
    figures |= {name: statistics.mean(seconds[name] for seconds in counted) for name in counted[0]}
    figures["iteration"] = sum(figures[name] for name in counted[0])
    if learned and task["rates"]:
        flops = statistics.mean(measure.learning_flops(shape, *lengths) for lengths in learned[1:])
        prompt_tokens, completion_tokens = (sum(lengths) // task["batches"] for lengths in learned[-1])
        tokens_of_a_step = prompt_tokens + completion_tokens
        figures["learning_flops"] = flops / figures["learning"]
        figures["matmul_flops"] = measure.matmul_rate(shape, tokens_of_a_step, completion_tokens, device, task["bf16"])
        figures["peak_flops"] = measure.peak_rate(device, task["bf16"])
    return figures


def disagreements(directory: Path, prompts: list[str], task: dict[str, Any]) -> list[str]:
    """Describe where the results of textbook and quarkrl differ; an empty list if they agree.

    Both get the same weights and samples. Compared are the loss, each parameter's gradient, and the greedy completions
    on the best reward token.
    """
    differences = []
    with tempfile.TemporaryDirectory() as work:
        task = {**task, "device": "cpu"}  # On a CPU both accumulate in float32.
        trainer = quarkrl_trainer(directory, prompts, Path(work), task)
        textbook = Textbook(directory, num_quantiles=task["num_quantiles"], length=task["length"])
        policy = trainer.accelerator.unwrap_model(trainer.model)
        textbook.policy.load_state_dict(policy.state_dict())
        trainer.explore(0)
        trainer.quantize(0)
        samples = [trainer.pool[int(i)] for i in trainer.draws[: task["batch_size"]]]
        decode = trainer.plain_tokenizer.decode
        batch = textbook.collate(
            [(int(s.quantiles[0]), decode(s.prompt_ids), decode(s.completion_ids)) for s in samples]
        )
        # Like the official code, the textbook keeps EOS in the loss where sampling suppressed it.
        trainer.args.min_completion_length = 0
        expected = textbook.loss(batch)
        expected.backward()
        loss = trainer.compute_loss(trainer.model, trainer.collate(range(task["batch_size"])))
        loss.backward()
        if not abs(loss.item() - expected.item()) <= LOSS_TOLERANCE * abs(expected.item()):
            differences.append(f"loss {loss.item()}, textbook {expected.item()}")
        expected_parameters = dict(textbook.policy.named_parameters())
        for name, parameter in policy.named_parameters():
            other = expected_parameters[name].grad
            difference = (parameter.grad - other).norm() / other.norm()
            if not difference <= GRADIENT_TOLERANCE:
                differences.append(f"gradient of {name}: differs from the textbook's by {difference:.1e} of its norm")
        generator = QuarkGenerator(policy, trainer.plain_tokenizer, trainer.conditioning)
        length = {"max_new_tokens": task["length"], "min_new_tokens": task["length"]}
        texts = [text for (text,) in generator.generate(prompts, do_sample=False, **length)]
        greedy = textbook.sample(prompts, best=True, greedy=True)
        differences += [
            f"greedy completion {text!r}, textbook {other!r}"
            for text, other in zip(texts, greedy, strict=True)
            if text.split() != other.split()
        ]
    return differences


def make_tables(runs: dict[str, dict[str, float]], task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return tables of the sides' medians, and of the ratios between quarkrl and the textbook."""
    samples = task["batches"] * task["batch_size"]
    sides, ratios = [], []
    for name, run in runs.items():
        row: dict[str, Any] = {"side": name, "iteration, s": run["iteration"]}
        row["sampling, completions/s"] = samples / run["sampling"]
        row["tokens/s"] = row["sampling, completions/s"] * task["length"]
        learns = "learning" in run
        row["learning, samples/s"] = samples / run["learning"] if learns else None
        row["learning, GFLOP/s"] = run["learning_flops"] / 1e9 if learns else None
        row["share of matmul rate"] = run["learning_flops"] / run["matmul_flops"] if learns else None
        if task["device"] == "cuda":
            peak = task["peak_tflops"] * 1e12 if task["peak_tflops"] else run.get("peak_flops", 0)
            row["MFU"] = run["learning_flops"] / peak if learns else None
        row["memory beyond models, GB"] = run["beyond_bytes"] / 1e9 if learns else None
        row["gradients and Adam, GB"] = run["optimizer_bytes"] / 1e9 if learns else None
        sides.append(row)
    for base in ("textbook", "textbook-bf16"):
        for name, run in runs.items():
            if base in runs and name.startswith("quarkrl"):
                ratio: dict[str, Any] = {"side": name, "against": base}
                for figure in ("sampling", "learning", "iteration"):
                    ratio[f"{figure}, times faster"] = runs[base][figure] / run[figure]
                ratio["memory, ratio"] = run["beyond_bytes"] / runs[base]["beyond_bytes"]
                ratios.append(ratio)
    return {"sides": sides, "ratios": ratios} if ratios else {"sides": sides}


def main() -> None:
    """Measure the sides, compare them and report."""
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="size of the model; default gpt2, or quick with --quick")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=default_sides())
    parser.add_argument("--repeats", type=int, help="runs per side; default 3, or 1 with --quick")
    parser.add_argument("--iterations", type=int, default=2, help="iterations per run; the first is not counted")
    parser.add_argument("--batches", type=int, default=8, help="batches that an iteration samples, and learns from")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=20, help="tokens per completion")
    parser.add_argument("--num_quantiles", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--peak_tflops", type=float, help="peak rate for MFU; by default of the data sheet, or measured for other GPUs"
    )
    parser.add_argument("--prompts", type=Path, help="RealToxicityPrompts as JSONL; random tokens by default")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer for --prompts")
    options = parser.parse_args()
    if options.child:
        with redirect_stdout(sys.stderr):
            figures = run(options.child)
        return measure.answer(figures)
    options.peak_tflops = options.peak_tflops or measure.data_sheet_tflops(options.device)
    name = options.shape or ("quick" if options.quick else "gpt2")
    counts = ("iterations", "batches", "batch_size", "length", "num_quantiles", "device", "peak_tflops")
    task: dict[str, Any] = {name: getattr(options, name) for name in counts}
    task |= {"shape": measure.as_json(SHAPES[name]), "bf16": False, "rates": True}
    with tempfile.TemporaryDirectory() as directory:
        task["directory"] = directory
        measure.make_model(Path(directory), SHAPES[name], device=options.device)
        count = options.batches * options.batch_size
        prompts = measure.make_prompts(count, SHAPES[name], options.prompts, options.tokenizer)
        (Path(directory) / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
        few = {**task, "batch_size": 8, "batches": 1}
        if options.quick and (differences := disagreements(Path(directory), prompts[:8], few)):
            sys.exit("\n".join(["textbook and quarkrl differ:", *differences]))
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
        for repeat in range(options.repeats or (1 if options.quick else 3)):
            for side in options.sides:
                print(f"repeat {repeat}: {side}", file=sys.stderr, flush=True)
                which = {"side": side.removesuffix("-bf16"), "bf16": side.endswith("-bf16")}
                runs[side].append(measure.child(__file__, {**task, **which}))
    if len(counted := {run["tokens"] for side in runs.values() for run in side}) > 1:
        sys.exit(f"the sides sampled different numbers of tokens: {sorted(counted)}")
    about = options.name or f"iteration-{name}" + ("-cuda" if options.device == "cuda" else "")
    tables = make_tables({side: measure.medians(figures) for side, figures in runs.items()}, task)
    measure.report(about, options.device, tables, options.output, task=task, runs=runs)


if __name__ == "__main__":
    main()
