"""The checkpoint that a run leaves, and the digest that identifies a model."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.reward_token_models import add_reward_tokens
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from quarkrl.models.conditioning import Conditioning
from quarkrl.models.export import model_identity, save_steered


def test_a_steered_checkpoint_has_model_tokenizer_and_facts(tmp_path):
    conditioning, extended, model = add_reward_tokens(tiny_tokenizer(bos=True), architecture="llama")
    steered = conditioning.steer_tokenizer(extended)
    save_steered(model, steered, conditioning, tmp_path, {"iterations": 3})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == steered("ab")["input_ids"]
    assert Conditioning.load(tmp_path) == conditioning
    assert json.loads((tmp_path / "quark.json").read_text(encoding="utf-8"))["iterations"] == 3


def test_the_checkpoint_suppresses_each_reward_token_and_uses_the_cache(tmp_path):
    conditioning, extended, model = add_reward_tokens(num_quantiles=2, attributes=("kind", "brief"))
    model.config.use_cache = False
    save_steered(model, extended, conditioning, tmp_path, {})
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == [257, 258, 259, 260]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.use_cache


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_itself_is_as_before_even_after_an_error(tmp_path, fails, monkeypatch):
    conditioning, extended, model = add_reward_tokens()
    model.config.use_cache = False
    if fails:
        monkeypatch.setattr(model, "save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_steered(model, extended, conditioning, tmp_path, {})
    else:
        save_steered(model, extended, conditioning, tmp_path, {})
    assert model.generation_config.suppress_tokens is None and model.config.use_cache is False


def test_an_adapter_is_merged_in_the_checkpoint_and_not_in_the_model(tmp_path):
    conditioning, extended, model = add_reward_tokens(architecture="llama", tied=False)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = conditioning.add_adapter(model, lora).eval()
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    save_steered(adapted, extended, conditioning, tmp_path, {})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[257, 3, 1, 4], [259, 1, 5, 9]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "adapter_config.json").exists()
    assert adapted.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())


def test_weights_that_were_gathered_are_those_that_are_written(tmp_path):
    conditioning, extended, model = add_reward_tokens(architecture="llama", tied=False)
    gathered = {name: torch.full_like(weight, 0.5) for name, weight in model.state_dict().items()}
    save_steered(model, extended, conditioning, tmp_path, {}, gathered)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all((weight == 0.5).all() for weight in loaded.parameters())


def test_a_models_identity_has_its_size_and_a_digest_of_names_and_weights():
    def identity(seed: int = 0, **options):
        return model_identity(tiny_model("llama", tiny_tokenizer(), seed=seed, **options))

    first = identity()
    model = tiny_model("llama", tiny_tokenizer())
    assert first["parameters"] == sum(p.numel() for p in model.parameters()) and len(first["sha256"]) == 64
    assert first == identity() and first["name"] is None and first["revision"] is None
    assert identity(seed=1)["sha256"] != first["sha256"]
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 1] += 1e-3
    assert model_identity(model)["sha256"] != first["sha256"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_models_identity_is_of_the_bits_in_any_type(dtype):
    digests = {
        model_identity(tiny_model("gpt2", tiny_tokenizer()).to(kind))["sha256"] for kind in (dtype, torch.float32)
    }
    assert len(digests) == 2


def test_a_loaded_models_identity_has_its_name(tmp_path):
    tiny_model("gpt2", tiny_tokenizer()).save_pretrained(tmp_path)
    assert model_identity(AutoModelForCausalLM.from_pretrained(tmp_path))["name"] == str(tmp_path)
