"""QLoRA: an adapter on a model in 4 bits, merged into whole numbers; a line where bitsandbytes is missing."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers.eight_letters import PROMPTS, TOKENIZER
from helpers.runs import share_of_a_to_d, small_trainer
from helpers.tiny_models import tiny_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from quarkrl.errors import UserError
from quarkrl.models.loading import load_model

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
IDS = torch.tensor([[12, 0, 1, 2], [10, 3, 3, 4]])


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(IDS.to(model.device)).logits.float().cpu()


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_without_bitsandbytes_4_bits_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^load_in_4bit True: needs bitsandbytes\. Run `pip install") as caught:
        load_model(tmp_path, load_in_4bit=True)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not (HAS_BITSANDBYTES and torch.cuda.is_available()), reason="needs bitsandbytes and a CUDA device")
def test_final_and_checkpoint_of_a_run_in_4_bits_have_the_trainers_logits(tmp_path):
    tiny_model("llama", TOKENIZER, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", load_in_4bit=True)
    options = {"learning_rate": 1e-2, "num_iterations": 1, "save_strategy": "epoch"}
    config = LoraConfig(r=2, target_modules="all-linear")
    trainer = small_trainer(tmp_path / "run", share_of_a_to_d, model, PROMPTS, peft_config=config, **options)
    trainer.train()
    expected = logits_of(trainer.model)
    final = AutoModelForCausalLM.from_pretrained(trainer.save_final())
    assert final.dtype == torch.float32
    tolerance = 1e-2  # 4-bit layers compute in bfloat16.
    assert difference(logits_of(final), expected) < tolerance
    checkpoint = load_model(tmp_path / "run" / "checkpoint-3")
    assert difference(logits_of(checkpoint), expected) < tolerance
    with trainer.model.disable_adapter():
        assert difference(logits_of(trainer.model), expected) > 10 * tolerance  # The adapter matters.
