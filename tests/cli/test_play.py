"""`quarkrl play`: its options, and what it finds about a run. tests/playground has the page."""

from __future__ import annotations

import importlib.util

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.tiny_models import tiny_model, tiny_tokenizer

from quarkrl.cli.main import main
from quarkrl.cli.play import PlayOptions, load_subject
from quarkrl.models.conditioning import Conditioning


@pytest.fixture
def run(tmp_path):
    """The directory of a finished run: `final/`, its reference, held-out prompts and a reward of its own."""
    tokenizer = tiny_tokenizer(pad="own")
    model = tiny_model("gpt2", tokenizer)
    model.save_pretrained(tmp_path / "before")
    conditioning, extended = Conditioning.add_to(tokenizer, model, 2)
    final = tmp_path / "run" / "final"
    model.save_pretrained(final)
    conditioning.steer_tokenizer(extended).save_pretrained(final)
    conditioning.save(
        final,
        reference={"name": str(tmp_path / "before")},
        rewards=[{"name": "mine", "module": "mine_55a7f81b5454", "qualname": "mine"}],
        config={"max_completion_length": 7, "condition_on": "sum"},
    )
    (tmp_path / "mine.py").write_text("def mine(completions, **_): return [1.0] * len(completions)\n", encoding="utf-8")
    (tmp_path / "eval.txt").write_text("".join(f"prompt {n}\n" for n in range(20)), encoding="utf-8")
    options = {"reward": [f"{tmp_path}/mine.py:mine"], "prompts": "train.txt", "eval_prompts": f"{tmp_path}/eval.txt"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return tmp_path / "run"


@pytest.mark.parametrize("where", ["", "final"])
def test_a_run_gives_its_reference_its_reward_and_its_held_out_prompts(run, where):
    subject = load_subject(str(run / where), PlayOptions())
    assert subject.reference is not None and subject.scorer.names == ("mine",)
    assert subject.examples == [f"prompt {n}" for n in range(0, 16, 2)]
    guidance = {"guidance_scale": 1.0, "guidance_rule": "both"}
    assert subject.defaults == {"chat": False, "max_new_tokens": 7, **guidance} and subject.notes == []


def test_the_prompts_that_scored_lowest_before_training_come_first(run):
    lines = [("a", "reference", 0.5), ("b", "reference", 0.1), ("b", "reference", 0.9), ("c", "best", 0.0)]
    columns = zip(*lines, strict=True)
    table = pa.table(dict(zip(("prompt", "row", "reward"), map(list, columns), strict=True)))
    pq.write_table(table, run / "results.parquet")
    assert load_subject(str(run), PlayOptions()).examples == ["b", "a"]


def test_a_model_without_its_run_says_what_is_missing(run, tmp_path):
    (run / "final").rename(tmp_path / "model")
    for file in (tmp_path / "before").iterdir():
        file.unlink()
    subject = load_subject(str(tmp_path / "model"), PlayOptions())
    assert subject.reference is None and subject.scorer is None and subject.examples == []
    no_reference, no_scores = subject.notes
    assert no_reference.startswith("no column before training: model")
    assert no_scores == (
        "no scores: reward 'mine' of training: must be named again, because code that quark.json names is never run. "
        "Set --reward mine.py:mine."
    )


def test_user_errors_are_one_line(run, capsys, monkeypatch):
    assert main(["play", str(run), "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: port 0: must be at least 1 and at most 65535. ")
    assert main(["play", str(run), "--reward", "profanit"]) == 2
    assert "Did you mean 'profanity'?" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["play", str(run)]) == 2
    assert capsys.readouterr().err == 'error: quarkrl play: must have Gradio. Run `pip install "quarkrl[play]"`.\n'


def test_ctrl_c_is_the_usual_end_of_the_page(run, capsys, monkeypatch):
    pytest.importorskip("gradio")

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("quarkrl.cli.play.wait_forever", interrupt)
    assert main(["play", str(run), "--no_open"]) == 0
    assert capsys.readouterr().err.endswith(" shows the page. Ctrl-C ends.\n")
