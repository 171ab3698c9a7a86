"""`evaluate`: the rows of a model and its reference, and the protocol that records what the figures depend on."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from helpers.chat_templates import CHATS, chat_tokenizer
from helpers.eight_letters import EOS_ID
from helpers.errors import error_message
from helpers.evaluation_helpers import PROMPTS, WORDS, NoA, few_b, nll_by_hand, short
from helpers.reward_token_models import add_reward_tokens
from helpers.tiny_models import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

from quarkrl import metrics
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.evaluate import evaluate
from quarkrl.evaluation.options import NO_REFERENCE
from quarkrl.rewards import Scorer
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling

FOUR_SAMPLES = short(samples=4, seed=1, resamples=2000)
# The same for `QuarkGenerator.generate`.
GENERATE = {"num_return_sequences": 4, "seed": 1, "max_new_tokens": 5, "top_p": 0.9}


@pytest.fixture(scope="module")
def evaluation(trained):
    return evaluate(trained, load_prompts(PROMPTS), Scorer(NoA()), FOUR_SAMPLES)


def test_a_trained_model_and_its_reference_have_rows_with_the_same_figures(evaluation, plain):
    assert [row.name for row in evaluation.rows] == ["reference", "best", "worst"]
    assert evaluation.protocol["reference"] == evaluation.protocol["perplexity_model"] == str(plain)
    for row in evaluation.rows:
        assert row.rewards.shape == (3, 4)
        assert [len(texts) for texts in row.completions] == [4, 4, 4]
        assert row.figures.keys() == evaluation.rows[0].figures.keys()


def test_each_row_has_the_completions_of_its_quantile(evaluation, trained, plain):
    reference, policy = QuarkGenerator.from_pretrained(plain), QuarkGenerator.from_pretrained(trained)
    assert evaluation.rows[0].completions == reference.generate(PROMPTS, **GENERATE)
    assert evaluation.rows[1].completions == policy.generate(PROMPTS, quantile="best", **GENERATE)
    assert evaluation.rows[2].completions == policy.generate(PROMPTS, quantile="worst", **GENERATE)


def test_the_figures_are_the_metrics_of_the_completions(evaluation):
    for row in evaluation.rows:
        rewards = np.array([NoA()(texts) for texts in row.completions])
        assert row.rewards.tolist() == rewards.tolist()
        figures = row.figures
        assert figures["reward"] == pytest.approx(rewards.mean())
        assert figures["a-ness"] == pytest.approx(1 - rewards.mean())
        assert figures["average maximum a-ness"] == pytest.approx((1 - rewards.min(axis=1)).mean())
        assert figures["a-ness probability"] == ((1 - rewards) >= 0.5).any(axis=1).mean()
        assert figures["a-ness share"] == pytest.approx(((1 - rewards) >= 0.5).mean())
        for n in (1, 2, 3):
            assert figures[f"dist-{n}"] == np.nanmean(metrics.distinct_shares(row.completions, n))
        assert row.intervals.keys() == figures.keys()
        for name, (low, high) in row.intervals.items():
            assert low <= figures[name] <= high or np.isnan(figures[name])


def test_the_reference_s_perplexity_and_lengths_are_those_of_its_own_tokens(evaluation, plain):
    generator = QuarkGenerator.from_pretrained(plain)
    prompts = [ids for ids in generator.encode(PROMPTS) for _ in range(4)]
    sampling = Sampling(max_new_tokens=5, top_p=0.9)
    ids = complete(generator.model, prompts, sampling, end_ids=[EOS_ID], vocab_size=10, seed=1)
    without_eos = [[i for i in row if i != EOS_ID] for row in ids]
    perplexities = [
        np.exp(nll_by_hand(generator.model, prompt, row) / len(row))
        for prompt, row in zip(prompts, without_eos, strict=True)
        if row
    ]
    row = evaluation.rows[0]
    assert row.figures["completion length"] == np.mean([len(row) for row in ids])
    assert row.figures["perplexity"] == pytest.approx(np.mean(perplexities), rel=1e-4)
    assert row.left_out["perplexity_empty"] == sum(not row for row in without_eos)
    diversities = [metrics.diversity(row) for row in without_eos]
    assert row.figures["diversity"] == pytest.approx(np.nanmean(diversities))
    assert row.left_out["diversity_short"] == sum(len(row) < 4 for row in without_eos) > 0


def test_the_batch_size_does_not_change_the_figures_and_the_seed_does(evaluation, trained):
    prompts, scorer = load_prompts(PROMPTS), Scorer(NoA())
    small_batches = evaluate(trained, prompts, scorer, short(samples=4, seed=1, batch_size=5))
    other_seed = evaluate(trained, prompts, scorer, short(samples=4, seed=2))
    for one, other in zip(evaluation.rows, small_batches.rows, strict=True):
        assert one.completions == other.completions
        assert one.figures == pytest.approx(other.figures, nan_ok=True)
    assert other_seed.rows[1].completions != evaluation.rows[1].completions


def test_the_protocol_records_what_the_figures_depend_on(evaluation, trained, plain):
    protocol = evaluation.protocol
    assert protocol["model"] == str(trained)
    digest = hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()
    assert protocol["prompts"] == {"prompts": {"count": 3, "sha256": digest, "left_out": {}}}
    weights = {entry["name"]: entry["sha256"] for entry in protocol["weights"]}
    for directory in (trained, plain):
        data = (directory / "model.safetensors").read_bytes()
        assert weights[str(directory)] == hashlib.sha256(data).hexdigest()
    assert protocol["samples_per_prompt"] == 4 and protocol["seed"] == 1 and protocol["threshold"] == 0.5
    assert protocol["sampling"] == {
        "max_new_tokens": 5,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert protocol["intervals"]["resamples"] == 2000
    assert "NoA" in json.dumps(protocol["rewards"]) and "NLL" in protocol["perplexity"]
    assert {"date", "python", "device", "threads"} <= protocol.keys() and "transformers" in protocol["versions"]
    assert protocol["guidance_from"] is None and protocol["human_column"] is None and protocol["corpus"] is None


def test_a_plain_model_has_one_row_and_one_more_beside_a_reference(plain):
    alone = evaluate(plain, load_prompts(PROMPTS), Scorer(few_b), short())
    assert [row.name for row in alone.rows] == ["model"]
    assert alone.protocol["reference"] is None and alone.protocol["perplexity_model"] == str(plain)
    compared = evaluate(plain, load_prompts(PROMPTS), Scorer(few_b), short(reference=str(plain)))
    assert [row.name for row in compared.rows] == ["reference", "model"]
    assert compared.rows[0].figures == pytest.approx(compared.rows[1].figures, nan_ok=True)


def test_any_quantile_can_be_requested_without_a_reference(trained):
    options = short(reference=NO_REFERENCE, quantiles=(0, 1, "2"))
    evaluation = evaluate(trained, load_prompts(PROMPTS), Scorer(few_b), options)
    assert [(row.name, row.quantile) for row in evaluation.rows] == [("0", 0), ("1", 1), ("2", 2)]
    assert evaluation.protocol["reference"] is None and evaluation.protocol["perplexity_model"] == str(trained)


def test_a_reference_that_cannot_be_loaded_is_an_error_with_the_remedy(trained, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match=f"^reference '{gone}' .*--reference"):
        evaluate(trained, load_prompts(PROMPTS), Scorer(few_b), short(reference=gone))


def test_a_quantile_that_does_not_exist_is_an_error_before_sampling(trained):
    calls = []
    with pytest.raises(UserError, match="quantile '7'"):
        evaluate(
            trained,
            load_prompts(PROMPTS),
            Scorer(few_b),
            short(quantiles=("best", "7")),
            notify=lambda *counts: calls.append(counts),
        )
    assert not calls


def test_progress_is_reported_after_each_batch_of_each_row(trained):
    calls: list[tuple[str, int, int]] = []
    evaluate(
        trained,
        load_prompts(PROMPTS),
        Scorer(few_b),
        short(batch_size=4),
        notify=lambda *counts: calls.append(counts),
    )
    assert calls == [(name, finished, 6) for name in ("reference", "best", "worst") for finished in (4, 6)]


def test_each_set_of_prompts_has_its_own_rows_and_progress(plain):
    calls = []
    sets = {"in": load_prompts(PROMPTS), "out": load_prompts(["g h"])}
    evaluation = evaluate(plain, sets, Scorer(few_b), short(), notify=lambda *counts: calls.append(counts))
    assert [(row.prompts_name, row.rewards.shape) for row in evaluation.rows] == [("in", (3, 2)), ("out", (1, 2))]
    assert calls == [("in: model", 6, 6), ("out: model", 2, 2)]
    assert evaluation.protocol["prompts"]["out"]["count"] == 1 and evaluation.prompts.prompts == PROMPTS
    alone = evaluate(plain, sets["out"], Scorer(few_b), short())
    assert alone.rows[0].completions == evaluation.rows_of("out")[0].completions


def test_each_guidance_scale_has_a_row_on_the_best_quantile(trained):
    options = short(samples=4, seed=1, guidance_scales=(1, 0, 4.5))
    evaluation = evaluate(trained, load_prompts(PROMPTS), Scorer(NoA()), options)
    names = ["reference", "best", "worst", "best γ=0", "best γ=4.5"]
    assert [(row.name, row.guidance_scale) for row in evaluation.rows] == list(
        zip(names, [1, 1, 1, 0, 4.5], strict=True)
    )
    policy = QuarkGenerator.from_pretrained(trained)
    assert evaluation.rows[4].completions == policy.generate(PROMPTS, guidance_scale=4.5, **GENERATE)
    assert (
        evaluation.rows[3].completions == evaluation.rows[2].completions
    )  # γ = 0 is the contrast, the worst quantile.
    assert evaluation.protocol["guidance_from"] == "worst"
    options = short(samples=1, quantiles=(1,), guidance_scales=(1,))
    unguided = evaluate(trained, load_prompts(PROMPTS), Scorer(NoA()), options)
    assert [row.name for row in unguided.rows] == ["reference", "1", "best"]


def test_guidance_from_the_reference_uses_the_reference_of_the_evaluation(trained, tmp_path):
    other = tmp_path / "other"  # Not the reference that quark.json names.
    tiny_model("gpt2", WORDS, seed=5).save_pretrained(other)
    WORDS.save_pretrained(other)
    options = short(samples=4, seed=1, guidance_scales=(0,), guidance_from="reference", reference=str(other))
    rows = evaluate(trained, load_prompts(PROMPTS), Scorer(NoA()), options).rows
    assert rows[0].completions == QuarkGenerator.from_pretrained(other).generate(PROMPTS, **GENERATE)
    assert rows[3].completions == rows[0].completions  # γ = 0 is the contrast, the reference.


def test_guidance_from_the_reference_without_a_row_for_it_uses_the_one_in_quark_json(trained, plain):
    options = short(
        samples=4, seed=1, guidance_scales=(0,), guidance_from="reference", reference=NO_REFERENCE, quantiles=("best",)
    )
    rows = evaluate(trained, load_prompts(PROMPTS), Scorer(NoA()), options).rows
    assert [row.name for row in rows] == ["best", "best γ=0"]
    assert rows[1].completions == QuarkGenerator.from_pretrained(plain).generate(PROMPTS, **GENERATE)


def test_guidance_without_quantiles_or_from_an_impossible_quantile_is_an_error(plain, trained):
    with pytest.raises(UserError, match="guidance_scales"):
        evaluate(plain, load_prompts(PROMPTS), Scorer(few_b), short(guidance_scales=(2,)))
    with pytest.raises(UserError, match="quantile '9'"):
        evaluate(trained, load_prompts(PROMPTS), Scorer(few_b), short(guidance_scales=(2,), guidance_from="9"))
    for best in ("best", 2, "2"):
        with pytest.raises(UserError, match=f"guidance_from {best!r}: must differ from quantile 'best'"):
            evaluate(trained, load_prompts(PROMPTS), Scorer(few_b), short(guidance_scales=(1, 2), guidance_from=best))


@pytest.mark.parametrize(
    ("options", "has_curve"),
    [
        ({}, False),
        ({"quantiles": ("best", "worst", 2)}, False),  # Best is 2.
        ({"quantiles": ("best", "worst", 1)}, True),
        ({"quantiles": ("all",)}, True),
        ({"guidance_scales": (1,)}, False),
        ({"guidance_scales": (2,)}, True),
        ({"guidance_scales": (2,), "quantiles": ("worst",)}, False),
        ({"guidance_scales": (2, 3), "quantiles": ("worst",)}, True),
    ],
    ids=str,
)
def test_an_evaluation_that_needs_a_curve_fails_before_sampling_where_its_rows_make_none(trained, options, has_curve):
    def sampled(*progress):
        raise InterruptedError

    with pytest.raises(InterruptedError if has_curve else UserError, match=None if has_curve else "^plot: there is no"):
        evaluate(trained, load_prompts(PROMPTS), Scorer(few_b), short(**options), needs_curve=True, notify=sampled)


def test_a_model_without_quantiles_has_no_curve(plain):
    with pytest.raises(UserError, match="plot: there is no curve"):
        evaluate(plain, load_prompts(PROMPTS), Scorer(few_b), short(quantiles=("all",)), needs_curve=True)


def test_greedy_decoding_samples_one_completion_per_prompt(plain):
    evaluation = evaluate(plain, load_prompts(PROMPTS), Scorer(few_b), short(greedy=True, samples=25))
    assert evaluation.rows[0].rewards.shape == (3, 1) and evaluation.protocol["samples_per_prompt"] == 1


def test_any_model_can_compute_perplexity_but_a_reference_needs_the_same_vocabulary(plain, tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("gpt2", tokenizer, seed=3).save_pretrained(tmp_path / "bytes")
    tokenizer.save_pretrained(tmp_path / "bytes")
    options = short(perplexity_model=str(tmp_path / "bytes"))
    evaluation = evaluate(plain, load_prompts(PROMPTS), Scorer(few_b), options)
    judge = QuarkGenerator.from_pretrained(tmp_path / "bytes")
    values = []
    for prompt, texts in zip(PROMPTS, evaluation.rows[0].completions, strict=True):
        for text in filter(None, texts):
            head, both = (tokenizer(part)["input_ids"] for part in (prompt, prompt + text))
            values.append(np.exp(nll_by_hand(judge.model, head, both[len(head) :]) / (len(both) - len(head))))
    assert evaluation.rows[0].figures["perplexity"] == pytest.approx(np.mean(values), rel=1e-4)
    assert "tokenised anew" in evaluation.protocol["perplexity"]
    assert [entry["name"] for entry in evaluation.protocol["weights"]] == [str(plain), str(tmp_path / "bytes")]
    with pytest.raises(UserError, match=f"reference '{tmp_path / 'bytes'}'.*vocabulary"):
        evaluate(plain, load_prompts(PROMPTS), Scorer(few_b), short(reference=str(tmp_path / "bytes")))


def test_bf16_is_recorded_as_the_dtype_of_the_weights(plain):
    evaluation = evaluate(plain, load_prompts(PROMPTS), Scorer(few_b), short(bf16=True))
    assert [entry["dtype"] for entry in evaluation.protocol["weights"]] == ["bfloat16"]
    assert np.isfinite(evaluation.rows[0].figures["perplexity"])


def test_a_prompt_that_is_too_long_is_an_error_or_skipped_and_counted(trained):
    # 128 tokens of context, minus 5 of the completion and one reward token, leave 122.
    prompts = load_prompts([*PROMPTS, "a " * 123])
    with pytest.raises(UserError, match="124 tokens"):
        evaluate(trained, prompts, Scorer(few_b), short())
    evaluation = evaluate(trained, prompts, Scorer(few_b), short(skip_bad_prompts=True))
    digest = hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()
    assert evaluation.protocol["prompts"]["prompts"] == {"count": 3, "sha256": digest, "left_out": {"too long": 1}}
    longest = evaluate(trained, load_prompts(["a " * 122]), Scorer(few_b), short())
    assert longest.rows[0].rewards.shape == (1, 2)


def test_mauve_compares_completions_with_a_column_of_the_prompts(plain):
    pytest.importorskip("mauve")
    rows = [{"prompt": f"a {word}", "human": {"text": f" {word} c d"}} for word in "abcdefgh" * 4]
    rows[3]["human"] = None
    options = short(min_new_tokens=5, human_column="human")
    evaluation = evaluate(plain, load_prompts(rows), Scorer(few_b), options)
    row = evaluation.rows[0]
    low, high = row.intervals["MAUVE"]
    assert 0 <= low <= row.figures["MAUVE"] <= high <= 1
    assert row.left_out["MAUVE_no_text"] == 1 and evaluation.protocol["versions"]["mauve-text"]
    with pytest.raises(UserError, match=r"human_column 'people'.*human"):
        evaluate(plain, load_prompts(rows), Scorer(few_b), short(human_column="people"))


def test_a_text_that_starts_with_a_bos_of_chats_is_a_bad_prompt(tmp_path):
    """The tokenizer of a trained model puts the reward tokens before it, and training after it."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    conditioning, extended, model = add_reward_tokens(tokenizer, 2)
    model.save_pretrained(tmp_path)
    conditioning.steer_tokenizer(extended).save_pretrained(tmp_path)
    conditioning.save(tmp_path)
    prompts = load_prompts(["a <s>", "<s> b", "c"])
    options = short(skip_bad_prompts=True, reference=NO_REFERENCE)
    evaluation = evaluate(tmp_path, prompts, Scorer(few_b), options)
    assert evaluation.prompt_sets["prompts"].skipped == {"starts with BOS": 1}
    error_message(
        lambda: evaluate(tmp_path, prompts, Scorer(few_b), short(reference=NO_REFERENCE)),
        "row 2 of the list: the text starts with BOS",
    )


def test_an_evaluation_adds_a_system_prompt_and_drops_the_last_turn(tmp_path):
    tokenizer = chat_tokenizer("SmolLM 2")
    tiny_model("gpt2", tokenizer, max_position_embeddings=300).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = load_prompts([{"messages": CHATS["one question"]}, {"messages": CHATS["an unfinished answer"]}])
    error_message(lambda: evaluate(tmp_path, prompts, Scorer(few_b), short()), "ends with a message of the assistant")
    options = short(system_prompt="Be brief.", last_assistant_turn="drop")
    evaluation = evaluate(tmp_path, prompts, Scorer("brevity"), options)
    first, second = evaluation.prompt_sets["prompts"].ids
    assert first == second and "system\nBe brief.<" in tokenizer.decode(first)
