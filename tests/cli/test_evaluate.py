"""`quarkrl evaluate` as its users type it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from helpers.tiny import SHARED, needs_shared, tiny_model, tiny_tokenizer

from quarkrl.cli.evaluate import corpus, prompt_sets
from quarkrl.cli.main import main
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning

TOKENIZER = tiny_tokenizer(words=[*"abcdefgh"])
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
    model = tiny_model("gpt2", TOKENIZER)
    model.save_pretrained(directory / "base")
    TOKENIZER.save_pretrained(directory / "base")
    conditioning, tokenizer = Conditioning.add_to(TOKENIZER, model, 3)
    model.save_pretrained(directory / "final")
    conditioning.steer_tokenizer(tokenizer).save_pretrained(directory / "final")
    conditioning.save(directory / "final", reference={"name": str(directory / "base")})
    (directory / "prompts.txt").write_text("a b\nc\nd e f\nh g\n", encoding="utf-8")
    (directory / "other.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b c"}\n', encoding="utf-8")
    (directory / "corpus.jsonl").write_text('{"text": "a b c a"}\n{"text": ""}\n{"text": "d e"}\n', encoding="utf-8")
    (directory / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return directory


def run(capsys, home: Path, *arguments: str | Path) -> tuple[int, str, str]:
    command = ["evaluate", home / "final", "--reward", home / "rewards.py:few_a", "--samples", "2", *arguments]
    code = main([str(argument) for argument in command])
    return (code, *capsys.readouterr())


def test_everything_at_once(home, capsys, tmp_path):
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
    assert "quantile asked for" in out and "guidance scale γ" in out and "corpus: 2 texts" in out
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "results.parquet" in err and "curve.png" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "2"), "threshold '2'"),
        (("--plot", "curve.png"), "no curve to plot: want --quantiles all"),
        (("--plot", "curve.gif", "--quantiles", "all"), "curve.gif': want a name that ends in"),
        (("--output", "x.parquet"), "want a name that ends in .json"),
        (("--judges", "profanty"), "did you mean 'profanity'"),
        (("--guidance_scales", "-2"), "guidance_scale -2"),
        (("--guidance_scales", "2", "--guidance_from", "9"), "quantile '9'"),
        (("--human_column", "people"), "people"),
        (("--perplexity_model", "{home}/nowhere"), "nowhere' cannot be loaded"),
        (("--corpus", "{home}/nowhere.txt"), "nowhere.txt"),
        (("--resamples", "0"), "resamples '0'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_told_before_anything_is_sampled(home, capsys, arguments, message):
    if "--human_column" in arguments:
        pytest.importorskip("mauve")
    arguments = [argument.format(home=home) for argument in arguments]
    code, out, err = run(capsys, home, "--prompts", home / "prompts.txt", *arguments)
    assert (code, out) == (2, "")
    assert message in err and "left" not in err  # No bar.


def test_sets_are_named_as_their_files_and_a_second_of_one_name_is_numbered(tmp_path):
    for directory in ("x", "y"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "test.txt").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "test-new.txt").write_text("c\n", encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("x/test.txt", "y/test.txt", "test-new.txt")]
    sets = prompt_sets(paths, load_prompts, limit=1)
    assert {name: each.prompts for name, each in sets.items()} == {"test": ["a"], "test-2": ["a"], "test-new": ["c"]}


def test_a_corpus_is_read_from_the_column_that_it_has(tmp_path):
    (tmp_path / "a.csv").write_text("completion,other\nx,1\ny,2\n", encoding="utf-8")
    assert corpus(str(tmp_path / "a.csv"), None).prompts == ["x", "y"]
    (tmp_path / "b.txt").write_text("x\n\ny\n", encoding="utf-8")
    assert corpus(str(tmp_path / "b.txt"), 1).prompts == ["x"]
    (tmp_path / "c.csv").write_text("other\n1\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column 'text' or 'prompt' or 'completion'; the columns are 'other'"):
        corpus(str(tmp_path / "c.csv"), None)


@needs_shared
def test_real_models_judged_by_real_classifiers(capsys):
    """Toxicity and sentiment of a real model, in and out of domain; each scorer with figures of its kind."""
    models, data = SHARED / "models", SHARED / "data"
    command = ["evaluate", models / "webmix-gpt2", "--prompts", data / "realtoxicityprompts.test.jsonl"]
    command += ["--reward", f"{models / 'toxicity-classifier'}?label=not toxic"]
    command += ["--judges", f"{models / 'sentiment-classifier'}?label=positive", "vader", "profanity"]
    assert main([str(part) for part in [*command, "--limit", "4", "--samples", "3"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    for metric in (
        "average maximum toxicity",
        "  positive share",
        "  average maximum toxicity",
        "  score",
        "diversity",
    ):
        assert any(line.startswith(metric) for line in lines), metric
    assert sum(line.startswith("  positive share") for line in lines) == 2  # The classifier's, and VADER's.


def test_a_data_set_s_split_can_be_named(home, capsys, tmp_path):
    rows = {split: datasets.Dataset.from_dict({"prompt": [text]}) for split, text in (("train", "a"), ("test", "b c"))}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
    output = ("--output", tmp_path / "results.json")
    for split, text in ((), "a"), (("--prompt_split", "test"), "b c"):
        assert run(capsys, home, "--prompts", tmp_path / "set", *split, *output)[0] == 0
        assert {row["prompt"] for row in pq.read_table(tmp_path / "results.parquet").to_pylist()} == {text}


def test_only_what_stood_before_the_limit_counts_as_left_out(home, capsys, tmp_path):
    lines = ["a", "a b c", "b", "d e f", "c", "g h a", "d"]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    arguments = ("--prompt_tokens", "2", "--limit", "2", "--output", tmp_path / "results.json")
    assert run(capsys, home, "--prompts", tmp_path / "texts.txt", *arguments)[0] == 0
    protocol = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["protocol"]
    found = protocol["prompts"]["texts"]
    assert (found["count"], found["left_out"]) == (2, {"short": 2})
    assert found["sha256"] == hashlib.sha256(b'["a b", "d e"]').hexdigest()
    assert protocol["options"]["prompts"] == [str(tmp_path / "texts.txt")]
    assert protocol["options"]["prompt_tokens"] == protocol["options"]["limit"] == 2


def test_what_is_cut_off_a_text_is_people_s_continuation(home, capsys, tmp_path):
    pytest.importorskip("mauve")
    texts = [" ".join(words) for words in itertools.islice(itertools.permutations("abcdef", 5), 60)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    arguments = ("--prompt_tokens", "2", "--human_column", "continuation", "--output", tmp_path / "results.json")
    code, _, err = run(capsys, home, "--prompts", tmp_path / "texts.txt", *arguments)
    assert code == 0, err
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert all(0 < row["figures"]["MAUVE"] <= 1 for row in rows)


def test_the_cache_serves_the_judges_where_the_reward_needs_none(home, capsys, server, surroundings, tmp_path):
    (home / "prompts1.txt").write_text("a b\n", encoding="utf-8")
    judge = f"perspective?endpoint={server.perspective}"
    arguments = ("--prompts", home / "prompts1.txt", "--judges", judge, "--score_cache", tmp_path / "cache")
    asked = []
    for _ in range(2):
        assert run(capsys, home, *arguments)[0] == 0
        asked.append(len(server.times))
    assert asked[0] == asked[1] > 0
    code, _, err = run(capsys, home, "--prompts", home / "prompts1.txt", "--score_cache", tmp_path / "cache")
    assert code == 2 and "leave score_cache out" in err


def test_guidance_goes_away_from_the_reference_that_is_given(home, capsys, tmp_path):
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
