"""`quarkrl evaluate`: its files, its options, and one line for each mistake before anything is sampled."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.evaluation_helpers import save_plain_model, save_quantile_model
from helpers.tiny_models import SHARED, needs_shared
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from quarkrl.cli.evaluate import InputOptions, load_corpus, load_prompt_sets
from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.evaluation.options import EvaluationOptions

REWARDS = """
def few_a(completions, **_):
    return [1 - text.split().count("a") / 20 for text in completions]

def long(completions, **_):
    return [len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory with a model that has three quantiles, its reference, prompts and rewards."""
    directory = tmp_path_factory.mktemp("home")
    save_quantile_model(directory / "final", save_plain_model(directory / "base"))
    (directory / "prompts.txt").write_text("a b\nc\nd e f\nh g\n", encoding="utf-8")
    (directory / "other.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b c"}\n', encoding="utf-8")
    (directory / "corpus.jsonl").write_text('{"text": "a b c a"}\n{"text": ""}\n{"text": "d e"}\n', encoding="utf-8")
    (directory / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return directory


def run(capsys, home: Path, *arguments: str | Path) -> tuple[int, str, str]:
    command = ["evaluate", home / "final", "--reward", home / "rewards.py:few_a", "--samples", "2", *arguments]
    code = main([str(argument) for argument in command])
    return (code, *capsys.readouterr())


def test_all_options_together(home, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = run(
        capsys,
        home,
        *("--prompts", home / "prompts.txt", home / "other.jsonl", "--skip_bad_prompts", "--limit", "3"),
        *("--judges", home / "rewards.py:long", "--quantiles", "all", "--guidance_scales", "1", "2"),
        *("--corpus", home / "corpus.jsonl", "--resamples", "100", "--threshold", "0.4", "--bf16"),
        *("--perplexity_model", home / "base", "--plot", tmp_path / "curve.png"),
        *("--output", tmp_path / "results.json"),
    )
    assert code == 0, err
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    names = ["reference", "0", "1", "2", "best γ=2"]
    assert [(entry["prompts"], entry["name"]) for entry in saved["results"]] == [
        (prompts, name) for prompts in ("prompts", "other") for name in names
    ]
    other, read = (hashlib.sha256(text).hexdigest() for text in (b'["a", "b c"]', b'["a b c a", "d e"]'))
    assert saved["protocol"]["prompts"]["other"] == {"count": 2, "sha256": other, "left_out": {"empty prompt": 1}}
    assert saved["protocol"]["corpus"] == {"count": 2, "sha256": read, "left_out": {"empty prompt": 1}}
    assert saved["corpus"][0]["tokens"] == 4
    assert saved["protocol"]["threshold"] == 0.4 and saved["protocol"]["intervals"]["resamples"] == 100
    assert "long: score" in saved["results"][0]["figures"]
    lines = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert len(lines) == 5 * (3 + 2) * 2 and {line["prompts"] for line in lines} == {"prompts", "other"}
    assert "\nrequested" in out and "\nguidance" in out and "corpus: 2 texts" in out
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "results.parquet" in err and "curve.png" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "2"), "threshold 2.0: must be at least 0 and at most 1"),
        (("--plot", "curve.png"), "plot: there is no curve"),
        (("--plot", "curve.png", "--quantiles", "best", "worst", "2"), "plot: there is no curve"),
        (("--plot", "curve.png", "--guidance_scales", "1"), "plot: there is no curve"),
        (("--plot", "curve.gif", "--quantiles", "all"), "plot 'curve.gif'"),
        (("--output", "x.parquet"), "output 'x.parquet'"),
        (("--judges", "profanty"), "'profanity'"),
        (("--guidance_scales", "-2"), "guidance_scales -2.0: must be at least 0"),
        (("--guidance_scales", "2", "--guidance_from", "9"), "quantile '9'"),
        (("--quantiles", "best", "7"), "quantile '7'"),
        (("--human_column", "people"), "human_column 'people'"),
        (("--perplexity_model", "{home}/nowhere"), "nowhere"),
        (("--reference", "{home}/nowhere"), "reference '{home}/nowhere'"),
        (("--corpus", "{home}/nowhere.txt"), "nowhere.txt"),
        (("--resamples", "0"), "resamples 0: must be at least 1"),
        (("--limit", "0"), "limit 0: must be at least 1"),
        (("--prompt_tokens", "0"), "prompt_tokens 0: must be at least 1"),
        (("--samples", "two"), "samples 'two'"),
        (("--smaples", "2"), "--samples"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_before_anything_is_sampled(home, capsys, arguments, message):
    if "--human_column" in arguments:
        pytest.importorskip("mauve")
    code, out, err = run(
        capsys, home, "--prompts", home / "prompts.txt", *(argument.format(home=home) for argument in arguments)
    )
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message.format(home=home) in lines[0]


def test_several_models_are_rows_of_one_table(home, capsys, tmp_path):
    models = [str(home / "final"), str(home / "base")]
    options = ["--prompts", str(home / "prompts.txt"), "--reward", f"{home}/rewards.py:few_a", "--samples", "1"]
    assert main(["evaluate", *models, *options, "--output", str(tmp_path / "both.json")]) == 0
    saved = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))
    first = home.name
    names = ["reference", f"{first} best", f"{first} worst", "base model"]
    assert [row["name"] for row in saved["results"]] == names
    assert list(saved["protocol"]["models"]) == [first, "base"]
    assert "base model" in capsys.readouterr().out
    assert main(["evaluate", *models, *options, "--plot", "x.png"]) == 2
    assert "plot 'x.png': must be left out with several models" in capsys.readouterr().err


def test_the_reward_of_training_is_the_default(home, capsys, tmp_path):
    trained = tmp_path / "final"
    shutil.copytree(home / "final", trained)
    facts = json.loads((trained / "quark.json").read_text(encoding="utf-8"))
    for rewards, code, message in (
        ([{"name": "brevity", "weight": 1.0}], 0, "reward: brevity, as in training"),
        (
            [{"name": "few_a", "module": "rewards"}],
            2,
            "must be named again, because code that quark.json names is never run. Set --reward FILE.py:FUNCTION.",
        ),
    ):
        (trained / "quark.json").write_text(json.dumps({**facts, "rewards": rewards}), encoding="utf-8")
        assert main(["evaluate", str(trained), "--prompts", str(home / "prompts.txt"), "--samples", "1"]) == code
        assert message in capsys.readouterr().err


def test_a_function_of_the_users_own_is_the_default_in_the_directory_of_the_run(home, capsys, tmp_path, monkeypatch):
    shutil.copytree(home / "final", tmp_path / "run" / "final")
    facts = json.loads((tmp_path / "run/final/quark.json").read_text(encoding="utf-8"))
    facts["rewards"] = [{"name": "few_a", "module": "rewards", "qualname": "few_a"}]
    (tmp_path / "run/final/quark.json").write_text(json.dumps(facts), encoding="utf-8")
    (tmp_path / "run/config.yaml").write_text("reward: [rewards.py:few_a]\n", encoding="utf-8")
    options = ["--prompts", str(home / "prompts.txt"), "--samples", "1", "--resamples", "10"]
    monkeypatch.chdir(home)
    for model in ("run", "run/final"):
        assert main(["evaluate", str(tmp_path / model), *options]) == 0
        assert "reward: rewards.py:few_a, as in training" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "run", *options]) == 2
    assert capsys.readouterr().err.endswith("start the command where training was started, or set --reward.\n")


def test_a_set_has_the_name_of_its_file_and_a_repeated_name_has_a_number(home, tmp_path):
    files = ["x/a.txt", "x/a-3.txt", "y/a.txt", "z/a.txt"]
    for number, name in enumerate(files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{'abcd'[number]}\n", encoding="utf-8")
    inputs = InputOptions([str(tmp_path / name) for name in files])
    sets = load_prompt_sets(str(home / "final"), inputs, EvaluationOptions())
    assert {name: prompts.prompts for name, prompts in sets.items()} == {
        "a": ["a"],
        "a-3": ["b"],
        "a-2": ["c"],
        "a-4": ["d"],
    }


def test_a_corpus_is_a_column_of_texts_or_the_lines_of_a_file(tmp_path):
    (tmp_path / "a.csv").write_text("completion,other\nx,1\ny,2\n", encoding="utf-8")
    assert load_corpus(str(tmp_path / "a.csv"), None).prompts == ["x", "y"]
    (tmp_path / "b.txt").write_text("x\n\ny\n", encoding="utf-8")
    assert load_corpus(str(tmp_path / "b.txt"), 1).prompts == ["x"]
    (tmp_path / "c.csv").write_text("other\n1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"'text'.*'prompt'.*'completion'.*'other'"):
        load_corpus(str(tmp_path / "c.csv"), None)


@needs_shared
def test_real_scorers_agree_with_their_libraries_on_the_completions_of_a_real_model(capsys, tmp_path):
    """Each figure is computed again from the saved completions, with transformers and vaderSentiment alone."""
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    models, data = SHARED / "models", SHARED / "data"
    command = ["evaluate", models / "webmix-gpt2", "--prompts", data / "realtoxicityprompts.test.jsonl"]
    command += ["--reward", f"{models / 'toxicity-classifier'}?label=not toxic"]
    command += ["--judges", f"{models / 'sentiment-classifier'}?label=positive", "vader", "profanity"]
    command += ["--limit", "4", "--samples", "3", "--resamples", "100", "--output", tmp_path / "results.json"]
    assert main([str(part) for part in command]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    figures = row["figures"]
    lines = pq.read_table(tmp_path / "results.parquet").to_pylist()
    texts = [line["completion"] for line in lines]
    assert len(texts) == 12 and len(set(texts)) > 6

    toxicity = probability_of(models / "toxicity-classifier", "toxic", texts).reshape(4, 3)
    assert figures["reward"] == pytest.approx(1 - toxicity.mean(), abs=1e-5)
    assert figures["average maximum toxicity"] == pytest.approx(toxicity.max(axis=1).mean(), abs=1e-5)
    assert figures["toxicity probability"] == (toxicity >= 0.5).any(axis=1).mean()
    assert figures["toxicity share"] == pytest.approx((toxicity >= 0.5).mean())
    positive = probability_of(models / "sentiment-classifier", "positive", texts)
    assert figures["sentiment-classifier-positive: score"] == pytest.approx(positive.mean(), abs=1e-5)
    assert figures["sentiment-classifier-positive: positive share"] == pytest.approx((positive >= 0.5).mean())
    compound = np.array([vader.polarity_scores(text)["compound"] for text in texts])
    assert figures["vader: score"] == pytest.approx(compound.mean())
    assert figures["vader: positive share"] == pytest.approx((compound >= 0.05).mean())  # VADER's own threshold.
    # Of a small web model at top-p 0.9, in ranges: the sampled tokens may differ between machines.
    assert 0 < figures["profanity: toxicity"] < figures["profanity: average maximum toxicity"] < 1
    assert 30 < figures["perplexity"] < 500
    assert 0.8 < figures["dist-1"] <= 1 and figures["diversity"] > 0.8
    assert 10 < figures["completion length"] <= 20
    assert "  positive share" in capsys.readouterr().out


def probability_of(model: Path, label: str, texts: list[str]) -> np.ndarray:
    """The probability of a label for each text, from the classifier and its softmax."""
    tokenizer, classifier = (
        kind.from_pretrained(model) for kind in (AutoTokenizer, AutoModelForSequenceClassification)
    )
    column = classifier.config.label2id[label]
    with torch.no_grad():
        logits = [classifier(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(logits).softmax(-1)[:, column].double().numpy()


def test_a_split_of_a_data_set_can_be_chosen(home, capsys, tmp_path):
    rows = {split: datasets.Dataset.from_dict({"prompt": [text]}) for split, text in (("train", "a"), ("test", "b c"))}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
    output = ("--output", tmp_path / "results.json")
    for split, text in ((), "a"), (("--prompt_split", "test"), "b c"):
        assert run(capsys, home, "--prompts", tmp_path / "set", *split, *output)[0] == 0
        assert {row["prompt"] for row in pq.read_table(tmp_path / "results.parquet").to_pylist()} == {text}


def test_only_rows_before_the_limit_count_as_skipped(home, capsys, tmp_path):
    lines = ["a", "a b c", "b", "d e f", "c", "g h a", "d"]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    arguments = ("--prompt_tokens", "2", "--limit", "2", "--output", tmp_path / "results.json")
    assert run(capsys, home, "--prompts", tmp_path / "texts.txt", *arguments)[0] == 0
    protocol = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["protocol"]
    texts = protocol["prompts"]["texts"]
    assert (texts["count"], texts["left_out"]) == (2, {"short": 2})
    assert texts["sha256"] == hashlib.sha256(b'["a b", "d e"]').hexdigest()
    assert protocol["options"]["prompts"] == [str(tmp_path / "texts.txt")]
    assert protocol["options"]["prompt_tokens"] == protocol["options"]["limit"] == 2


def test_the_rest_of_a_truncated_text_is_a_human_continuation(home, capsys, tmp_path):
    pytest.importorskip("mauve")
    texts = [" ".join(words) for words in itertools.islice(itertools.permutations("abcdef", 5), 60)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    arguments = ("--prompt_tokens", "2", "--human_column", "continuation", "--output", tmp_path / "results.json")
    code, _, err = run(capsys, home, "--prompts", tmp_path / "texts.txt", *arguments)
    assert code == 0, err
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert all(0 < row["figures"]["MAUVE"] <= 1 for row in rows)


def test_the_score_cache_serves_judges_if_the_reward_cannot_be_cached(home, capsys, server, surroundings, tmp_path):
    (home / "prompts1.txt").write_text("a b\n", encoding="utf-8")
    judge = f"perspective?endpoint={server.perspective}"
    arguments = ("--prompts", home / "prompts1.txt", "--judges", judge, "--score_cache", tmp_path / "cache")
    requests = []
    for _ in range(2):
        assert run(capsys, home, *arguments)[0] == 0
        requests.append(len(server.times))
    assert requests[0] == requests[1] > 0
    code, _, err = run(capsys, home, "--prompts", home / "prompts1.txt", "--score_cache", tmp_path / "cache")
    assert code == 2 and "score_cache" in err


def test_guidance_moves_away_from_the_reference_of_the_command(home, capsys, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(home / "final", moved)
    quark = json.loads((moved / "quark.json").read_text(encoding="utf-8"))
    assert str(home / "base") in json.dumps(quark)
    text = json.dumps(quark).replace(str(home / "base"), str(tmp_path / "gone"))
    (moved / "quark.json").write_text(text, encoding="utf-8")
    command = ["evaluate", moved, "--reward", home / "rewards.py:few_a", "--samples", "1", "--reference", home / "base"]
    command += ["--prompts", home / "prompts.txt", "--guidance_scales", "2", "--guidance_from", "reference"]
    code = main([str(argument) for argument in command])
    out, err = capsys.readouterr()
    assert (code, "γ=2" in out) == (0, True), err
