"""The identity of a run does not depend on the day: a chat template that writes the date writes one date per run."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from helpers.runs import distinct_rewards, small_trainer
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from quarkrl.training import identity
from quarkrl.training.identity import find_chat_date

DATED = "{{ strftime_now('%d %b %Y, %H:%M') }} {{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
CHATS = [{"messages": [{"role": "user", "content": text}]} for text in ("ab", "cd")]


class Clock(datetime):
    """The day before a run is resumed."""

    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 3, 4, 23, 59, 30, 5)


def dated_trainer(directory, prompts=CHATS, **options):
    tokenizer = tiny_tokenizer(chat_template=DATED)
    fixed = {"processing_class": tokenizer, "num_quantiles": 2, "save_strategy": "steps", "save_steps": 1}
    fixed |= {"steps_per_iteration": 1, "per_device_train_batch_size": 2}
    model = tiny_model("gpt2", tokenizer)
    return small_trainer(directory, distinct_rewards, model, prompts, **fixed, **options)


def prompts_of(trainer):
    return {
        trainer.plain_tokenizer.decode(sample.prompt_ids)
        for sample in map(trainer.pool.__getitem__, range(len(trainer.pool)))
    }


def test_a_run_with_a_dated_chat_template_is_resumed_the_next_day(tmp_path, monkeypatch):
    """open-unlearning#98"""
    monkeypatch.setattr(identity, "datetime", Clock)
    first = dated_trainer(tmp_path, num_iterations=1)
    first.train()
    monkeypatch.undo()
    resumed = dated_trainer(tmp_path, num_iterations=2)
    resumed.train(resume_from_checkpoint=True)
    day = {f"04 Mar 2026, 23:59 {text}>" for text in ("ab", "cd")}
    assert prompts_of(first) == prompts_of(resumed) == day
    assert len(resumed.pool) == 4
    assert json.loads((tmp_path / "run.json").read_text())["chat_date"] == "2026-03-04T23:59:30"
    # The final model writes the day on which it is used.
    final = AutoTokenizer.from_pretrained(resumed.save_final())
    rendered = final.apply_chat_template(CHATS[0]["messages"], tokenize=False)
    assert rendered.startswith(datetime.now().strftime("<|reward_1|>%d %b %Y"))


def test_a_run_says_that_its_chat_template_is_dated(tmp_path):
    notes = dated_trainer(tmp_path / "chats").progress.start_notes
    assert any(f"the prompts of this run have {datetime.now():%Y-%m-%d}" in note for note in notes)
    notes = dated_trainer(tmp_path / "texts", prompts=["ab", "cd"]).progress.start_notes
    assert notes and not any("current date" in note for note in notes)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"chat_date": null}', None])
def test_the_date_is_that_of_the_run_in_the_directory_or_now(tmp_path, monkeypatch, content):
    monkeypatch.setattr(identity, "datetime", Clock)
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    tokenizer = tiny_tokenizer(chat_template=DATED)
    assert find_chat_date(tokenizer, tmp_path, 1) == datetime(2026, 3, 4, 23, 59, 30)
    assert find_chat_date(tiny_tokenizer(chat_template=True), tmp_path, 1) is None
    (tmp_path / "run.json").write_text('{"chat_date": "2025-01-02T03:04:05"}')
    assert find_chat_date(tokenizer, tmp_path, 1) == datetime(2025, 1, 2, 3, 4, 5)
