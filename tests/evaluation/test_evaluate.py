"""Evaluation: figures that can be checked by hand, rows to compare, and the protocol beside the numbers."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer

from quarkrl import QuarkConfig, QuarkTrainer, metrics
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.evaluate import evaluate
from quarkrl.rewards import Scorer
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling

TOKENIZER = tiny_tokenizer(words=[*"abcdefgh"])  # a to h are 0 to 7, <unk> 8, <eos> 9.
EOS_ID = 9
TEXTS = ["a b", "c", "d e f"]
SAMPLING = Sampling(max_new_tokens=5, top_p=0.9)


class NoA:
    """1 - the share of "a", which is not wanted."""

    unwanted = "a-ness"

    def __call__(self, completions, **_):
        return [1 - text.split().count("a") / max(len(text.split()), 1) for text in completions]


def few_b(completions, **_):
    return [-float(text.split().count("b")) for text in completions]


def first_missing(completions, **_):
    return [None, *[0.5] * (len(completions) - 1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A plain model."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model("gpt2", TOKENIZER).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    """What Quark made of it."""
    directory = tmp_path_factory.mktemp("run")
    config = QuarkConfig(
        output_dir=str(directory),
        num_quantiles=3,
        num_iterations=1,
        steps_per_iteration=5,
        per_device_train_batch_size=8,
        max_completion_length=5,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = QuarkTrainer(str(base), NoA(), config, TEXTS * 4)
    trainer.train()
    return trainer.save_final()


@pytest.fixture(scope="module")
def found(trained):
    return evaluate(trained, load_prompts(TEXTS), Scorer(NoA()), sampling=SAMPLING, samples=4, seed=1)


def test_a_trained_model_stands_beside_its_reference(found, base):
    assert [row.name for row in found.rows] == ["reference", "best", "worst"]
    assert found.protocol["reference"] == found.protocol["perplexity_model"] == str(base)
    for row in found.rows:
        assert row.rewards.shape == (3, 4)
        assert [len(texts) for texts in row.completions] == [4, 4, 4]
        assert row.figures.keys() == found.rows[0].figures.keys()


def test_each_row_is_what_its_quantile_samples(found, trained, base):
    plain, policy = QuarkGenerator.from_pretrained(base), QuarkGenerator.from_pretrained(trained)
    options = {"num_return_sequences": 4, "seed": 1, "max_new_tokens": 5, "top_p": 0.9}
    assert found.rows[0].completions == plain.generate(TEXTS, **options)
    assert found.rows[1].completions == policy.generate(TEXTS, quantile="best", **options)
    assert found.rows[2].completions == policy.generate(TEXTS, quantile="worst", **options)


def test_the_figures_are_the_metrics_of_the_completions(found, base):
    reference = QuarkGenerator.from_pretrained(base)
    for row in found.rows:
        rewards = np.array([NoA()(texts) for texts in row.completions])
        assert row.rewards.tolist() == rewards.tolist()
        figures = dict(row.figures)
        assert figures["reward"] == pytest.approx(rewards.mean())
        assert figures["a-ness"] == pytest.approx(1 - rewards.mean())
        assert figures["average maximum a-ness"] == pytest.approx((1 - rewards.min(axis=1)).mean())
        assert figures["a-ness probability"] == ((1 - rewards) >= 0.5).any(axis=1).mean()
        assert figures["a-ness share"] == pytest.approx(((1 - rewards) >= 0.5).mean())
        for n in (1, 2, 3):
            assert figures[f"dist-{n}"] == metrics.distinct(row.completions, n)
        assert row.intervals.keys() == figures.keys()
        for name, (low, high) in row.intervals.items():
            assert low <= figures[name] <= high or np.isnan(figures[name])

    # The reference's own completions again, for their ids; perplexity is of their words, without EOS.
    ids = complete(
        reference.model,
        [row for row in reference.encode(TEXTS) for _ in range(4)],
        SAMPLING,
        end_ids=[EOS_ID],
        vocab_size=10,
        seed=1,
    )
    assert found.rows[0].figures["completion length"] == np.mean([len(row) for row in ids])
    prompts = [row for row in reference.encode(TEXTS) for _ in range(4)]
    words = [[i for i in row if i != EOS_ID] for row in ids]
    values = [np.exp(nll_by_hand(reference.model, p, w) / len(w)) for p, w in zip(prompts, words, strict=True) if w]
    assert found.rows[0].figures["perplexity"] == pytest.approx(np.mean(values), rel=1e-4)
    assert found.rows[0].left_out["perplexity_empty"] == sum(not row for row in words)
    assert found.rows[0].figures["diversity"] == pytest.approx(
        np.nanmean([metrics.diversity(row) for row in words]), nan_ok=True
    )
    assert found.rows[0].left_out["diversity_short"] == sum(len(row) < 4 for row in words)


def nll_by_hand(model, prompt: list[int], completion: list[int]) -> float:
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return -sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(completion))


def test_the_same_seed_gives_the_same_numbers_whatever_the_batch(found, trained):
    prompts, scorer = load_prompts(TEXTS), Scorer(NoA())
    again = evaluate(trained, prompts, scorer, sampling=SAMPLING, samples=4, seed=1, batch_size=5)
    other = evaluate(trained, prompts, scorer, sampling=SAMPLING, samples=4, seed=2)
    for a, b in zip(found.rows, again.rows, strict=True):
        assert a.completions == b.completions
        assert a.figures == pytest.approx(b.figures)
    assert other.rows[1].completions != found.rows[1].completions


def test_the_protocol_says_all_that_the_numbers_depend_on(found, trained, base):
    protocol = found.protocol
    assert protocol["model"] == str(trained)
    digest = hashlib.sha256(json.dumps(TEXTS).encode()).hexdigest()
    assert protocol["prompts"] == {"prompts": {"count": 3, "sha256": digest, "left_out": {}}}
    weights = {entry["name"]: entry["sha256"] for entry in protocol["weights"]}
    for directory in (trained, base):
        data = (directory / "model.safetensors").read_bytes()
        assert weights[str(directory)] == hashlib.sha256(data).hexdigest()
    assert protocol["samples_per_prompt"] == 4 and protocol["seed"] == 1
    assert protocol["sampling"] == {
        "max_new_tokens": 5,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert "NoA" in json.dumps(protocol["rewards"])
    assert protocol["threshold"] == 0.5 and "NLL" in protocol["perplexity"]
    assert {"date", "versions", "python", "device", "threads"} <= protocol.keys() and "transformers" in protocol[
        "versions"
    ]


def test_completions_without_a_reward_are_left_out_and_counted(trained):
    found = evaluate(trained, load_prompts(TEXTS), Scorer(first_missing), sampling=SAMPLING, samples=2)
    for row in found.rows:
        assert row.left_out["unscored"] == 1
        assert row.figures["reward"] == 0.5


def test_no_reward_at_all_is_an_error(base):
    with pytest.raises(UserError, match="model: none of the 6 completions has a reward"):
        evaluate(base, load_prompts(TEXTS), Scorer(lambda completions: [None] * len(completions)), samples=2)


def test_a_plain_model_has_one_row(base):
    found = evaluate(base, load_prompts(TEXTS), Scorer(few_b), sampling=SAMPLING, samples=2)
    assert [row.name for row in found.rows] == ["model"]
    assert found.protocol["reference"] is None and found.protocol["perplexity_model"] == str(base)
    assert "a-ness" not in found.rows[0].figures  # few_b is no probability of something unwanted.
    beside = evaluate(base, load_prompts(TEXTS), Scorer(few_b), sampling=SAMPLING, samples=2, reference=base)
    assert [row.name for row in beside.rows] == ["reference", "model"]
    assert beside.rows[0].figures == beside.rows[1].figures


def test_one_can_go_without_the_reference_and_ask_for_any_quantile(trained):
    found = evaluate(
        trained,
        load_prompts(TEXTS),
        Scorer(few_b),
        sampling=SAMPLING,
        samples=2,
        reference="none",
        quantiles=[0, 1, "2"],
    )
    assert [row.name for row in found.rows] == ["0", "1", "2"]
    assert found.protocol["reference"] is None and found.protocol["perplexity_model"] == str(trained)


def test_a_reference_that_has_gone_is_an_error_with_the_way_out(trained, tmp_path):
    with pytest.raises(UserError, match=r"the reference of .* is '.*gone', which cannot be loaded .*--reference none"):
        evaluate(trained, load_prompts(TEXTS), Scorer(few_b), reference=tmp_path / "gone")


def test_an_unknown_quantile_is_an_error_before_anything_is_sampled(trained):
    done = []
    with pytest.raises(UserError, match="quantile '7': must be"):
        evaluate(
            trained, load_prompts(TEXTS), Scorer(few_b), quantiles=["best", "7"], notify=lambda *what: done.append(what)
        )
    assert not done


def test_progress_is_told_row_by_row(trained):
    told: list[tuple[str, int, int]] = []
    evaluate(
        trained,
        load_prompts(TEXTS),
        Scorer(few_b),
        sampling=SAMPLING,
        samples=2,
        batch_size=4,
        notify=lambda *what: told.append(what),
    )
    assert told == [(name, done, 6) for name in ("reference", "best", "worst") for done in (4, 6)]


def test_columns_reach_the_reward_once_for_each_sample(base):
    seen: list[str] = []

    def reward(prompts, completions, topic):
        assert prompts == ["a", "a", "b", "b"]
        seen.extend(topic)
        return [0.0] * len(completions)

    prompts = load_prompts([{"prompt": "a", "topic": "x"}, {"prompt": "b", "topic": "y"}])
    evaluate(base, prompts, Scorer(reward), sampling=SAMPLING, samples=2)
    assert seen == ["x", "x", "y", "y"]


def test_what_is_saved_is_figures_and_protocol_as_json_and_completions_as_parquet(found, tmp_path):
    target = tmp_path / "new" / "results.json"
    found.save(target)
    found.save(target)  # Again, over it.
    assert sorted(path.name for path in target.parent.iterdir()) == ["results.json", "results.parquet"]
    saved = json.loads(target.read_text(encoding="utf-8"))
    assert saved["protocol"] == found.protocol
    assert [entry["name"] for entry in saved["results"]] == ["reference", "best", "worst"]
    assert saved["results"][1]["figures"] == found.rows[1].figures
    assert saved["results"][1]["intervals"]["reward"] == list(found.rows[1].intervals["reward"])
    assert saved["completions"] == "results.parquet" and "corpus" in saved
    lines = pq.read_table(target.parent / "results.parquet").to_pylist()
    assert len(lines) == 3 * 3 * 4
    row = found.rows[2]
    assert lines[-1] == {
        "prompts": "prompts",
        "prompt_number": 2,
        "prompt": "d e f",
        "row": "worst",
        "quantile": 0,
        "guidance_scale": 1.0,
        "sample": 3,
        "completion": row.completions[2][3],
        "perplexity": None if np.isnan(row.perplexities[2, 3]) else row.perplexities[2, 3],
        "reward": row.rewards[2, 3],
    }
    assert lines[0]["quantile"] is None and lines[0]["row"] == "reference"


@pytest.mark.parametrize(("name", "match"), [("", "is a directory"), ("x.parquet", "want a name that ends in .json")])
def test_a_place_where_results_cannot_go_is_an_error(found, tmp_path, name, match):
    with pytest.raises(UserError, match=match):
        found.save(tmp_path / name)


def test_a_figure_of_nothing_is_null(base, tmp_path):
    """A model that says nothing has no perplexity; NaN would not be JSON."""
    model = tiny_model("gpt2", TOKENIZER)
    model.generation_config.eos_token_id = list(range(10))  # Whatever comes ends it.
    model.save_pretrained(tmp_path / "silent")
    TOKENIZER.save_pretrained(tmp_path / "silent")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = evaluate(tmp_path / "silent", load_prompts(TEXTS), Scorer(few_b), sampling=SAMPLING, samples=2)
    assert found.rows[0].left_out["perplexity_empty"] == 6
    found.save(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text)["results"][0]["figures"]["perplexity"] is None


def test_a_second_run_gives_the_same_document_but_for_the_date(trained, tmp_path):
    """Every number, interval and completion, judges, corpus and guidance included."""
    for name in ("one", "two"):
        evaluation = evaluate(
            trained,
            {"in": load_prompts(TEXTS), "out": load_prompts(["g h", "a"])},
            Scorer(NoA()),
            judges=[Scorer(few_b)],
            quantiles=["all"],
            guidance_scales=[1, 3],
            corpus=load_prompts(["a b c d", "e f g"]),
            sampling=SAMPLING,
            samples=3,
            resamples=200,
        )
        evaluation.save(tmp_path / f"{name}.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    for document in (one, two):
        document["protocol"].pop("date")
        document.pop("completions")
    assert one == two
    assert pq.read_table(tmp_path / "one.parquet") == pq.read_table(tmp_path / "two.parquet")
    names = ["reference", "0", "1", "2", "best γ=3"]
    assert [(entry["prompts"], entry["name"]) for entry in one["results"]] == [
        (prompts, name) for prompts in ("in", "out") for name in names
    ]
    assert [entry["name"] for entry in one["corpus"]] == names[:-1]
    assert [entry["quantile"] for entry in one["results"][:5]] == [None, 0, 1, 2, 2]


def test_several_sets_of_prompts_have_rows_and_progress_of_their_own(base):
    told = []
    sets = {"in": load_prompts(TEXTS), "out": load_prompts(["g h"])}
    found = evaluate(base, sets, Scorer(few_b), sampling=SAMPLING, samples=2, notify=lambda *what: told.append(what))
    assert [(row.prompts_name, row.rewards.shape) for row in found.rows] == [("in", (3, 2)), ("out", (1, 2))]
    assert told == [("in: model", 6, 6), ("out: model", 2, 2)]
    assert found.protocol["prompts"]["out"]["count"] == 1 and found.prompts.prompts == TEXTS
    alone = evaluate(base, sets["out"], Scorer(few_b), sampling=SAMPLING, samples=2)
    assert alone.rows[0].completions == found.of("out")[0].completions


def test_judges_stand_beside_the_reward(base):
    """A policy that only fools its own reward shows by what others say."""

    class Happy:
        """P(happy): has an "e"."""

        name, wanted = "happy", "happy"

        def __call__(self, completions, **_):
            return [float("e" in text) for text in completions]

    class Mild(Happy):
        name, wanted_from = "mild", 0.0

    judges = [Scorer(NoA()), Scorer(Happy()), Scorer(Mild()), Scorer(few_b), Scorer(few_b)]
    found = evaluate(base, load_prompts(TEXTS), Scorer(few_b), judges=judges, sampling=SAMPLING, samples=4)
    row = found.rows[0]
    happy = np.array([["e" in text for text in texts] for texts in row.completions])
    assert 0 < happy.mean() < 1
    assert row.figures["happy: happy share"] == pytest.approx(happy.mean())
    assert row.figures["happy: score"] == pytest.approx(happy.mean())
    assert row.figures["mild: happy share"] == 1
    bad = np.array([[1 - score for score in NoA()(texts)] for texts in row.completions])
    assert row.figures["NoA: average maximum a-ness"] == pytest.approx(bad.max(axis=1).mean())
    assert row.figures["NoA: a-ness probability"] == (bad >= 0.5).any(axis=1).mean()
    assert "NoA: score" not in row.figures  # 1 - a-ness, which stands there.
    assert row.figures["few_b: score"] == row.figures["few_b-2: score"] == row.figures["reward"]
    assert row.scores["few_b"].tolist() == row.rewards.tolist()
    assert found.protocol["judges"]["happy"][0]["name"] == "happy"


def test_each_of_several_rewards_is_reported(base):
    found = evaluate(base, load_prompts(TEXTS), Scorer([NoA(), few_b]), sampling=SAMPLING, samples=3)
    figures = found.rows[0].figures
    assert figures["reward: NoA"] + figures["reward: few_b"] == pytest.approx(figures["reward"])


def test_the_threshold_can_be_set(base):
    class Half:
        unwanted = "halfness"

        def __call__(self, completions, **_):
            return [0.5] * len(completions)

    for threshold, expected in ((0.5, 1.0), (0.51, 0.0)):
        found = evaluate(
            base, load_prompts(TEXTS), Scorer(Half()), sampling=SAMPLING, samples=2, threshold=threshold, resamples=100
        )
        assert found.rows[0].figures["halfness probability"] == expected
        assert found.rows[0].figures["halfness share"] == expected
        assert found.protocol["threshold"] == threshold


def test_guidance_scales_are_rows_on_the_best_token(trained):
    found = evaluate(
        trained,
        load_prompts(TEXTS),
        Scorer(NoA()),
        guidance_scales=[1, 0, 4.5],
        sampling=SAMPLING,
        samples=4,
        seed=1,
    )
    assert [row.name for row in found.rows] == ["reference", "best", "worst", "best γ=0", "best γ=4.5"]
    assert [row.guidance_scale for row in found.rows] == [1, 1, 1, 0, 4.5]
    policy = QuarkGenerator.from_pretrained(trained)
    options = {"num_return_sequences": 4, "seed": 1, "max_new_tokens": 5, "top_p": 0.9}
    assert found.rows[4].completions == policy.generate(TEXTS, guidance_scale=4.5, **options)
    assert found.rows[3].completions == found.rows[2].completions  # γ = 0 is the contrast, the worst token.
    only = evaluate(trained, load_prompts(TEXTS), Scorer(NoA()), quantiles=[1], guidance_scales=[1], samples=1)
    assert [row.name for row in only.rows] == ["reference", "1", "best"]


def test_guidance_of_a_plain_model_or_of_an_impossible_scale_is_an_error(base, trained):
    with pytest.raises(UserError, match="was not trained by Quark"):
        evaluate(base, load_prompts(TEXTS), Scorer(few_b), guidance_scales=[2])
    with pytest.raises(UserError, match=r"guidance_scale -1"):
        evaluate(trained, load_prompts(TEXTS), Scorer(few_b), guidance_scales=[-1])
    with pytest.raises(UserError, match="quantile '9'"):
        evaluate(trained, load_prompts(TEXTS), Scorer(few_b), guidance_scales=[2], guidance_from="9")


def test_greedy_decoding_has_one_completion_to_give(base):
    greedy = Sampling(max_new_tokens=5, do_sample=False)
    found = evaluate(base, load_prompts(TEXTS), Scorer(few_b), sampling=greedy)
    assert found.rows[0].rewards.shape == (3, 1) and found.protocol["samples_per_prompt"] == 1


def test_the_same_completion_of_the_same_prompt_is_scored_once(base):
    seen = []

    def reward(prompts, completions):
        seen.append(list(zip(prompts, completions, strict=True)))
        return [float(len(text)) for text in completions]

    found = evaluate(
        base, load_prompts(["a", "a", "b"]), Scorer(reward), sampling=Sampling(max_new_tokens=1), samples=30
    )
    (pairs,) = seen
    lengths = [[float(len(text)) for text in texts] for texts in found.rows[0].completions]
    assert found.rows[0].rewards.tolist() == lengths
    # Ten tokens there are, and three prompts, two of them alike in text but not in place.
    assert len(pairs) <= 30 and set(pairs) == {
        (prompt, text) for prompt, texts in zip("aab", found.rows[0].completions, strict=True) for text in texts
    }


def test_perplexity_can_be_any_models(base, tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("gpt2", tokenizer, seed=3).save_pretrained(tmp_path / "bytes")
    tokenizer.save_pretrained(tmp_path / "bytes")
    found = evaluate(
        base, load_prompts(TEXTS), Scorer(few_b), sampling=SAMPLING, samples=2, perplexity_model=tmp_path / "bytes"
    )
    judge = QuarkGenerator.from_pretrained(tmp_path / "bytes")
    values = []
    for prompt, texts in zip(TEXTS, found.rows[0].completions, strict=True):
        for text in filter(None, texts):
            head, both = (tokenizer(part)["input_ids"] for part in (prompt, prompt + text))
            values.append(np.exp(nll_by_hand(judge.model, head, both[len(head) :]) / (len(both) - len(head))))
    assert found.rows[0].figures["perplexity"] == pytest.approx(np.mean(values), rel=1e-4)
    assert "tokenised anew" in found.protocol["perplexity"]
    assert [entry["name"] for entry in found.protocol["weights"]] == [str(base), str(tmp_path / "bytes")]
    with pytest.raises(UserError, match="has other tokens"):
        evaluate(base, load_prompts(TEXTS), Scorer(few_b), reference=tmp_path / "bytes")


def test_bf16_is_on_record(base):
    found = evaluate(base, load_prompts(TEXTS), Scorer(few_b), sampling=SAMPLING, samples=1, dtype="bfloat16")
    assert [entry["dtype"] for entry in found.protocol["weights"]] == ["bfloat16"]
    assert np.isfinite(found.rows[0].figures["perplexity"])


def test_prompts_too_long_are_an_error_or_left_out_and_counted(trained):
    prompts = load_prompts([*TEXTS, "a " * 123])  # 128 tokens of context, less 5 of the completion and a reward token.
    with pytest.raises(UserError, match="124 tokens, limit 123"):
        evaluate(trained, prompts, Scorer(few_b), sampling=SAMPLING, samples=1)
    found = evaluate(trained, prompts, Scorer(few_b), sampling=SAMPLING, samples=1, skip_bad=True)
    digest = hashlib.sha256(json.dumps(TEXTS).encode()).hexdigest()
    assert found.protocol["prompts"]["prompts"] == {"count": 3, "sha256": digest, "left_out": {"too long": 1}}
    longest = load_prompts(["a " * 122])
    assert evaluate(trained, longest, Scorer(few_b), sampling=SAMPLING, samples=1).rows[0].rewards.shape == (1, 1)


def test_mauve_compares_with_a_column_of_the_prompts(base):
    pytest.importorskip("mauve")
    rows = [{"prompt": f"a {word}", "human": {"text": f" {word} c d"}} for word in "abcdefgh" * 4]
    rows[3]["human"] = None
    sampling = Sampling(max_new_tokens=5, min_new_tokens=5)
    found = evaluate(base, load_prompts(rows), Scorer(few_b), sampling=sampling, samples=2, human_column="human")
    row = found.rows[0]
    low, high = row.intervals["MAUVE"]
    assert 0 <= low <= row.figures["MAUVE"] <= high <= 1
    assert row.left_out["MAUVE_no_text"] == 1 and found.protocol["versions"]["mauve-text"]
    with pytest.raises(UserError, match="no column 'people' for MAUVE: the columns are human"):
        evaluate(base, load_prompts(rows), Scorer(few_b), human_column="people")
