"""Evaluation: figures that can be checked by hand, rows to compare, and the protocol beside the numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from quarkrl import QuarkConfig, QuarkTrainer, metrics
from quarkrl.errors import UserError
from quarkrl.evaluation import completion_nll, evaluate
from quarkrl.generation import QuarkGenerator, Sampling, complete
from quarkrl.prompts import load_prompts
from quarkrl.rewards import Scorer

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
        assert figures["a-ness share"] == ((1 - rewards) >= 0.5).mean()
        for n in (1, 2, 3):
            assert figures[f"dist-{n}"] == metrics.distinct(row.completions, n)

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


def nll_by_hand(model, prompt: list[int], completion: list[int]) -> float:
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return -sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(completion))


@pytest.mark.parametrize("batch_size", [1, 2, 128])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "opt"])
def test_a_completions_nll_is_its_own_whatever_stands_beside_it(architecture, batch_size):
    model = tiny_model(architecture, TOKENIZER)
    prompts = [[0, 1], [2], [3, 4, 5, 6, 7], [1], [0]]
    completions = [[5], [1, 2, 3, 4, 5, 6], [0, 0], [], [EOS_ID]]
    expected = [nll_by_hand(model, p, c) for p, c in zip(prompts, completions, strict=True)]
    assert expected[3] == 0
    assert completion_nll(model, prompts, completions, batch_size) == pytest.approx(expected, rel=1e-4)


def test_the_same_seed_gives_the_same_numbers_whatever_the_batch(found, trained):
    prompts, scorer = load_prompts(TEXTS), Scorer(NoA())
    again = evaluate(trained, prompts, scorer, sampling=SAMPLING, samples=4, seed=1, batch_size=5)
    other = evaluate(trained, prompts, scorer, sampling=SAMPLING, samples=4, seed=2)
    for a, b in zip(found.rows, again.rows, strict=True):
        assert a.completions == b.completions
        assert a.figures == pytest.approx(b.figures)
    assert other.rows[1].completions != found.rows[1].completions


def test_the_protocol_says_all_that_the_numbers_depend_on(found, trained):
    protocol = found.protocol
    assert protocol["model"] == str(trained)
    assert protocol["prompts"] == {"count": 3, "left_out": {}}
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
    assert {"date", "versions", "python"} <= protocol.keys() and "transformers" in protocol["versions"]


def test_completions_without_a_reward_are_left_out_and_counted(trained):
    found = evaluate(trained, load_prompts(TEXTS), Scorer(first_missing), sampling=SAMPLING, samples=2)
    for row in found.rows:
        assert row.left_out["unscored"] == 1
        assert row.figures["reward"] == 0.5


def test_no_reward_at_all_is_an_error(base):
    with pytest.raises(UserError, match="none of the 6 completions of 'model' has a reward"):
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
    with pytest.raises(UserError, match="quantile '7': want best, worst or a number from 0"):
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


def test_what_is_saved_is_json_with_figures_protocol_and_completions(found, tmp_path):
    target = tmp_path / "new" / "results.json"
    found.save(target)
    found.save(target)  # Again, over it.
    assert [path.name for path in target.parent.iterdir()] == ["results.json"]
    saved = json.loads(target.read_text(encoding="utf-8"))
    assert saved["protocol"] == found.protocol
    assert [entry["name"] for entry in saved["results"]] == ["reference", "best", "worst"]
    assert saved["results"][1]["figures"] == found.rows[1].figures
    assert saved["completions"][0] == {"prompt": "a b", **{row.name: row.completions[0] for row in found.rows}}


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
