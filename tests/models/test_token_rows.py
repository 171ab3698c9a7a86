"""Rows of single tokens: the values and gradients of peft's own layer, without copies of the table."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.new_arrays import NewArrays
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer

from quarkrl.models.token_rows import TokenRows, use_token_rows

IDS = torch.tensor([[1, 3, 7, 3], [5, 2, 2, 8]])


def with_rows(tied: bool):
    """Models with trained rows 3 and 5: peft's, and ours with the same weights."""
    model = tiny_model("llama", tiny_tokenizer(), tie_word_embeddings=tied)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM")
    theirs = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "trainable_tokens" in name:
                weight.add_(torch.randn(weight.shape))
    ours = copy.deepcopy(theirs)
    use_token_rows(ours)
    return theirs, ours


def gradients_of(model):
    model(IDS).logits.square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_are_those_of_pefts_layer(tied):
    theirs, ours = with_rows(tied)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    expected, found = gradients_of(theirs), gradients_of(ours)
    assert expected.keys() == found.keys() and any("trainable_tokens" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_without_the_adapter_and_with_merged_rows_the_logits_are_pefts():
    theirs, ours = with_rows(True)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    expected = theirs(IDS).logits
    torch.testing.assert_close(ours.merge_and_unload()(IDS).logits, expected)


def test_neither_forward_nor_backward_makes_a_table():
    theirs, ours = with_rows(True)
    table = ours.get_base_model().get_input_embeddings().token_adapter.base_layer.weight.numel()
    counts = []
    for model in (theirs, ours):
        with NewArrays(table) as large:
            gradients_of(model)
        counts.append(large.count)
    assert counts[0] > 0 and counts[1] == 0


def test_a_copy_keeps_the_layers():
    layers = [type(module) for module in copy.deepcopy(with_rows(True)[1]).modules()]
    assert layers.count(TokenRows) == 2 and TrainableTokensLayer not in layers
