"""Whether a run fits into the memory there is, what to change where it does not, and how much to sample at a time."""

import ctypes
import logging
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from quarkrl.errors import UserError
from quarkrl.training.memory import Anatomy, Load, bytes_of, estimate, gigabytes

if TYPE_CHECKING:
    from quarkrl.training.trainer import QuarkTrainer

logger = logging.getLogger(__name__)

# An estimate that is more than what there is by less than this is only warned of: it may be wrong by as much.
_DOUBT = 1.25
# Completions sampled at a time if not given: no more than this, as more is hardly faster; and the room they may take.
_MOST_AT_A_TIME = {True: 128, False: 512}  # On a CPU; on an accelerator.
_SHARE_OF_ROOM = 0.5
# Shapes for which oneDNN, which computes in bf16 on a CPU, keeps what it has made; torch's bridge to it keeps it again.
# The 1024 of either's own were 0.65 GB of a run of the built-in model, whose lengths give it as many; with 64 a run is
# as fast.
_KEPT_BY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_SHAPES_KEPT = "64"
# Steps after which freed main memory is given back: after every 10 it cost a tenth of a 6M-parameter model's time.
_STEPS_TO_GIVE_BACK = 100


def available(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a device's memory: those that are free, and all; None where that cannot be known.

    Of main memory, what a control group allows counts, and each of the machine's processes has its share.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _entry("/proc/meminfo", "MemAvailable:") * 1024 or total
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        allowed = _entry(f"{folder}/{limit}")
        if 0 < allowed < total:
            cached = _entry(f"{folder}/memory.stat", "inactive_file")  # Given back when it is wanted.
            total, free = allowed, min(free, allowed - _entry(f"{folder}/{used}") + cached)
    return free // processes, total // processes


def _entry(path: str, name: str = "") -> int:
    """The number behind a name in one of the kernel's files; 0 where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return next(int(line[len(name) :].split()[0]) for line in lines if line.startswith(name))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


def explored_at_once(model: Anatomy, load: Load, room: int | None, count: int) -> int:
    """How many completions to sample at a time, where that is not given: what half of the room takes, a power of two.

    Args:
        model: the policy.
        load: `explored` is not read.
        room: bytes; None where that is not known.
        count: completions of an iteration.
    """
    most = at_once = _MOST_AT_A_TIME[load.cpu]
    if room is None:
        return min(most, 128)
    while at_once > 1 and (
        estimate(model, replace(load, explored=min(at_once, count))).exploring > _SHARE_OF_ROOM * room
    ):
        at_once //= 2
    return at_once


def sampled_at_once(trainer: "QuarkTrainer", exploring: int) -> dict[str, int]:
    """By option, how many completions are sampled at a time, exploring so many: no more than there are."""
    args, held_out = trainer.args, trainer.eval_prompts
    found = {"generation_batch_size": min(exploring, explored_in(trainer))}
    if held_out is not None:
        count = len(held_out) * args.eval_samples_per_prompt
        found["per_device_eval_batch_size"] = min(args.per_device_eval_batch_size, count)
    return found


def explored_in(trainer: "QuarkTrainer") -> int:
    """Completions of an iteration."""
    args, prompts = trainer.args, len(trainer.prompts)
    return min(args.prompts_per_iteration or prompts, prompts) * args.samples_per_prompt


def remedies(model: Anatomy, load: Load, at_once: dict[str, int]) -> list[str]:
    """What to change for a run to take less memory, and what it takes then; the best first.

    Args:
        model: the policy.
        load: the run.
        at_once: by option, completions sampled at a time; `load` has the most.
    """
    full = model.trained == model.weights
    fewer = max(load.explored // 4, 1)
    sampled = " and ".join(f"{name} {fewer}" for name, count in at_once.items() if count > fewer)
    adapter = model.layers * 8 * (11 * model.width + 3 * model.inner) * model.size  # Of rank 8, on all linear layers.
    # A tied matrix is put together with the reward tokens' rows, and has its gradient, in every pass.
    table = model.vocab * model.width * model.size
    adapted = replace(model, trained=adapter, head=model.head if model.tied else 0, merged=table)
    tried = [
        (
            load.batch > 1,
            f"per_device_train_batch_size {max(load.batch // 4, 1)} with 4 times the gradient_accumulation_steps",
            (model, replace(load, batch=max(load.batch // 4, 1), accumulates=True)),
        ),
        (not load.checkpointed, "gradient_checkpointing", (model, replace(load, checkpointed=True))),
        (full, "lora_rank 8", (adapted, replace(load, reference=0))),
        (load.reference > 0, "kl_coef 0", (model, replace(load, reference=0, kl=False))),
        (sampled != "", sampled, (model, replace(load, explored=fewer))),
    ]
    now = estimate(model, load).total
    found = [(estimate(*changed).total, text) for possible, text, changed in tried if possible]
    return [f"{text} ({gigabytes(size)} GB)" for size, text in sorted(found) if size < 0.98 * now]


class Forecast(TrainerCallback):
    """A trainer's estimate: made before anything is on its device, told when its training begins.

    Args:
        trainer: has its prompts and its reference; its own model is not there yet.
        model: the policy, with its adapter.

    Attributes:
        explored_at_once: completions to sample at a time.
        text: one line; None where nothing can be said.

    Raises:
        UserError: the run cannot fit; says by how much, and what to change.
    """

    def __init__(self, trainer: "QuarkTrainer", model: Any):
        args, self.trainer = trainer.args, trainer
        for name in _KEPT_BY:
            os.environ.setdefault(name, _SHAPES_KEPT)  # Read once, at the first product in bf16.
        self.text: str | None = None
        self.explored_at_once = args.generation_batch_size or 128
        spread = args.fsdp or args.deepspeed or getattr(model, "hf_device_map", None)
        if spread or os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED"):
            return
        anatomy, load = Anatomy.of(model), load_of(trainer)
        there = available(args.device)
        free = room = None
        if there is not None:
            parameters = [*model.parameters(), *(trainer.ref_model.parameters() if trainer.ref_model else ())]
            held = bytes_of(p for p in parameters if p.device.type == args.device.type)  # Taken already, and estimated.
            free = there[0] + held
            # Of main memory all counts: what is free changes, and another batch size rounds otherwise: a resumed run
            # would not go on to the same bits. Where less is free than it takes, the remedies name it.
            room = there[1] if load.cpu else free
        if args.generation_batch_size is None:
            self.explored_at_once = explored_at_once(anatomy, load, room, explored_in(trainer))
        at_once = sampled_at_once(trainer, self.explored_at_once)
        load = replace(load, explored=max(at_once.values()))
        found = estimate(anatomy, load)
        self.text = f"memory: {found}" + ("" if free is None else f", of {gigabytes(free)} GB")
        refused = None
        if free is not None and found.total > free:
            changes = ", or ".join(remedies(anatomy, load, at_once))
            short = f"memory: the run takes about {gigabytes(found.total)} GB, and {gigabytes(free)} GB are free"
            if found.total > _DOUBT * free:
                refused = f"{short}; want {changes or 'a smaller model'}"
            else:
                logger.warning(f"{short}; if it fails, try {changes or 'a smaller model'}")
        if args.world_size > 1:
            self.explored_at_once, refused = in_step(self.explored_at_once, refused)
        if refused is not None:
            raise UserError(refused)

    def on_epoch_begin(self, args, state, control, **_):
        give_back()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % _STEPS_TO_GIVE_BACK == 0:
            give_back()

    def on_train_begin(self, args, state, control, **_):
        if self.text is not None and state.is_world_process_zero:
            logger.info(self.text)
            if self.trainer.progress.enabled:
                self.trainer.progress.note(self.text)


def give_back() -> None:
    """Give freed main memory back to the system.

    glibc keeps what is freed in pieces that the next batch, of another shape, does not fit into: a run of a
    6M-parameter model had 2.8 GB after one iteration and 5 GB after fourteen, of which 1.2 GB were in use.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def in_step(explored: int, refused: str | None) -> tuple[int, str | None]:
    """The least of what the processes can explore at a time, and what any of them is refused for."""
    told = gather_object([(explored, refused)])
    return min(count for count, _ in told), next((text for _, text in told if text is not None), None)


def load_of(trainer: "QuarkTrainer") -> Load:
    """What a trainer's options and prompts ask for; of `explored`, what is given."""
    args, lengths = trainer.args, list(map(len, trainer.prompts.ids))
    guided = any(scale != 1 for scale in (*args.explore_guidance_scale, args.eval_guidance_scale))
    evaluated = trainer.eval_prompts is not None
    if trainer.eval_prompts is not None:
        lengths += map(len, trainer.eval_prompts.ids)
    return Load(
        batch=args.per_device_train_batch_size,
        prompt=max(lengths) + len(trainer.scorer.attributes),
        completion=args.max_completion_length,
        explored=max(sampled_at_once(trainer, args.generation_batch_size or 0).values()),
        reference=0 if trainer.ref_model is None else bytes_of(trainer.ref_model.parameters()),
        kl=args.kl_coef > 0,
        tempered=args.nll_temperature != 1,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        accumulates=args.gradient_accumulation_steps > 1,
        checkpointed=bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)),
        mixed=args.bf16 or args.fp16,
        guided=guided,
        by_reference=guided and args.guidance_from == "reference",
        nucleus=args.top_p < 1 or (evaluated and args.eval_top_p < 1),
        processes=args.world_size,
        samples=explored_in(trainer) * args.num_iterations,
        cpu=args.device.type == "cpu",
    )
