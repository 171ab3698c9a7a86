"""The models of the page: an adapter and its reference are one model in memory."""

from __future__ import annotations

import torch
from helpers.eight_letters import TOKENIZER
from helpers.runs import LORA, small_trainer, still_model
from peft import PeftModel

from quarkrl.models.loading import load_model
from quarkrl.playground.answers import answer
from quarkrl.playground.settings import Settings
from quarkrl.playground.subject import load_models


def test_a_run_with_an_adapter_has_one_model_in_memory(tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    still_model().save_pretrained(start)
    TOKENIZER.save_pretrained(start)
    trainer = small_trainer(run, model=str(start), peft_config=LORA, save_strategy="epoch", learning_rate=0.1)
    trainer.train()
    subject = load_models(str(run), str(trainer.save_final()))
    model = subject.generator.model
    ids = torch.tensor([[0, 1]])
    policy = model(ids).logits
    assert isinstance(model, PeftModel)
    with subject.reference() as reference:
        assert reference is model
        torch.testing.assert_close(reference(ids).logits[..., :10], load_model(start)(ids).logits)
    torch.testing.assert_close(model(ids).logits, policy)
    torch.testing.assert_close(policy, load_model(run / "final")(ids).logits, rtol=1e-4, atol=1e-4)
    columns = list(answer(subject, Settings(prompt="a b", max_new_tokens=4)))[-1]
    assert [column.title for column in columns] == ["before", "best", "worst"] and columns[0].turns
