"""A tiny model with reward tokens."""

from __future__ import annotations

from helpers.tiny_models import tiny_model, tiny_tokenizer

from quarkrl.models.conditioning import Conditioning


def add_reward_tokens(
    tokenizer=None, num_quantiles: int = 3, attributes=("reward",), architecture="gpt2", seed=0, **model
):
    """Add reward tokens to a tiny model: the conditioning, the tokenizer that knows them, and the model."""
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny_model(architecture, tokenizer, **model)
    conditioning, extended = Conditioning.add_to(tokenizer, model, num_quantiles, attributes, seed)
    return conditioning, extended, model


def reward_tokens(attributes, token_ids, start_ids, vocab_size) -> Conditioning:
    """A conditioning by reward tokens with these ids, `(A, K)`."""
    prefixes = tuple(tuple((i,) for i in row) for row in token_ids)
    return Conditioning(tuple(attributes), prefixes, tuple(start_ids), vocab_size)
