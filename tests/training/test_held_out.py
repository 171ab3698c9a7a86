"""Held-out evaluation: the best checkpoint, early stopping, and the options of decoding and guidance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.eight_letters import EOS_ID, PROMPTS, TOKENIZER
from helpers.runs import assert_same_weights, figures_of, share_of_a_to_d, small_trainer, still_model, watch, weights_of
from helpers.tiny_models import make_home
from peft import LoraConfig
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.training.held_out import check_metric

LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
# `overdone` rises with the trained reward and falls when training goes too far. Only the held-out prompts have a column
# `held_out`.
REWARDS = """
def overdone(completion_ids, held_out=None, **_):
    shares = [sum(i < 4 for i in ids) / len(ids) for ids in completion_ids]
    return shares if held_out is None else [1 - abs(share - 0.65) for share in shares]

def never_better(completion_ids, held_out=None, **_):
    return [sum(i < 4 for i in ids) / len(ids) if held_out is None else 0.5 for ids in completion_ids]
"""
HELD_OUT = [{"prompt": text, "held_out": True} for text in PROMPTS]
GUARDED = {
    "num_iterations": 12,
    "steps_per_iteration": 10,
    "per_device_train_batch_size": 32,
    "warmup_steps": 2,
    "lr_scheduler_type": "constant",
    "learning_rate": 2e-2,
    "kl_coef": 0.01,
    "entropy_coef": 0.0,
    "eval_strategy": "epoch",
    "eval_samples_per_prompt": 8,
    "save_strategy": "epoch",
}


class ScriptedEvaluations:
    """A reward that gives the n-th of its numbers in the n-th evaluation, and a real reward in training."""

    def __init__(self, *rewards: float):
        self.rewards = iter(rewards)

    def __call__(self, completion_ids, held_out=None, **_):
        if held_out is None:
            return share_of_a_to_d(completion_ids)
        return [next(self.rewards)] * len(completion_ids)


class WeightsRecorder(TrainerCallback):
    """Records the weights at each evaluation."""

    def __init__(self):
        self.weights = []

    def on_evaluate(self, args, state, control, model, **_):
        self.weights.append(weights_of(model))


# Held out


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_a_run_stops_when_the_held_out_reward_no_longer_rises_and_final_is_the_best_checkpoint(tmp_path, lora):
    recorder = WeightsRecorder()
    trainer = small_trainer(
        tmp_path,
        ScriptedEvaluations(0.1, 0.5, 0.9, 0.4, 0.8, 0.95),
        prompts=PROMPTS * 4,
        eval_dataset=HELD_OUT,
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(2), recorder],
        **{**GUARDED, "steps_per_iteration": 3},
        **({"peft_config": lora} if lora else {}),
    )
    assert trainer.args.metric_for_best_model == "reward" and trainer.args.greater_is_better
    trainer.train()
    assert figures_of(tmp_path, "eval_reward") == pytest.approx([0.1, 0.5, 0.9, 0.4, 0.8])
    assert trainer.pool.iterations.max() == 4  # No exploration after the stop.
    checkpoint = tmp_path / "checkpoint-9"
    assert Path(trainer.state.best_model_checkpoint).name == checkpoint.name
    assert_same_weights(weights_of(trainer.model), recorder.weights[2])
    for other in (1, 3, 4):
        with pytest.raises(AssertionError):
            assert_same_weights(weights_of(trainer.model), recorder.weights[other])
    final = trainer.save_final()
    model = AutoModelForCausalLM.from_pretrained(final).eval()
    ids = torch.tensor([[token, *row] for (token,) in trainer.conditioning.prefixes[0] for row in ([0, 1], [7, 3])])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    # The facts in final/ are those of the best checkpoint.
    facts, best_facts = (json.loads((place / "quark.json").read_text()) for place in (final, checkpoint))
    assert facts == best_facts and facts["iterations"] == 3 and facts["pool_size"] == 3 * 32


def test_without_load_best_model_at_end_final_is_the_last_checkpoint(tmp_path):
    options = {**GUARDED, "num_iterations": 3, "steps_per_iteration": 3, "metric_for_best_model": "reward"}
    trainer = small_trainer(
        tmp_path, ScriptedEvaluations(0.9, 0.5, 0.1), prompts=PROMPTS * 4, eval_dataset=HELD_OUT, **options
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    facts = json.loads((trainer.save_final() / "quark.json").read_text())
    assert (facts["iterations"], facts["pool_size"]) == (3, 3 * 32)


def test_eval_reward_is_the_mean_of_several_rewards(tmp_path):
    def calm(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    options = {"eval_dataset": PROMPTS, "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = small_trainer(
        tmp_path, [share_of_a_to_d, calm], condition_on="each", load_best_model_at_end=True, **options
    )
    trainer.train()
    names = ("eval_reward", "eval_share_of_a_to_d", "eval_calm")
    means, shares, lengths = (figures_of(tmp_path, name) for name in names)
    assert means == pytest.approx([(a + b) / 2 for a, b in zip(shares, lengths, strict=True)])
    assert trainer.state.best_metric == max(means)


# The command


@pytest.fixture
def home(tmp_path) -> Path:
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, HELD_OUT)), encoding="utf-8")
    options = {
        "eval_prompts": str(tmp_path / "held_out.jsonl"),
        "reward": str(tmp_path / "rewards.py:overdone"),
        "output_dir": str(tmp_path / "run"),
        "num_quantiles": 3,
        "max_completion_length": 6,
        "min_completion_length": 1,
        **{name: value for name, value in GUARDED.items() if name != "eval_strategy"},
    }
    return make_home(tmp_path, TOKENIZER, PROMPTS * 8, REWARDS, still_model(), **options)


def iterations_of(final: Path) -> float:
    return json.loads((final / "quark.json").read_text())["iterations"]


def test_the_command_stops_early_and_keeps_the_best_checkpoint(home):
    run = home / "run"
    assert main(["train", "--config", str(home / "run.yaml"), "--early_stopping_patience", "2"]) == 0
    rewards = figures_of(run, "eval_reward")
    best = int(np.argmax(rewards))
    assert len(rewards) == best + 1 + 2 < GUARDED["num_iterations"]
    assert iterations_of(run / "final") == best + 1
    assert yaml.safe_load((run / "config.yaml").read_text())["early_stopping_patience"] == 2


def test_a_resumed_run_continues_the_count_of_early_stopping(home):
    train = ["train", "--config", str(home / "run.yaml"), "--reward", f"{home / 'rewards.py'}:never_better"]
    train += ["--early_stopping_patience", "3", "--steps_per_iteration", "3"]
    assert main([*train, "--num_iterations", "3"]) == 0
    assert len(figures_of(home / "run", "eval_reward")) == 3  # The first, and two that are not better.
    assert main([*train, "--resume_from_checkpoint", str(home / "run" / "checkpoint-9")]) == 0
    assert len(figures_of(home / "run", "eval_reward")) == 4
    assert iterations_of(home / "run" / "final") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--early_stopping_patience", "0"], "early_stopping_patience 0: must be at least 1"),
        (
            ["--early_stopping_patience", "2", "--save_strategy", "no"],
            "early_stopping_patience 2: must come with checkpoints",
        ),
        (
            ["--load_best_model_at_end", "--save_strategy", "no"],
            "load_best_model_at_end True: must come with checkpoints",
        ),
        (["--metric_for_best_model", "rewards"], "metric_for_best_model 'rewards': must be one of reward, "),
    ],
)
def test_options_that_lack_a_requirement_are_errors_in_one_line(home, capsys, flags, message):
    assert main(["train", "--config", str(home / "run.yaml"), *flags]) == 2
    assert message in (error := capsys.readouterr().err) and error.startswith("error: ") and error.count("\n") == 1


def test_a_metric_that_a_reward_logs_can_choose_the_best_checkpoint():
    check_metric("eval_metric.accuracy", ["reward"], ["reward"])
    with pytest.raises(UserError, match=r"metric_for_best_model 'metrics': must be one of .* or metric\.NAME"):
        check_metric("metrics", ["reward"], ["reward"])


def test_a_metric_that_no_evaluation_has_is_refused_in_python_too(tmp_path):
    with pytest.raises(UserError, match=r"metric_for_best_model 'rewards': must be one of reward, "):
        small_trainer(tmp_path, metric_for_best_model="rewards")


@pytest.mark.parametrize("flag", ["--early_stopping_patience=2", "--load_best_model_at_end"])
def test_choosing_the_best_checkpoint_requires_held_out_prompts(home, capsys, flag):
    entries = yaml.safe_load((home / "run.yaml").read_text())
    del entries["eval_prompts"]
    (home / "run.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    assert main(["train", "--config", str(home / "run.yaml"), flag]) == 2
    error = capsys.readouterr().err
    assert f"{flag[2:].split('=')[0]} " in error and "Set --eval_prompts" in error


# Decoding as it was asked for


def samples_of(trainer) -> list[list[int]]:
    trainer.quantize(0)
    return [sample.completion_ids.tolist() for sample in trainer.pool]


def test_greedy_exploring_gives_equal_prompts_equal_completions(tmp_path):
    samples = []
    for seed in (0, 1):
        trainer = small_trainer(tmp_path / str(seed), do_sample=False, seed=seed, prompts=["a b"] * 4)
        trainer.explore(0)
        samples.append(samples_of(trainer))
    assert len(set(map(tuple, samples[0]))) == 1 and samples[0] == samples[1]
    sampling = small_trainer(tmp_path / "sampling", prompts=["a b"] * 4)
    sampling.explore(0)
    assert len(set(map(tuple, samples_of(sampling)))) > 1


def test_evaluation_has_its_own_decoding_options(tmp_path):
    seen: list[list[int]] = []

    def reward(completion_ids, **_):
        seen[:] = completion_ids
        return [0.0] * len(completion_ids)

    def evaluate(name, **options):
        small_trainer(tmp_path / name, reward, eval_dataset=["a b"] * 8, **options).evaluate()
        return list(map(tuple, seen))

    greedy = evaluate("greedy", eval_do_sample=False)
    assert len(set(greedy)) == 1
    assert len(set(evaluate("sampling", do_sample=False))) > 1
    # A temperature near 0 is greedy decoding. A high one changes the completions.
    assert evaluate("cold", eval_temperature=1e-4) == greedy
    assert evaluate("hot", eval_temperature=100.0) != evaluate("temperature 1")


def test_eos_is_suppressed_where_min_and_max_completion_length_are_equal(tmp_path):
    """EOS is not the last token either."""
    for name, do_sample in (("sampling", True), ("greedy", False)):
        model = still_model()
        model.lm_head.register_forward_hook(lambda _m, _i, logits: logits.index_fill(-1, torch.tensor([EOS_ID]), 50.0))
        trainer = small_trainer(tmp_path / name, model=model, min_completion_length=6, do_sample=do_sample)
        trainer.explore(0)
        assert all(len(ids) == 6 and EOS_ID not in ids for ids in samples_of(trainer))


# Exploring with guidance


def rows_sampled(calls) -> list[int]:
    """The batch sizes of the forward passes that read prompts."""
    return [len(ids) for _, what, _, ids in calls if what == "sample" and ids.shape[1] > 1]


def test_exploring_follows_the_schedule_of_guidance_and_evaluation_has_its_own_scale(tmp_path):
    count = len(PROMPTS)
    trainer = small_trainer(
        tmp_path,
        num_iterations=5,
        steps_per_iteration=1,
        explore_guidance_scale=[3.0, 1.0, 2.0],
        eval_dataset=PROMPTS[:3],
        eval_strategy="epoch",
        eval_guidance_scale=1.0,
    )
    calls = watch(trainer)
    trainer.train()
    # Iteration 0 samples the reference without guidance; 1 has scale 1; later batches have best and worst tokens.
    assert rows_sampled(calls) == [count, 3, count, 3, 2 * count, 3, 2 * count, 3, 2 * count, 3]
    best, worst = trainer.conditioning.prefixes[0][-1][0], trainer.conditioning.prefixes[0][0][0]
    last = next(ids for _, what, _, ids in reversed(calls) if what == "sample" and len(ids) == 2 * count)
    ids = next(ids for _, what, _, ids in calls if what == "sample" and len(ids) == 2 * count and ids.shape[1] > 1)
    assert (ids[:count] == best).sum(1).tolist() == [1] * count
    assert (ids[count:] == worst).sum(1).tolist() == [1] * count
    assert torch.equal(last[:count], last[count:])  # Both continue with the same tokens.


def test_guidance_raises_the_reward_of_an_evaluation(tmp_path):
    def evaluate(name, **options):
        small = {**GUARDED, "num_iterations": 1, "eval_strategy": "no", "save_strategy": "no"}
        trainer = small_trainer(tmp_path / name, share_of_a_to_d, prompts=PROMPTS * 4, **small, **options)
        trainer.train()
        return trainer.evaluate(PROMPTS * 4)["eval_reward"]

    assert evaluate("guided", eval_guidance_scale=3.0) > evaluate("plain") + 0.02


@pytest.mark.parametrize("options", [{"peft_config": LORA}, {"kl_coef": 0.0}, {}], ids=["lora", "no kl", "copy"])
def test_guidance_from_the_reference_reads_the_untrained_model(tmp_path, options):
    """The reference exists even if nothing else needs it (kl_coef 0)."""
    trainer = small_trainer(
        tmp_path, explore_guidance_scale=2.0, guidance_from="reference", learning_rate=3e-2, num_iterations=3, **options
    )
    before = still_model()
    ids, mask = torch.tensor([[0, 1], [3, 4]]), torch.ones(2, 2, dtype=torch.long)
    calls = watch(trainer)
    trainer.train()
    with torch.no_grad(), trainer.reference() as reference:
        ref_logits = reference(input_ids=ids, attention_mask=mask, use_cache=False).logits[..., : EOS_ID + 1]
        torch.testing.assert_close(ref_logits, before(ids).logits, rtol=1e-4, atol=1e-4)
        policy = trainer.model.eval()
    with torch.no_grad():
        after = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[..., : EOS_ID + 1]
    assert (after - ref_logits).abs().max() > 0.01
    # In iterations 1 and 2 the prompts are read twice: with the best reward token and without.
    has_reward_token = [
        bool((ids > EOS_ID).any()) for _, what, _, ids in calls if what == "sample" and ids.shape[1] > 1
    ]
    assert has_reward_token == [False, True, False, True, False]
