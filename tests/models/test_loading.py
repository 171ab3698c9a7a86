"""Models and tokenizers from a directory: what is loaded, what is refused and in which words."""

from __future__ import annotations

import pytest
import torch
from helpers.completions import EVERY_MODEL
from helpers.tiny_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig
from transformers.activations import NewGELUActivation

from quarkrl.errors import UserError
from quarkrl.models.loading import context_length, eos_ids, load_model, load_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A directory with a tiny GPT-2 and its tokenizer."""
    tokenizer = tiny_tokenizer(bos=True)
    tiny_model("gpt2", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_model_and_its_tokenizer_are_loaded_as_they_were_saved(saved):
    loaded, original = load_model(saved), tiny_model("gpt2", tiny_tokenizer(bos=True))
    for (name, weight), (other_name, other) in zip(loaded.named_parameters(), original.named_parameters(), strict=True):
        assert name == other_name and torch.equal(weight, other)
    assert load_tokenizer(saved)("ab")["input_ids"] == tiny_tokenizer(bos=True)("ab")["input_ids"]


def test_options_go_to_transformers(saved):
    assert load_model(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_missing_weights_are_refused_with_their_number_and_names(saved):
    weights = load_file(saved / "model.safetensors")
    missing = ["transformer.ln_f.weight", "transformer.h.0.ln_1.bias"]
    kept = {name: tensor for name, tensor in weights.items() if name not in missing}
    assert len(kept) == len(weights) - 2
    save_file(kept, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be loaded.* 2 tensors") as caught:
        load_model(saved)
    assert all(name in str(caught.value) for name in (str(saved), *missing))


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused_before_they_are_read(tmp_path, pickled):
    (tmp_path / pickled).write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match="its weights are pickled") as caught:
        load_model(tmp_path)
    assert pickled in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_model_that_is_not_there_is_one_line_with_its_name(tmp_path):
    with pytest.raises(UserError, match="nothing': no such directory") as caught:
        load_model(tmp_path / "nothing")
    assert len(str(caught.value).splitlines()) == 1


@EVERY_MODEL
def test_a_directory_without_a_tokenizer_is_one_line_with_its_name(architecture, tmp_path):
    """For most architectures transformers returns an empty one, which reads every prompt as no tokens."""
    tiny_model(architecture, tiny_tokenizer()).save_pretrained(tmp_path)
    for directory in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="has no tokenizer") as caught:
            load_tokenizer(directory)
        assert str(directory) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_the_fused_gelu_gives_the_same_logits(saved):
    loaded, original = load_model(saved).eval(), tiny_model("gpt2", tiny_tokenizer(bos=True))
    assert not any(isinstance(module, NewGELUActivation) for module in loaded.modules())
    assert any(isinstance(module, NewGELUActivation) for module in original.modules())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits)


def test_the_context_length_is_that_of_the_config_or_none():
    assert context_length(tiny_model("llama", tiny_tokenizer())) == 128
    endless = MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=1)
    assert context_length(AutoModelForCausalLM.from_config(endless)) == 2**31


@pytest.mark.parametrize(
    ("configured", "expected"),
    [([7, 8], [7, 8, 256]), (7, [7, 256]), (0, [0, 256]), ([256, 7], [256, 7]), (None, [256])],
    ids=["two", "one", "id 0", "the same", "none"],
)
def test_eos_is_that_of_the_generation_config_and_that_of_the_tokenizer(configured, expected):
    tokenizer = tiny_tokenizer()  # Its EOS is 256.
    model = tiny_model("gpt2", tokenizer)
    model.generation_config.eos_token_id = configured
    assert eos_ids(model, tokenizer) == expected
    assert eos_ids(model, tokenizer, vocab_size=256) == [i for i in expected if i < 256]


def test_a_model_without_eos_has_none():
    tokenizer = tiny_tokenizer(pad=None)
    model = tiny_model("gpt2", tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    assert eos_ids(model, tokenizer) == []
