"""The choice of the next token: options, nucleus, inverse transform sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.statistics import chi_square
from transformers import TopPLogitsWarper

from quarkrl.errors import UserError
from quarkrl.sampling.strategy import Sampling, keep_nucleus, sample_by_inverse_transform

# Options


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: must be at least 1"),
        ({"min_new_tokens": -1}, "min_new_tokens -1"),
        ({"min_new_tokens": 21}, "min_new_tokens 21: must be .* 20"),
        ({"temperature": 0.0}, "temperature 0.0: must be at least 1e-06 .*do_sample=False"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1: must be above 0 and at most 1"),
    ],
)
def test_impossible_options_are_refused(options, wanted):
    with pytest.raises(UserError, match=wanted):
        Sampling(**options)


# Nucleus


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
    found = keep_nucleus(probabilities, top_p)
    assert sorted(np.flatnonzero(found[0])) == sorted(kept)
    assert (found[0, kept] == probabilities[0, kept]).all()


def test_equally_likely_tokens_stay_together():
    assert (keep_nucleus(torch.full((1, 4), 0.25), 0.6) == 0.25).all()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_it_keeps_what_transformers_keeps(top_p):
    scores = torch.randn(20, 500, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, 490:] = -torch.inf  # Tokens that cannot come.
    scores[3] = -torch.inf
    scores[3, 7] = 0.0  # One that must.
    kept = TopPLogitsWarper(top_p)(torch.zeros(20, 1), scores.clone()).isfinite()
    assert torch.equal(keep_nucleus(scores.softmax(-1), top_p) > 0, kept)


# Inverse transform sampling


def test_inverse_transform_by_hand():
    # Probabilities .2, 0, .5, .3: below .2 is token 0, then token 2 to .7, then token 3.
    weights = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    expected = {0.0: 0, 0.19: 0, 0.21: 2, 0.69: 2, 0.71: 3, 0.99: 3}
    for number, token in expected.items():
        assert sample_by_inverse_transform(weights, torch.tensor([number])).tolist() == [token]
    assert sample_by_inverse_transform(8 * weights.repeat(2, 1), torch.tensor([0.21, 0.71])).tolist() == [2, 3]


# The ends of what single precision holds in [0, 1), and the 1 that rounding makes of a double just below it.
@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-24, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_inverse_transform_never_picks_what_has_no_probability(number, seed):
    weights = (4 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    weights[:, :100] = weights[:, 900:] = weights[:, 300:500] = 0
    chosen = sample_by_inverse_transform(weights, torch.full((50,), number))
    assert (weights.gather(-1, chosen[:, None]) > 0).all()


def test_inverse_transform_follows_the_softmax():
    scores = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0, 0.5]).repeat(20_000, 1)
    sampling = Sampling(max_new_tokens=1, top_p=1.0)
    numbers = torch.from_numpy(sampling.uniforms(20_000, 0))[:, 0]
    counts = sampling.next_tokens(scores, numbers).bincount(minlength=6).numpy()
    shares = scores[0].softmax(-1).numpy()
    assert counts[1] == 0
    assert chi_square(counts[shares > 0], shares[shares > 0]) < 18.5  # 99.9 %, 4 degrees of freedom
