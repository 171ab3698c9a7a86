"""The memory estimate of a run, made before it starts: does the run fit, and how many completions to sample at a time.

Temporary arrays (activations, KV cache) count with a safety factor, permanent ones (weights, optimizer) as they are.
Python and its libraries (about 0.5 GB), a reward model and the merged copy of an adapter in `save_final` do not count.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from quarkrl.algorithm.sliced_loss import default_slice_length
from quarkrl.errors import UserError
from quarkrl.models.head_access import is_one_product
from quarkrl.models.token_rows import trained_rows
from quarkrl.training.config import QuarkConfig
from quarkrl.training.runtime_tuning import positions_of_parts

logger = logging.getLogger(__name__)

SAFETY_FACTOR = 1.4  # With it, 14 runs on a CPU were estimated from 20 % below their peaks to 19 % above. No GPU yet.
REFUSAL_FACTOR = 1.25  # A run is refused if its estimate exceeds the free memory by this factor, and else warned of.
# The largest sampling batch that is chosen automatically (more is hardly faster), and its share of the memory.
LARGEST_BATCH_CPU, LARGEST_BATCH_ACCELERATOR, SAMPLING_SHARE = 128, 512, 0.5
# Numbers per trained parameter that an optimizer of transformers keeps; 2, as AdamW, if it is not listed.
_OPTIMIZER_STATES = {"ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 0, "sgd": 0, "lomo": 0}


@dataclass(frozen=True)
class RunSize:
    """What the memory use of a run depends on; sizes in bytes."""

    weights: int  # the policy's parameters
    trained: int  # those of them that are trained
    loss: int  # one slice of the loss, and the gradient of the output embedding
    activations: int  # kept for the backward pass, per sample
    checkpointed: int  # the same with gradient checkpointing
    logits: int  # per sample, if the loss cannot compute them in slices; else 0
    cache: int  # keys and values, per completion
    sampling: int  # other arrays while sampling, per completion
    batch: int  # samples that are learned at a time
    sampled: int  # completions sampled at a time
    reference: int = 0  # a separate reference model
    optimizer: float = 2.0  # the optimizer's states, per byte that is trained
    accumulates: bool = False  # whether gradients are kept over several micro-batches
    micro_batch: int = 0  # samples of a micro-batch, which may be learned in parts; 0 if it is `batch`
    merged: int = 0  # the copy of weights with an adapter merged, while sampling
    other: int = 0  # autocast's copies of weights, the buffers in which processes exchange gradients, the pool


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose, and the two peaks, which are less than the sum because some arrays follow each other."""

    parts: dict[str, int]
    exploring: int
    learning: int

    @property
    def total(self) -> int:
        """Bytes at the peak of a run."""
        return max(self.exploring, self.learning)

    def __str__(self) -> str:
        sizes = {"exploring": self.exploring, "learning": self.learning}
        sizes |= {name: size for name, size in self.parts.items() if size >= 5e6}  # 0.01 GB when rounded.
        return f"about {self.total / 1e9:.2f} GB ({', '.join(f'{n} {s / 1e9:.2f}' for n, s in sizes.items())})"


def estimate(run: RunSize) -> Estimate:
    """Estimate the memory of a run, in bytes."""
    parts = {"weights": run.weights, "reference": run.reference, "gradients": run.trained}
    parts |= {"optimizer": int(run.trained * run.optimizer), "other": run.other}
    parts |= {"activations": run.batch * run.activations, "loss": run.loss + run.batch * run.logits}
    parts |= {"cache": run.sampled * run.cache, "sampling": run.sampled * run.sampling}
    fixed = run.weights + run.reference + parts["optimizer"] + run.other
    # Gradients take the place of the activations, layer by layer, unless an earlier micro-batch has made them.
    backward = SAFETY_FACTOR * parts["activations"] + parts["loss"] + (run.trained if run.accumulates else 0)
    exploring = fixed + run.merged + SAFETY_FACTOR * (parts["cache"] + parts["sampling"])
    return Estimate(parts, int(exploring), learning=int(fixed + max(backward, run.trained + run.loss)))


def size_of_run(
    model: Any, options: QuarkConfig, prompt_length: int, num_completions: int, reference: Any = None
) -> RunSize:
    """Return the sizes of a run that explores `num_completions` completions per iteration.

    `prompt_length` is that of the longest prompt, in tokens.
    """
    config, output, cpu = model.config.get_text_config(), model.get_output_embeddings(), options.device.type == "cpu"
    head, parameters = output.weight, dict(model.named_parameters())
    length = prompt_length + options.max_completion_length
    weights = sum(weight.nbytes for weight in parameters.values())
    trained = sum(weight.nbytes for weight in parameters.values() if weight.requires_grad)
    number_bytes = 2 if options.bf16 or options.fp16 else head.element_size()
    (vocab, width), layers = head.shape, getattr(config, "num_hidden_layers", 1)
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or width // heads
    # Autograd keeps about the input and the output of each linear map, and the input of each norm (a 1-D weight).
    not_linear = {id(m.weight) for m in model.modules() if m is output or isinstance(m, torch.nn.Embedding)}
    not_linear |= {id(weight) for name, weight in parameters.items() if "lora_" in name or not name.endswith("weight")}
    matrices = [w for w in parameters.values() if w.ndim <= 2 and w.is_floating_point() and id(w) not in not_linear]
    linear = number_bytes * sum(sum(weight.shape) for weight in matrices)
    # Attention that is not fused keeps its scores before and after the softmax, and after dropout. PyTorch has no fused
    # attention with dropout on a CPU.
    dropout = getattr(config, "attn_pdrop", 0) or getattr(config, "attention_dropout", 0)
    unfused = config._attn_implementation == "eager" or (cpu and dropout > 0)
    activations = length * (linear + (3 * 4 * layers * heads * length if unfused else 0))
    checkpointed = activations // layers + length * number_bytes * layers * width  # One layer, and the input of each.
    is_checkpointed = options.gradient_checkpointing or getattr(options, "activation_checkpointing", False)
    # A slice has five arrays of (rows, vocab). The gradient of the output embedding is there twice while it is scaled.
    # Rows that an adapter trains beside the embedding need none.
    tables = 2 * (head.requires_grad and trained_rows(output) is None)
    slice_rows = min(default_slice_length(vocab), options.per_device_train_batch_size * options.max_completion_length)
    # Arrays of whole logits: those of policy and reference, and their gradient; all those of distillation, and of a
    # guided reference.
    whole = (0 if is_one_product(output) else 3) + (8 if options.distills else 6 if options.guides_reference else 0)
    sequences = 3 if options.dpo_coef else 1  # That a draw is learned with: the sample, and both of its pair.
    other = weights // 2 if number_bytes < head.element_size() else 0
    other += trained if options.world_size > 1 else 0
    other += trained if options.distills else 0  # The teacher.
    other += num_completions * options.num_iterations * (4 * length + 30) if cpu else 0  # The pool is in main memory.
    batch = options.per_device_train_batch_size
    if positions := positions_of_parts(options):
        batch = min(batch, max(positions // length, 1))
    return RunSize(
        weights=weights,
        trained=trained,
        loss=5 * 4 * slice_rows * vocab + tables * head.nbytes,
        activations=sequences * (checkpointed if is_checkpointed else activations),
        checkpointed=sequences * checkpointed,
        logits=4 * options.max_completion_length * vocab * whole,
        # Autocast does not narrow keys that are rotated by their positions.
        cache=options.passes * 2 * layers * kv_heads * head_width * head.element_size() * length,
        # A layer reads the prompts; after that, choosing a token takes six arrays of the vocabulary.
        sampling=options.passes * max(prompt_length * linear // layers, 6 * 4 * vocab),
        batch=batch,
        micro_batch=options.per_device_train_batch_size,
        sampled=num_completions,
        reference=0 if reference is None else sum(weight.nbytes for weight in reference.parameters()),
        optimizer=optimizer_ratio(options.optim, head.element_size()),
        accumulates=options.gradient_accumulation_steps > 1 or batch < options.per_device_train_batch_size,
        other=other,
    )


def optimizer_ratio(name: str, number: int = 4) -> float:
    """Return the bytes of an optimizer's states per byte of parameters, whose numbers have `number` bytes."""
    states = next((n for kind, n in _OPTIMIZER_STATES.items() if name.removeprefix("paged_").startswith(kind)), 2)
    return states * (1 / number if "8bit" in name else 0.5 / number if "4bit" in name else 1)


def free_and_total(device: torch.device) -> tuple[int, int] | None:
    """Return the free and the total bytes of a device; of main memory, this process's share. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _kernel_number("/proc/meminfo", "MemAvailable:") * 1024 or total
    for group in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):  # The limits of a container, in versions 2 and 1.
        limit = _kernel_number(f"{group}/memory.max") or _kernel_number(f"{group}/memory.limit_in_bytes")
        used = _kernel_number(f"{group}/memory.current") or _kernel_number(f"{group}/memory.usage_in_bytes")
        if 0 < limit < total:
            reclaimable = _kernel_number(f"{group}/memory.stat", "inactive_file")
            total, free = limit, min(free, limit - used + reclaimable)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free // processes, total // processes


def _kernel_number(path: str, key: str = "") -> int:
    """Return the number after `key` in a file of the kernel; 0 if there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return next(int(line.removeprefix(key).split()[0]) for line in lines if line.startswith(key))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


def choose_sampling_batch(run: RunSize, memory: int, largest: int, count: int) -> int:
    """Return the largest power of two, up to `largest`, of completions that need half of the memory at most."""
    while largest > 1 and estimate(replace(run, sampled=min(largest, count))).exploring > SAMPLING_SHARE * memory:
        largest //= 2
    return largest


def remedies(run: RunSize, sampling_batches: dict[str, int]) -> list[str]:
    """Return the options that lower a run's memory use, the most effective first, with the estimate for each."""
    batch, sampled = max(run.batch // 4, 1), max(run.sampled // 4, 1)
    times = math.ceil((run.micro_batch or run.batch) / batch)
    smaller = f"per_device_train_batch_size {batch} with {times} times the gradient_accumulation_steps"
    changes: dict[str, dict[str, Any]] = {
        smaller: {"batch": batch, "accumulates": True},
        "gradient_checkpointing": {"activations": run.checkpointed},
        "lora_rank 8": {"trained": min(run.trained, run.weights // 100), "reference": 0},
        "kl_coef 0": {"reference": 0},
        " and ".join(f"{name} {sampled}" for name, n in sampling_batches.items() if n > sampled): {"sampled": sampled},
    }
    totals = sorted((estimate(replace(run, **change)).total, option) for option, change in changes.items())
    return [f"{option} ({total / 1e9:.2f} GB)" for total, option in totals if total < 0.98 * estimate(run).total]


class MemoryPlan(NamedTuple):
    """How a run samples, and the line about its memory, if it can be estimated.

    Attributes:
        generation_batch_size: completions at a time.
        message: the estimate in words.
        merges_adapters: whether there is memory to merge an adapter into a copy of the weights.
    """

    generation_batch_size: int
    message: str | None = None
    merges_adapters: bool = False


def plan_memory(
    model: Any,
    options: QuarkConfig,
    prompt_lengths: Sequence[int],
    eval_prompt_lengths: Sequence[int] = (),
    reference: torch.nn.Module | None = None,
) -> MemoryPlan:
    """Estimate the memory of a run that is about to start, and choose its sampling batch. Warn if it may not fit.

    Args:
        model: the policy, with its adapter.
        options: of the run.
        prompt_lengths, eval_prompt_lengths: tokens of each prompt, with reward tokens.
        reference: a separate reference model.

    Raises:
        UserError: the run clearly cannot fit. The message names the options that lower its memory use.
    """
    device, batch_size = options.device, options.generation_batch_size
    launched = {os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")}
    if options.fsdp or options.deepspeed or getattr(model, "hf_device_map", None) or "true" in launched:
        return MemoryPlan(batch_size or LARGEST_BATCH_CPU)  # The model is spread over several devices.
    count = options.explored_per_iteration(len(prompt_lengths))
    run = size_of_run(model, options, max([*prompt_lengths, *eval_prompt_lengths]), count, reference)
    memory, free = free_and_total(device), 0
    if memory is not None:  # What the models take already is part of the estimate.
        parameters = [*model.parameters(), *(reference.parameters() if reference is not None else ())]
        free = memory[0] + sum(weight.nbytes for weight in parameters if weight.device.type == device.type)
    if batch_size is None and memory is not None:
        # Main memory counts in total, because free memory varies. Another batch size rounds differently, and a resumed
        # run would not be bit-identical.
        limits = (memory[1], LARGEST_BATCH_CPU) if device.type == "cpu" else (free, LARGEST_BATCH_ACCELERATOR)
        batch_size = choose_sampling_batch(run, *limits, count)
    batch_size = batch_size or LARGEST_BATCH_CPU
    # On a CPU the total counts here too, for the same reason.
    room = 0 if memory is None else memory[1] if device.type == "cpu" else free
    merges = hasattr(model, "peft_config") and 2 * run.weights < SAMPLING_SHARE * room
    run = replace(run, merged=run.weights if merges else 0)
    batches = {"generation_batch_size": min(batch_size, count)}
    if eval_prompt_lengths:
        evaluated = len(eval_prompt_lengths) * options.eval_samples_per_prompt
        batches["per_device_eval_batch_size"] = min(options.per_device_eval_batch_size, evaluated)
    run = replace(run, sampled=max(batches.values()))
    total, refusal = estimate(run).total, None
    if memory is not None and total > free:
        problem = f"memory: the run needs about {total / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free."
        problem += f" Set {', or '.join(remedies(run, batches)) or 'a smaller model'}."
        if total > REFUSAL_FACTOR * free:
            refusal = problem
        else:
            logger.warning(problem)
    if options.world_size > 1:  # All processes sample as many completions at a time, and stop together.
        plans = gather_object([(batch_size, refusal)])
        batch_size, refusal = min(size for size, _ in plans), next((text for _, text in plans if text), None)
    if refusal is not None:
        raise UserError(refusal)
    message = f"memory: {estimate(run)}" + (f", of {free / 1e9:.2f} GB" if memory else "")
    return MemoryPlan(batch_size, message, merges)
