"""Logits of completion tokens: the model's own, and no others; and projections, by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.completions import EVERY_MODEL, TIED, add_lora, tied_or_untied, unequal_rows
from helpers.tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from quarkrl.algorithm.loss import quark_loss
from quarkrl.models.batching import build_batch
from quarkrl.models.completion_logits import Projection, completion_logits, forward_at_completions, output_layer

# Of a model


@EVERY_MODEL
@TIED
def test_completion_logits_are_the_full_logits_where_completions_are_predicted(architecture, tied):
    model = tied_or_untied(architecture, tied)
    batch = build_batch(*unequal_rows())
    logits = completion_logits(model, **batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # Row 0 predicts its four tokens from positions 2 to 5, row 1 two from 1 and 2, row 2 one from 5.
    expected = torch.stack([full[0, 2], full[0, 3], full[0, 4], full[0, 5], full[1, 1], full[1, 2], full[2, 5]])
    torch.testing.assert_close(logits, expected)


def test_hidden_states_of_all_positions_and_logits_of_some():
    model = tied_or_untied("llama", False)
    batch = build_batch(*unequal_rows())
    hidden, logits = forward_at_completions(model, **batch, logits_at=slice(1, 3))
    assert hidden.shape == (7, 16)
    torch.testing.assert_close(logits, completion_logits(model, **batch)[1:3])
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, completion_logits(model, **batch))


def test_gemma2_logits_are_capped():
    model = tiny_model("gemma2", tiny_tokenizer(), final_logit_softcapping=0.5)
    logits = completion_logits(model, **build_batch([[1, 2]], [[3, 4, 5]]))
    assert 0.3 < logits.abs().max() < 0.5


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {}),
        (False, {}),
        (True, {"trainable_token_indices": [3, 5]}),
        (False, {"trainable_token_indices": [3, 5]}),
        (False, {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_completion_logits_under_an_adapter(tied, options):
    model = add_lora(tied_or_untied("llama", tied), **options)
    batch = build_batch(*unequal_rows())
    logits = completion_logits(model, **batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, full[:, :-1][batch["labels"][:, 1:] != -100])
    with model.disable_adapter():
        assert not torch.allclose(logits, completion_logits(model, **batch))


def test_completion_logits_through_a_wrapper():
    model = tied_or_untied("gpt2", True)

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def forward(self, **kwargs):
            return self.module(**kwargs)

    batch = build_batch(*unequal_rows())
    assert output_layer(Wrapper(Wrapper(model))) is model.lm_head
    torch.testing.assert_close(completion_logits(Wrapper(model), **batch), completion_logits(model, **batch))


@EVERY_MODEL
@TIED
def test_a_batch_of_one_gives_what_a_padded_batch_gives(architecture, tied):
    """Losses and gradients of a batch equal those of its rows one by one, weighted by their tokens."""
    model = tied_or_untied(architecture, tied)
    reference = tied_or_untied(architecture, tied, seed=1)
    prompts, completions = unequal_rows()

    def losses(rows: slice) -> Tensor:
        batch = build_batch(prompts[rows], completions[rows])
        with torch.no_grad():
            ref = completion_logits(reference, **batch)[:, :250]
        policy = completion_logits(model, **batch)
        targets = batch["labels"][batch["labels"] != -100].clamp(max=249)
        loss = quark_loss(policy, ref, targets, kl_coef=0.5, entropy_coef=0.1)
        return torch.stack(loss) * len(targets)

    def gradients(total: Tensor) -> list[Tensor]:
        return torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)

    together = losses(slice(None))
    one_by_one = sum(losses(slice(i, i + 1)) for i in range(len(prompts)))
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=0)
    for gradient, expected in zip(gradients(together[0]), gradients(one_by_one[0]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * max(expected.abs().max().item(), 1e-3))


def test_the_ids_of_padding_do_not_matter():
    model = tied_or_untied("gpt2", True)
    batch = build_batch(*unequal_rows())
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 99)}
    torch.testing.assert_close(completion_logits(model, **batch), completion_logits(model, **other))


def test_the_model_is_unchanged_afterwards_even_after_an_error():
    model = tied_or_untied("gpt2", True)
    batch = build_batch(*unequal_rows())
    before = model(input_ids=batch["input_ids"]).logits
    completion_logits(model, **batch)
    with pytest.raises(IndexError):
        completion_logits(model, batch["input_ids"] + 10_000, batch["attention_mask"], batch["labels"])
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)


# Projections by hand

HIDDEN = torch.tensor([[1.0, 0], [0, 2], [3, 1]])
WEIGHT = torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]])
BIAS = torch.tensor([0.0, 10, 20, 30])
PRODUCT = torch.tensor([[1.0, 0, 1, -1], [0, 2, 2, 0], [3, 1, 4, -3]])


def test_logits_are_the_product_of_hidden_states_and_weights():
    assert torch.equal(Projection(HIDDEN, WEIGHT).logits(), PRODUCT)
    assert torch.equal(Projection(HIDDEN, WEIGHT, BIAS).logits(slice(1, 3)), PRODUCT[1:] + BIAS)
    assert torch.equal(Projection(PRODUCT).logits(slice(0, 2)), PRODUCT[:2])
    assert Projection(HIDDEN, WEIGHT).shape == Projection(PRODUCT).shape == (3, 4)


def test_the_product_goes_into_given_memory():
    out = torch.empty(2, 4)
    logits = Projection(HIDDEN, WEIGHT, BIAS).logits(slice(0, 2), out=out)
    assert torch.equal(out, PRODUCT[:2] + BIAS) and logits.data_ptr() == out.data_ptr()


def test_scale_comes_before_the_soft_cap():
    logits = Projection(HIDDEN, WEIGHT, scale=0.5, cap=2.0).logits()
    torch.testing.assert_close(logits, 2 * torch.tanh(PRODUCT * 0.5 / 2))


def test_the_gradient_passes_scale_and_soft_cap():
    product = PRODUCT.clone().requires_grad_()
    logits = 2 * torch.tanh(product * 0.5 / 2)
    (expected,) = torch.autograd.grad(logits, product, BIAS.expand(3, 4))
    projection = Projection(HIDDEN, WEIGHT, scale=0.5, cap=2.0)
    torch.testing.assert_close(projection.product_grad(BIAS.expand(3, 4), projection.logits()), expected)
    assert torch.equal(Projection(HIDDEN, WEIGHT).product_grad(PRODUCT, PRODUCT), PRODUCT)


def test_a_limited_vocabulary_is_the_first_ids():
    assert torch.equal(Projection(HIDDEN, WEIGHT, BIAS).limit_vocab(2).logits(), (PRODUCT + BIAS)[:, :2])
    assert torch.equal(Projection(PRODUCT).limit_vocab(3).logits(), PRODUCT[:, :3])
    assert Projection(HIDDEN, WEIGHT).limit_vocab(2).shape == (3, 2)


@pytest.mark.parametrize("projection", [Projection(HIDDEN, WEIGHT), Projection(PRODUCT)], ids=["product", "logits"])
def test_eos_has_no_probability_before_the_shortest_length(projection):
    """Rows of two tokens and of one; the shortest completion has one token; ids 1 and 3 end a completion."""
    labels = torch.tensor([[-100, 0, 1], [-100, -100, 2]])
    suppressed = projection.suppress_early_eos(labels, 1, [1, 3])
    p = suppressed.logits().softmax(-1)
    assert (p == 0).tolist() == [[False, True, False, True], [False] * 4, [False, True, False, True]]
    assert torch.equal(suppressed.logits(slice(1, 2)), PRODUCT[1:2])
    assert suppressed.logits().isfinite().all()
    assert torch.equal(projection.logits(), PRODUCT)  # The logits themselves are as before.
    assert torch.equal(projection.suppress_early_eos(labels, 0, [1, 3]).logits(), PRODUCT)
