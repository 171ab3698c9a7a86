"""prepare_weights_once: each weight is cast once, and everything is restored or the violation is reported."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import LoraConfig

from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.prepared_weights import prepare_weights_once


def adapted():
    """A model with an adapter that trains the rows of three reward tokens; these rows differ from the base model's."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer)
    conditioning, _ = Conditioning.add_to(tokenizer, model, 3)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = conditioning.add_adapter(model, config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "trainable_tokens" in name:
                weight.add_(1.0)
    return model


def state_of(model):
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    return flags, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found, expected):
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name], tensor), name


def table_of(model):
    return model.base_model.model.model.embed_tokens.token_adapter


def test_within_the_block_all_weights_require_gradients_and_rows_are_merged():
    model, frozen = adapted(), tiny_model("gpt2", tiny_tokenizer()).requires_grad_(False)
    before = state_of(model), state_of(frozen)
    rows = table_of(model).trainable_tokens_delta["default"].detach()
    ids = torch.tensor([[257, 5]])
    with torch.no_grad():
        expected = model(ids).logits
    with prepare_weights_once(model, None, frozen):
        assert not torch.is_grad_enabled()
        assert all(weight.requires_grad for part in (model, frozen) for weight in part.parameters())
        assert table_of(model).merged and torch.equal(table_of(model).base_layer.weight[257:260], rows)
        torch.testing.assert_close(model(ids).logits, expected)
    assert torch.is_grad_enabled()
    assert_same_state(state_of(model), before[0])
    assert_same_state(state_of(frozen), before[1])


def test_everything_is_restored_after_an_error_which_is_not_hidden():
    model = adapted()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), prepare_weights_once(model):
        next(model.parameters()).requires_grad_(False)
        raise ZeroDivisionError
    assert_same_state(state_of(model), before)


def test_a_nested_block_leaves_the_outer_one_prepared():
    model = adapted()
    before = state_of(model)
    with prepare_weights_once(model):
        with prepare_weights_once(model):
            pass
        assert table_of(model).merged and all(weight.requires_grad for weight in model.parameters())
    assert_same_state(state_of(model), before)


def test_rows_that_peft_unmerges_within_the_block_are_no_violation():
    model = adapted()
    before = state_of(model)
    with prepare_weights_once(model), model.disable_adapter():
        model(torch.tensor([[257, 5]]))
    assert_same_state(state_of(model), before)


def test_adapters_are_merged_within_the_block_and_restored_to_the_bit():
    model = adapted()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    before, ids = state_of(model), torch.tensor([[257, 5]])
    with torch.no_grad():
        expected = model(ids).logits
    with pytest.raises(ZeroDivisionError), prepare_weights_once(model, merge_adapters=True):
        assert all(layer.merged for layer in model.modules() if hasattr(layer, "lora_A"))
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        raise ZeroDivisionError
    assert_same_state(state_of(model), before)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def freeze_a_trained_weight(model):
    next(weight for name, weight in model.named_parameters() if "lora_A" in name).requires_grad_(False)


def change_the_base_rows(model):
    # Unmerging restores peft's copy of the original rows.
    table_of(model).trainable_tokens_original["default"].add_(1.0)


@pytest.mark.parametrize(
    ("violation", "reported"),
    [
        (freeze_a_trained_weight, "requires_grad of .*lora_A"),
        (change_the_base_rows, "token rows of .*embed_tokens"),
    ],
)
def test_a_state_that_is_not_restored_is_reported_by_name(violation, reported):
    model = adapted()
    with pytest.raises(RuntimeError, match=reported), prepare_weights_once(model):
        violation(model)


def test_a_table_that_stays_merged_is_reported(monkeypatch):
    model = adapted()
    monkeypatch.setattr(table_of(model), "unmerge", lambda: None)
    with pytest.raises(RuntimeError, match=r"merged adapters of .*embed_tokens"), prepare_weights_once(model):
        pass


def test_autocast_casts_a_frozen_weight_once_within_the_block():
    model = tiny_model("gpt2", tiny_tokenizer()).requires_grad_(False)
    weight = model.transformer.h[0].attn.c_attn.weight
    casts = []

    class CountCasts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == weight.data_ptr():
                casts.append(func)
            return func(*args, **(kwargs or {}))

    ids = torch.tensor([[1, 2]])
    with CountCasts(), torch.autocast("cpu", torch.bfloat16), prepare_weights_once(model):
        model(ids), model(ids)
    assert len(casts) == 1
    with CountCasts(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(ids), model(ids)
    assert len(casts) == 3  # Without the block, twice.
