"""Non-finite numbers and collapse in real runs: each is named with its step, and stops the run or is skipped."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.eight_letters import TOKENIZER
from helpers.runs import distinct_rewards, read_metrics, small_trainer, weights_of
from helpers.tiny_models import tiny_model
from transformers import TrainerCallback

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer
from quarkrl.errors import UserError
from quarkrl.training.health import (
    LEAST_ENTROPY,
    constant_attributes,
    describe_identical,
    find_non_finite,
)
from quarkrl.training.options import MAX_SKIPPED_STEPS

NAN, INF = math.nan, math.inf


class At(TrainerCallback):
    """At the given steps (from 1), sets a gradient to a value, or calls `before` with the model before the batch."""

    def __init__(self, steps, gradient=None, before=None):
        self.steps, self.gradient, self.before = steps, gradient, before

    def on_step_begin(self, args, state, control, model=None, **_):
        if self.before and state.global_step + 1 in self.steps:
            self.before(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.gradient is not None and state.global_step + 1 in self.steps:
            dict(model.named_parameters())["transformer.ln_f.bias"].grad[3] = self.gradient


def trainer_of(directory: Path, *callbacks: TrainerCallback, reward=distinct_rewards, **options) -> QuarkTrainer:
    """A small trainer of two quantiles whose `callbacks` run before the checks."""
    return small_trainer(directory, reward, callbacks=[*callbacks], **{"num_quantiles": 2, **options})


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# Non-finite numbers


def test_non_finite_tensors_are_named():
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, NAN]), "c": torch.tensor([[INF]]), "d": None}
    tensors |= {"e": torch.zeros(0), "f": torch.tensor([3e38, 3e38]), "g": torch.tensor([-INF], dtype=torch.bfloat16)}
    assert find_non_finite(tensors.items()) == ["b", "c", "g"]
    assert find_non_finite([("a", tensors["a"]), ("f", tensors["f"])]) == []  # Finite, although their squares overflow.
    assert find_non_finite([]) == []


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_non_finite_gradient_stops_the_run_before_the_weights_change(tmp_path, value):
    trainer = trainer_of(tmp_path, At({5}, gradient=value))
    seen = []

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            seen.append(weights_of(model))

    trainer.add_callback(Seen())
    with pytest.raises(UserError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith("step 5: the gradient of transformer.ln_f.bias is not finite.")
    assert "--learning_rate" in message and "--max_grad_norm" in message and "--on_bad_numbers skip" in message
    assert len(seen) == 4 and same(seen[-1], weights_of(trainer.model))


def test_the_parts_of_a_non_finite_loss_are_named(tmp_path):
    def ruin(model):
        model.transformer.wte.weight.data[2, 0] = NAN

    with pytest.raises(UserError, match="step 2: the nll, the kl, the entropy is not finite"):
        trainer_of(tmp_path, At({2}, before=ruin)).train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_skipped_step_changes_nothing_and_is_counted(tmp_path, accumulation, caplog):
    """Weights, the optimizer's moments, adaptive coefficients and logged means stay as they were."""
    options = {"gradient_accumulation_steps": accumulation, "kl_target": 3.0, "logging_steps": 3}
    trainer = trainer_of(tmp_path, At({2, 6}, gradient=NAN), on_bad_numbers="skip", max_grad_norm=1.0, **options)
    seen = []

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
            moments = [s["exp_avg"].clone() for s in optimizer.state_dict()["state"].values()]
            seen.append((weights_of(model), moments, trainer.coefs.kl_coef, optimizer.param_groups[0]["lr"]))

    trainer.add_callback(Seen())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    unchanged = [n + 1 for n in range(1, 6) if same(seen[n][0], seen[n - 1][0])]
    assert unchanged == [2, 6]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))
    assert seen[0][2] == seen[1][2] != seen[2][2]
    assert trainer.state.global_step == 6 and len({lr for *_, lr in seen}) == 6  # The schedule goes on.
    lines = read_metrics(tmp_path)
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [1, 2]
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(line[name]) for line in losses for name in ("nll", "kl", "loss"))
    messages = [record.message for record in caplog.records if record.name == "quarkrl.training.health"]
    assert messages[0].startswith("step 2: the gradient of transformer.ln_f.bias is not finite")
    assert "skipped_steps 1" in messages[0] and "step 6" in messages[1] and "skipped_steps 2" in messages[1]


@pytest.mark.parametrize("every", [1, 3])
def test_a_non_finite_loss_is_not_part_of_the_logged_means(tmp_path, every):
    kept = {}

    class Ruin(TrainerCallback):
        """NaN in one row of the input, for step 2 alone."""

        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 1:
                kept["row"] = model.transformer.wpe.weight.data[1].clone()
                model.transformer.wpe.weight.data[1] = NAN

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                model.transformer.wpe.weight.data[1] = kept["row"]

    trainer = trainer_of(tmp_path, Ruin(), on_bad_numbers="skip", logging_steps=every)
    trainer.train()
    names = ("loss", "nll", "kl", "entropy")
    losses = {line["step"]: [line[name] for name in names] for line in read_metrics(tmp_path) if "loss" in line}
    if every == 1:  # The log has no other step, so its values are null; JSON has no NaN.
        assert losses.pop(2) == [None] * 4
        (line,) = [line for line in read_metrics(tmp_path) if line["step"] == 2 and "loss" in line]
        assert line["grad_norm"] is None
    assert len(losses) == 6 // every - (every == 1)
    assert all(math.isfinite(value) for values in losses.values() for value in values)
    assert [line["skipped_steps"] for line in read_metrics(tmp_path) if "skipped_steps" in line] == [1]
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_too_many_consecutive_skipped_steps_stop_the_run(tmp_path):
    bad = {*range(2, 12), *range(13, 99)}  # Ten bad steps, a good one, then only bad ones.
    options = {"steps_per_iteration": 50, "num_iterations": 1, "on_bad_numbers": "skip"}
    trainer = trainer_of(tmp_path, At(bad, gradient=INF), **options)
    with pytest.raises(UserError, match=f"step 33: .*the {MAX_SKIPPED_STEPS} steps before it .*--learning_rate"):
        trainer.train()
    assert trainer.state.global_step == 12 + MAX_SKIPPED_STEPS + 1


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_non_finite_weights_are_not_saved(tmp_path, strategy):
    class Ruin(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step == 5:  # The sixth, after which both strategies save.
                model.transformer.ln_f.weight.data[0] = INF

    trainer = trainer_of(tmp_path, Ruin(), save_strategy=strategy, save_steps=3)
    with pytest.raises(
        UserError, match=r"step 6: the weights of transformer\.ln_f\.weight are not finite.*--max_grad_norm"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_model_with_non_finite_logits_samples_nothing(tmp_path):
    model = tiny_model("gpt2", TOKENIZER)
    model.transformer.wte.weight.data[2, 0] = NAN
    for sampling in ({"do_sample": False}, {"top_p": 0.9}, {"top_p": 1.0}):
        with pytest.raises(UserError, match="logits are not finite"):
            QuarkGenerator(model, TOKENIZER, None).generate("a b", **sampling)
    with pytest.raises(UserError, match="logits are not finite"):
        trainer_of(tmp_path, model=model).train()


# Collapse


@pytest.mark.parametrize(
    ("completions", "texts", "expected"),
    [
        ([[1, 2], [1, 2]], ["b c", "b c"], "identical: 'b c'"),
        ([[1, 2], [1, 3]], ["b c", "b d"], None),
        ([[9], [9]], ["", ""], "empty"),
        ([[9], [8, 9]], ["", " \n"], "empty"),
        ([[9], [1, 9]], ["", "b"], None),
        ([[1, 2]], ["b c"], None),
        ([[1] * 99] * 2, ["b" * 99] * 2, "identical: '" + "b" * 59 + "…'"),
    ],
)
def test_completions_that_are_all_empty_or_identical(completions, texts, expected):
    assert describe_identical(completions, texts) == expected


def test_constant_rewards_are_named_by_attribute():
    rewards = np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]])
    assert constant_attributes(rewards, ("x", "y")) == ["x"]
    assert constant_attributes(rewards, ("x", "y"), ceiling=2.0) == ["x", "y"]
    assert constant_attributes(rewards, ("x", "y"), ceiling=2.5) == ["x"]


def of_one_word(model, word: int):
    """Return the model, changed to predict one word with certainty after any text."""
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.fill_(1.0)
    model.lm_head.weight.data[word] = 100.0
    return model


COLLAPSED = {
    "identical": ({"model": 3}, "iteration 1: all 8 completions are identical: 'd d d d d d'"),
    "empty": ({"model": 9, "min_completion_length": 0}, "iteration 1: all 8 completions are empty"),
    "one reward": (
        {"reward": lambda completions: [2.5] * len(completions)},
        "iteration 1: all 8 samples of the pool have reward 2.5",
    ),
    "cut off": (
        {"reward": lambda completions: [2.5] * len(completions), "min_completion_length": 6},
        "iteration 1: all 8 samples of the pool have reward 2.5, and all completions end at max_completion_length 6:",
    ),
    "each of two rewards": (
        {"reward": [lambda completions: [1.0] * len(completions), distinct_rewards], "condition_on": "each"}
        | {"reward_ceiling": -2.0},
        "iteration 1: all 8 samples of the pool have lambda 1, distinct_rewards at or above reward_ceiling -2. Nothing",
    ),
    "all good enough": (
        {"reward_ceiling": -1.0},
        "iteration 1: all 8 samples of the pool have reward at or above reward_ceiling -1",
    ),
}


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_collapse_stops_the_run_or_is_warned_of(tmp_path, name, caplog):
    options, message = COLLAPSED[name]
    for choice in ("stop", "warn"):
        arguments = dict(options)
        if "model" in arguments:
            model = tiny_model("gpt2", TOKENIZER, tied=False)
            arguments |= {"model": of_one_word(model, arguments["model"]), "reward": range_of}
        trainer = trainer_of(tmp_path / choice, on_collapse=choice, **arguments)
        if choice == "stop":
            with pytest.raises(UserError) as error:
                trainer.train()
            assert str(error.value).startswith(message) and trainer.state.global_step == 0
            assert "--on_collapse warn" in str(error.value)
        else:
            with caplog.at_level(logging.WARNING):
                trainer.train()
            assert trainer.state.global_step == 6
            assert any(record.message.startswith(message) for record in caplog.records)


@pytest.mark.parametrize("ceiling", [None, 3.0])
def test_one_constant_reward_of_two_is_warned_of(tmp_path, ceiling, caplog):
    """The other still distinguishes samples. The ceiling is above the constant reward, which does not reach it."""

    def low(completions):
        return [-1.0] * len(completions)

    options = {"reward": [low, distinct_rewards], "condition_on": "each", "reward_ceiling": ceiling}
    trainer = trainer_of(tmp_path, num_iterations=1, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "all 8 samples of the pool have low -1. The model does not learn these reward tokens" in caplog.text


def range_of(completions) -> list[int]:
    """Rewards that all differ, even for equal texts."""
    return list(range(len(completions)))


def test_a_policy_without_entropy_stops_the_run_at_the_end_of_its_iteration(tmp_path):
    """The first iteration is healthy; from the second on the policy predicts "c" with certainty."""

    def sure(model):
        of_one_word(model, 2)

    model = tiny_model("gpt2", TOKENIZER, tied=False)
    trainer = trainer_of(tmp_path, At({4, 5, 6}, before=sure), model=model, save_strategy="epoch")
    with pytest.raises(UserError) as error:
        trainer.train()
    assert str(error.value).startswith("iteration 2: the policy's entropy is ")
    assert "--learning_rate" in str(error.value) and "--kl_coef" in str(error.value)
    assert trainer.state.global_step == 6
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [
        "checkpoint-3"
    ]  # The collapsed policy is not saved.
    assert 0 < LEAST_ENTROPY < 0.1


def test_the_checks_change_nothing_in_a_healthy_run(tmp_path, caplog):
    weights = []
    for bad, collapse in (("stop", "stop"), ("skip", "warn")):
        trainer = trainer_of(tmp_path / bad, on_bad_numbers=bad, on_collapse=collapse)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert same(*weights)
    assert not [record for record in caplog.records if record.name == "quarkrl.training.health"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_numbers": "ignore"}, "on_bad_numbers 'ignore': must be stop or skip."),
        ({"on_collapse": "skip"}, "on_collapse 'skip': must be stop or warn."),
        ({"reward_timeout": 0.0}, "reward_timeout 0.0: must be greater than 0."),
        ({"reward_timeout": NAN}, "reward_timeout nan: must be greater than 0."),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    with pytest.raises(UserError) as error:
        QuarkConfig(output_dir=str(tmp_path), **options)
    assert str(error.value).startswith(message)
