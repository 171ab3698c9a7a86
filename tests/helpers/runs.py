"""Small runs of a tiny model in this process: the trainer, simple rewards, and readers of their files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from helpers.eight_letters import PROMPTS, TOKENIZER
from helpers.tiny_models import SMALL_RUN, tiny_model
from peft import LoraConfig
from transformers import TrainerCallback

from quarkrl import QuarkConfig, QuarkTrainer
from quarkrl.algorithm.pool import DataPool

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["c_attn", "c_fc"],
    fan_in_fan_out=True,  # As GPT-2's layers are.
    lora_dropout=0.5,
    task_type="CAUSAL_LM",
)

model_of = partial(tiny_model, "gpt2", TOKENIZER)
still_model = partial(model_of, **NO_DROPOUT)  # Nothing of chance in learning.


def share_of_a(completion_ids, **_):
    """How much of a completion is the word "a"."""
    return [ids.count(0) / len(ids) for ids in completion_ids]


def share_of_a_to_d(completion_ids, **_):
    return [sum(i < 4 for i in ids) / len(ids) for ids in completion_ids]


def distinct_rewards(completion_ids, **_):
    """A number for each completion, with few ties."""
    return [sum((i + 1) * 0.37**n for n, i in enumerate(ids)) for ids in completion_ids]


def small_trainer(directory: Path, rewards=share_of_a, model=None, prompts=PROMPTS, kind=QuarkTrainer, **options):
    """A trainer of a small run: 2 iterations of 3 steps of 8 samples, 6 tokens each, unless `options` say otherwise."""
    names = ("eval_dataset", "ref_model", "peft_config", "callbacks", "processing_class", "scored_data")
    others = {name: options.pop(name) for name in names if name in options}
    config = QuarkConfig(output_dir=str(directory), **{**SMALL_RUN, "num_quantiles": 3, "seed": 0, **options})
    others.setdefault("processing_class", TOKENIZER)
    return kind(still_model() if model is None else model, rewards, config, prompts, **others)


class KillBefore(TrainerCallback):
    """Ends a run just before a step, as a power cut would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def read_metrics(directory: Path) -> list[dict]:
    """Return the rows of `metrics.jsonl`; NaN and Infinity are not JSON and fail."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def logs_of(directory: Path, key: str) -> list[dict]:
    """Return the rows of `metrics.jsonl` that have a value of this name."""
    return [row for row in read_metrics(directory) if key in row]


def figures_of(directory: Path, key: str) -> list[float]:
    return [entry[key] for entry in logs_of(directory, key)]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def assert_same_pool(a: DataPool, b: DataPool) -> None:
    assert len(a) == len(b)
    assert a.rewards.tolist() == b.rewards.tolist() and a.iterations.tolist() == b.iterations.tolist()
    assert [s.completion_ids.tolist() for s in a] == [s.completion_ids.tolist() for s in b]
    assert [s.prompt_ids.tolist() for s in a] == [s.prompt_ids.tolist() for s in b]


def watch(trainer: QuarkTrainer) -> list[tuple[str, str, bool, torch.Tensor]]:
    """From now on, each forward pass: whose, "sample" or "learn", whether anything was in training mode, its input."""
    calls: list[tuple[str, str, bool, torch.Tensor]] = []

    def note(name, module, _args, kwargs):
        what = "sample" if kwargs["use_cache"] else "learn"
        calls.append((name, what, any(m.training for m in module.modules()), kwargs["input_ids"]))

    trainer.decide_heads()  # Its forward passes are neither.
    for name, model in {"policy": trainer.model, "reference": trainer.ref_model}.items():
        if model is not None:
            within = model.get_base_model() if hasattr(model, "get_base_model") else model  # Of an adapter's wrapper.
            within.register_forward_pre_hook(partial(note, name), with_kwargs=True)
    return calls
