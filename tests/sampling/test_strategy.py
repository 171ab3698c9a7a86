"""The nucleus: which tokens stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from quarkrl.sampling.strategy import nucleus


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.05, [0]),  # never none
        (0.45, [0]),
        (0.499, [0]),
        (0.51, [0, 2]),
        (0.85, [0, 2, 1]),
        (0.95, [0, 2, 1, 3]),
    ],
)
def test_the_nucleus_is_the_fewest_tokens_that_hold_top_p(top_p, kept):
    probabilities = torch.tensor([[0.5, 0.1251, 0.25, 0.1249]])  # No tie.
    found = nucleus(probabilities, top_p)
    assert sorted(np.flatnonzero(found[0])) == sorted(kept)
    assert (found[0, kept] == probabilities[0, kept]).all()


def test_equally_likely_tokens_stay_together():
    assert (nucleus(torch.full((1, 4), 0.25), 0.6) == 0.25).all()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_it_keeps_what_transformers_keeps(top_p):
    scores = torch.randn(20, 500, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, 490:] = -torch.inf  # Tokens that cannot come.
    scores[3] = -torch.inf
    scores[3, 7] = 0.0  # One that must.
    kept = TopPLogitsWarper(top_p)(torch.zeros(20, 1), scores.clone()).isfinite()
    assert torch.equal(nucleus(scores.softmax(-1), top_p) > 0, kept)
