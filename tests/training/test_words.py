"""Runs whose quantiles are asked for in words: exploring, the guided reference, rates of rows, saving and resuming."""

from __future__ import annotations

import pytest
import torch
from helpers.eight_letters import TOKENIZER, VOCAB
from helpers.runs import (
    LORA,
    KillBefore,
    assert_same_weights,
    distinct_rewards,
    share_of_a,
    small_trainer,
    still_model,
    watch,
    weights_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl import EvaluationOptions, QuarkConfig, evaluate
from quarkrl.cli.main import main
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.guidance import guided_logits
from quarkrl.training.checks import check_sharded

WORDS = ["h h", "g", ""]
KINDS = pytest.mark.parametrize("kind", ["text", "soft"])


def words_trainer(directory, kind="text", rewards=share_of_a, **options):
    return small_trainer(directory, rewards, **{"conditioning": kind, "words": WORDS, **options})


@KINDS
def test_iteration_0_already_asks_for_the_best_quantile(tmp_path, kind):
    trainer = words_trainer(tmp_path, kind, words=["h h", "g", "a"], num_iterations=1)
    calls = watch(trainer)
    trainer.train()
    best = trainer.conditioning.ids_of([2])
    first = [ids for who, what, _, ids in calls if (who, what) == ("policy", "sample") and ids.shape[1] > 1]
    assert first and all(row[row != 0].tolist()[: len(best)] == best or best == [0] for ids in first for row in ids)
    assert not [what for who, what, *_ in calls if (who, what) == ("reference", "sample")]


@KINDS
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "adapter"])
def test_the_final_model_is_steered_with_nothing_in_front(tmp_path, kind, peft_config):
    trainer = words_trainer(tmp_path, kind, peft_config=peft_config, samples_per_prompt=4)
    trainer.train()
    final = trainer.save_final()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert tokenizer("a b")["input_ids"] == TOKENIZER("a b")["input_ids"] == [0, 1]
    generator = QuarkGenerator.from_pretrained(final)
    worst = trainer.conditioning.prefix([0, 1], [0])
    assert generator.encode(["a b"], "worst") == [worst] and generator.encode(["a b"]) == [[0, 1]]
    policy = trainer.model.eval()
    with torch.no_grad():
        for ids in ([0, 1], worst):
            trained, saved = (m(torch.tensor([ids])).logits[0, -1, :VOCAB] for m in (policy, model))
            torch.testing.assert_close(trained, saved, rtol=1e-4, atol=1e-5)
    texts = generator.generate(["a b"], seed=0, guidance_scale=2.0, max_new_tokens=4, min_new_tokens=4)
    assert len(texts[0][0].split()) == 4


@KINDS
def test_a_checkpoint_of_an_adapter_is_loaded_and_exported(tmp_path, kind):
    options = {"save_strategy": "epoch", "num_iterations": 1, "learning_rate": 3e-2}
    trainer = words_trainer(tmp_path / "run", kind, model=saved_model(tmp_path), peft_config=LORA, **options)
    trainer.train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert main(["export", str(checkpoint), "--merge", "--output", str(tmp_path / "merged")]) == 0
    assert main(["export", str(checkpoint), "--adapter", "--output", str(tmp_path / "adapter")]) == 0
    policy = trainer.model.eval()
    for path in (checkpoint, tmp_path / "merged", tmp_path / "adapter"):
        generator = QuarkGenerator.from_pretrained(path)
        for quantile in ("worst", 1, "best"):
            (ids,) = generator.encode(["a b"], quantile)
            assert ids == trainer.conditioning.prefix([0, 1], trainer.conditioning.quantiles_of(quantile))
            with torch.no_grad():
                trained, loaded = (m(torch.tensor([ids])).logits[0, :, :VOCAB] for m in (policy, generator.model))
            torch.testing.assert_close(trained, loaded, rtol=1e-4, atol=1e-5)


def saved_model(directory) -> str:
    still_model().save_pretrained(directory / "start")
    TOKENIZER.save_pretrained(directory / "start")
    return str(directory / "start")


@KINDS
def test_each_quantile_and_the_control_curve_are_evaluated(tmp_path, kind):
    trainer = words_trainer(tmp_path / "run", kind, model=saved_model(tmp_path))
    trainer.train()
    final = trainer.save_final()
    (tmp_path / "prompts.txt").write_text("a b\nc\nd e f\n")
    options = EvaluationOptions(quantiles=("all",), samples=2, guidance_scales=(2.0,), max_new_tokens=4)
    evaluation = evaluate(
        final,
        load_prompts(str(tmp_path / "prompts.txt")),
        Scorer(lambda completions: [len(c) for c in completions]),
        options,
    )
    assert [row.name for row in evaluation.rows] == ["reference", "0", "1", "2", "best γ=2"]


@KINDS
def test_the_kl_term_of_best_samples_is_measured_to_the_guided_reference(tmp_path, kind):
    trainer = words_trainer(tmp_path, kind, kl_guidance_scale=[1.0, 3.0], kl_coef=1.0, entropy_coef=0.0)
    for iteration in (0, 1):
        trainer.explore(iteration)
        trainer.quantize(iteration)
        batch = trainer.collate(range(8))
        is_best = torch.tensor([trainer.pool[int(i)].quantiles[0] == 2 for i in trainer.draws[:8]])
        assert is_best.any() and not is_best.all()
        assert ("contrast_input_ids" in batch) == (iteration == 1)
        scales = torch.where(is_best, 3.0, 1.0) if iteration else torch.ones(8)
        expected = [
            kl_by_hand(trainer, trainer.pool[int(draw)], float(scale))
            for draw, scale in zip(trainer.draws[:8], scales, strict=True)
        ]
        loss = trainer.compute_loss(trainer.model.train(), batch)
        sums, tokens = trainer.loss_means.step, trainer.loss_means.step["tokens"]
        assert float(sums["kl"]) / tokens == pytest.approx(sum(map(sum, expected)) / tokens, rel=1e-4)
        assert torch.isfinite(loss)
        trainer.loss_means.end_step()


@torch.no_grad()
def kl_by_hand(trainer, sample, scale) -> list[float]:
    """The divergence of the policy from the guided reference at each completion token."""
    prompt, completion = sample.prompt_ids.tolist(), sample.completion_ids.tolist()
    conditioning = trainer.conditioning

    def log_p(model, ids):
        logits = model(torch.tensor([[*ids, *completion]])).logits[0, len(ids) - 1 : -1, :VOCAB]
        early = torch.arange(len(completion)) < trainer.args.min_completion_length
        logits[early, 9] = -1e9  # EOS
        return logits.log_softmax(-1)

    with trainer.reference() as reference:
        plain = log_p(reference, prompt)
        contrast = log_p(reference, [*TOKENIZER("h h")["input_ids"], *prompt])
    policy = log_p(trainer.model.eval(), conditioning.prefix(prompt, sample.quantiles.tolist()))
    target = guided_logits(plain, [contrast], [scale]).log_softmax(-1)
    return (policy.exp() * (policy - target)).sum(-1).tolist()


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "adapter"])
@pytest.mark.parametrize("kind", ["tokens", "soft"])
def test_rows_of_new_tokens_have_a_learning_rate_of_their_own(tmp_path, kind, peft_config):
    def rows_after_a_step(directory, scale):
        words = {} if kind == "tokens" else {"conditioning": kind, "words": WORDS}
        options = {"num_iterations": 1, "steps_per_iteration": 1, "warmup_steps": 0, "prefix_lr_scale": scale}
        trainer = small_trainer(directory, distinct_rewards, still_model(), peft_config=peft_config, **options, **words)
        ids = torch.tensor(trainer.conditioning.new_token_ids)
        layer = trainer.model.get_input_embeddings()
        before = layer(ids).detach().clone()
        torch.manual_seed(0)
        trainer.train()
        weights = weights_of(trainer.model)
        others = {name: weights[name] for name in weights if "wte" not in name and "lm_head" not in name}
        return layer(ids).detach() - before, others

    once, others = rows_after_a_step(tmp_path / "1", 1.0)
    tenfold, same_others = rows_after_a_step(tmp_path / "10", 10.0)
    assert once.abs().max() > 0
    torch.testing.assert_close(tenfold, 10 * once, rtol=1e-3, atol=1e-6)
    assert_same_weights(others, same_others)


@KINDS
def test_a_run_in_words_resumes_exactly(tmp_path, kind):
    options = {"kl_guidance_scale": 2.0, "explore_guidance_scale": 1.5, "prefix_lr_scale": 3.0}
    options |= {"save_strategy": "steps", "save_steps": 1}
    whole = words_trainer(tmp_path / "whole", kind, distinct_rewards, **options)
    whole.train()
    cut = words_trainer(tmp_path / "cut", kind, distinct_rewards, **options, callbacks=[KillBefore(4)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = words_trainer(tmp_path / "cut", kind, distinct_rewards, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
    other = words_trainer(tmp_path / "cut", kind, distinct_rewards, **{**options, "words": ["h", "g", ""]})
    with pytest.raises(UserError, match="words was"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["a", "b"]}, "words: must be left out with new tokens"),
        ({"kl_guidance_scale": 2.0}, r"kl_guidance_scale \[2.0\]: must be 1 with new tokens"),
        ({"conditioning": "prose"}, "conditioning 'prose': must be"),
        ({"kl_guidance_scale": [], "conditioning": "text"}, r"kl_guidance_scale \[\]: must be a number"),
    ],
)
def test_options_that_need_words_are_refused_without_them(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        QuarkConfig(str(tmp_path), **options)


@pytest.mark.parametrize("option", ["kl_guidance_scale", "prefix_lr_scale", "distill_guidance_scale"])
def test_sharded_weights_are_refused_before_sampling(tmp_path, option):
    config = QuarkConfig(str(tmp_path), conditioning="text", **{option: 2.0})
    check_sharded(config, is_sharded=False)
    with pytest.raises(UserError, match=rf"{option} .*: must be 1 in a run with sharded weights"):
        check_sharded(config, is_sharded=True)
