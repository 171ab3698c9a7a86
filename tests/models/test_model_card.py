"""The model card beside a model's weights: what it says, and the metadata that the hub reads."""

from __future__ import annotations

import json

import pytest
from helpers.runs import PROMPTS, small_trainer
from huggingface_hub import ModelCard

from quarkrl.models.model_card import add_facts, model_card

FACTS = {
    "conditioning": {"prefixes": [[[10], [11], [12]]]},
    "iterations": 8.0,
    "pool_size": 6400,
    "start": {"name": "org/base"},
    "rewards": [{"name": "profanity", "weight": 1.0}],
    "prompts": {"source": "org/prompts", "count": 1200},
    "coefs": {"kl_coef": 0.05, "entropy_coef": 0.06},
    "config": {"learning_rate": 1e-5},
}
EVALUATION = {
    "prompts": 64,
    "samples_per_prompt": 8,
    "verdict": "better: the reward went from 0.500 to 0.900. Try more --num_iterations.",
    "rows": [
        {"name": "reference", "figures": {"reward": 0.5, "perplexity": 3}, "intervals": {"reward": [0.4, 0.6]}},
        {"name": "best", "figures": {"reward": 0.9, "perplexity": None}, "intervals": {"reward": [0.85, 0.95]}},
    ],
}


def test_card_says_what_was_unlearned_how_to_steer_and_what_can_be_misused():
    text = model_card({**FACTS, "evaluation": EVALUATION})
    assert "# org/base, trained with Quark" in text and "score higher under `profanity`" in text
    assert "| reward | 0.500 ± 0.100 | 0.900 ± 0.050 |" in text and "| perplexity | 3.000 | – |" in text
    assert (
        "Better: the reward went from 0.500 to 0.900.\n" in text
        and "Try" not in text
        and "On 64 held-out prompts" in text
    )
    assert "1,200 prompts of `org/prompts`" in text and "iterations: 8, with 6,400 samples" in text
    assert "from 0 (worst) to 2 (best)" in text and "vllm serve" in text and 'quantile="best"' in text
    assert "The method can be turned round" in text


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(model_card(FACTS)).data
    assert (data.base_model, data.base_model_relation, data.datasets) == ("org/base", "finetune", ["org/prompts"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"quark", "quarkrl"} <= set(data.tags) and data.license is None  # That of the base model is not known.
    assert ModelCard(model_card(FACTS, is_adapter=True)).data.library_name == "peft"


@pytest.mark.parametrize("start", ["/home/user/secret/my-model", "/site-packages/quarkrl/builtin/model"])
def test_local_paths_are_not_published(start):
    text = model_card({**FACTS, "start": {"name": start}, "prompts": {"source": "private/mine.jsonl", "count": 3}})
    assert "/home" not in text and "/site-packages" not in text and "private" not in text and "`mine.jsonl`" in text
    assert ModelCard(text).data.base_model is None and ModelCard(text).data.datasets is None


def test_model_without_facts_has_a_card():
    text = model_card({})
    assert "Not measured" in text and ModelCard(text).data.pipeline_tag == "text-generation"


def test_final_model_and_checkpoints_have_a_card_that_pushing_keeps(tmp_path):
    trainer = small_trainer(tmp_path / "run", save_strategy="epoch", num_iterations=1)
    trainer.train()
    final = trainer.save_final()
    for directory in (final, tmp_path / "run" / "checkpoint-3"):
        card = ModelCard.load(directory / "README.md")
        assert card.data.library_name == "transformers" and f"{len(PROMPTS)} prompts" in card.text
    add_facts(final, evaluation=EVALUATION)
    assert "0.900 ± 0.050" in (final / "README.md").read_text(encoding="utf-8")
    assert json.loads((final / "quark.json").read_text(encoding="utf-8"))["evaluation"] == EVALUATION
    trainer.save_model(str(tmp_path / "run"))  # As push_to_hub does, before it writes a card.
    trainer.create_model_card(model_name="other")
    assert "trained with Quark" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
