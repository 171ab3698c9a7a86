"""An evaluation on disk: results.json and results.parquet."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.evaluation_helpers import PROMPTS, WORDS, NoA, few_b, short
from helpers.tiny_models import tiny_model

from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.evaluate import evaluate
from quarkrl.evaluation.results import Evaluation, output_paths
from quarkrl.rewards import Scorer


@pytest.fixture(scope="module")
def evaluation(trained):
    return evaluate(trained, load_prompts(PROMPTS), Scorer(NoA()), short(samples=4, seed=1))


def test_figures_and_protocol_are_saved_as_json_and_completions_as_parquet(evaluation, tmp_path):
    target = tmp_path / "new" / "results.json"
    evaluation.save(target)
    evaluation.save(target)  # Overwrites both files.
    assert sorted(path.name for path in target.parent.iterdir()) == ["results.json", "results.parquet"]
    saved = json.loads(target.read_text(encoding="utf-8"))
    assert saved.keys() == {"protocol", "results", "corpus", "completions"}
    assert saved["protocol"] == evaluation.protocol
    assert [entry["name"] for entry in saved["results"]] == ["reference", "best", "worst"]
    row = evaluation.rows[1]
    assert saved["results"][1] == {
        "prompts": "prompts",
        "name": "best",
        "quantile": 2,
        "guidance_scale": 1.0,
        "figures": {name: None if np.isnan(value) else value for name, value in row.figures.items()},
        "intervals": {
            name: [None if np.isnan(end) else end for end in interval] for name, interval in row.intervals.items()
        },
        "left_out": row.left_out,
        "truncated": 0,
    }
    assert saved["completions"] == "results.parquet" and saved["corpus"] == []


def test_each_completion_is_a_line_of_the_parquet_file(evaluation, tmp_path):
    evaluation.save(tmp_path / "results.json")
    lines = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert len(lines) == 3 * 3 * 4
    row = evaluation.rows[2]
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


def test_saved_rows_are_read_back(evaluation, tmp_path):
    evaluation.save(tmp_path / "results.json")
    loaded = Evaluation.load(tmp_path / "results.json", evaluation.prompt_sets)
    assert loaded.protocol == evaluation.protocol
    for row, read in zip(evaluation.rows, loaded.rows, strict=True):
        np.testing.assert_equal(vars(read), vars(row))  # NaN equals NaN here.


def test_rows_that_are_known_are_not_measured_again(evaluation, trained):
    measured = []
    again = evaluate(
        trained,
        load_prompts(PROMPTS),
        Scorer(NoA()),
        short(samples=4, seed=1),
        known_rows=evaluation.rows[:2],
        notify=lambda row, done, total: measured.append(row),
    )
    assert again.rows[:2] == evaluation.rows[:2] and {*measured} == {"worst"}
    assert again.rows[2].completions == evaluation.rows[2].completions


@pytest.mark.parametrize("name", ["", "x.parquet", "file/x.json"])
def test_a_path_that_cannot_hold_the_results_is_an_error(tmp_path, name):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=f"^output '{tmp_path / name}': "):
        output_paths(tmp_path / name)


def test_a_figure_without_a_value_is_null(tmp_path):
    """A model that writes nothing has no perplexity, and JSON has no NaN."""
    model = tiny_model("gpt2", WORDS)
    model.generation_config.eos_token_id = list(range(10))  # Any token ends a completion.
    model.save_pretrained(tmp_path / "silent")
    WORDS.save_pretrained(tmp_path / "silent")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        evaluation = evaluate(tmp_path / "silent", load_prompts(PROMPTS), Scorer(few_b), short())
    assert evaluation.rows[0].left_out["perplexity_empty"] == 6
    evaluation.save(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text)["results"][0]["figures"]["perplexity"] is None


def test_a_repeated_evaluation_saves_the_same_files_except_for_the_date(trained, tmp_path):
    """Each number, interval and completion, judges, corpus and guidance included."""
    for name in ("one", "two"):
        evaluation = evaluate(
            trained,
            {"in": load_prompts(PROMPTS), "out": load_prompts(["g h", "a"])},
            Scorer(NoA()),
            short(samples=3, resamples=200, quantiles=("all",), guidance_scales=(1, 3)),
            judges=[Scorer(few_b)],
            corpus=load_prompts(["a b c d", "e f g"]),
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
