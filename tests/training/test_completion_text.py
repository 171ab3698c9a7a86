"""Rewards in training, the generator and evaluation read the same text of a completion: what it adds to the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.evaluation_helpers import short
from helpers.kinds_of_tokenizers import llama_tokenizer
from helpers.runs import distinct_rewards, small_trainer
from helpers.tiny_models import tiny_model

from quarkrl import QuarkGenerator
from quarkrl.data.prompts import load_prompts
from quarkrl.evaluation.evaluate import evaluate
from quarkrl.rewards import Scorer

PROMPTS = ["You are", "a b", "mean"]


def test_text_of_a_completion_has_its_leading_space_everywhere(tmp_path):
    tokenizer = llama_tokenizer(byte_fallback=False, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    read: list[tuple[Any, Any, list[int]]] = []

    def note(prompts, completions, completion_ids):
        read.extend(zip(prompts, completions, completion_ids, strict=True))
        return distinct_rewards(completion_ids)

    trainer = small_trainer(
        tmp_path,
        note,
        tiny_model("llama", tokenizer),
        [{"prompt": p} for p in [*PROMPTS, [{"role": "user", "content": "You are"}]] * 3],
        processing_class=tokenizer,
        num_iterations=1,
        eval_dataset=PROMPTS,
    )
    trainer.train()
    trainer.evaluate()
    texts = set()
    for prompt, completion, ids in read:
        if isinstance(prompt, list):
            prompt, completion = prompt[0]["content"], completion[0]["content"]
        whole = tokenizer.decode([*tokenizer(prompt)["input_ids"], *ids], skip_special_tokens=True)
        assert prompt + completion == whole
        texts.add(completion)
    assert any(text.startswith(" ") for text in texts)

    trainer.save_model(str(tmp_path / "final"))
    generator = QuarkGenerator.from_pretrained(tmp_path / "final", device="cpu")
    generated = generator.generate(PROMPTS, num_return_sequences=8, seed=1, max_new_tokens=5)
    starts = {text[:1] for texts in generated for text in texts}
    assert " " in starts and starts - {" ", ""}

    rewards = Scorer(lambda completions, **_: [float(text.startswith(" ")) for text in completions])
    options = short(samples=8, seed=1, reference="none", quantiles=("best",))
    (row,) = evaluate(tmp_path / "final", load_prompts(PROMPTS), rewards, options).rows
    assert row.completions == generated
    assert row.rewards.mean() == pytest.approx(sum(t.startswith(" ") for ts in generated for t in ts) / 24)
