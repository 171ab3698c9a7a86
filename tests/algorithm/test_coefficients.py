"""β and α: fixed without a target, else multiplied by 1 ± clip(measured / target - 1, ±0.2) * samples / horizon."""

from __future__ import annotations

import pytest

from quarkrl.algorithm.coefficients import Coefficients


@pytest.mark.parametrize(
    ("kl", "entropy", "expected"),
    [
        (3.3, 40, (0.1 * (1 + 0.1 * 0.05), 0.06)),  # KL a tenth above its target: β grows.
        (2.7, 40, (0.1 * (1 - 0.1 * 0.05), 0.06)),
        (99, 40, (0.1 * (1 + 0.2 * 0.05), 0.06)),  # Clipped.
        (0, 40, (0.1 * (1 - 0.2 * 0.05), 0.06)),
        (3, 44, (0.1, 0.06 * (1 - 0.1 * 0.05))),  # Entropy a tenth above its target: α shrinks.
        (3, 0, (0.1, 0.06 * (1 + 0.2 * 0.05))),
    ],
)
def test_coefficients_move_towards_their_targets(kl, entropy, expected):
    coefficients = Coefficients(0.1, 0.06, kl_target=3, entropy_target=40, horizon=2000)
    coefficients.adapt(kl, entropy, samples=100)  # 100 / 2000 = 0.05
    assert coefficients.adaptive
    assert (coefficients.kl_coef, coefficients.entropy_coef) == pytest.approx(expected)


def test_coefficients_without_targets_are_fixed():
    coefficients = Coefficients(0.1, 0.06)
    coefficients.adapt(99, 99, samples=100)
    assert not coefficients.adaptive
    assert coefficients.current == {"kl_coef": 0.1, "entropy_coef": 0.06}


def test_a_coefficient_without_a_target_is_fixed_while_the_other_adapts():
    coefficients = Coefficients(0.1, 0.06, kl_target=1, horizon=100)
    coefficients.adapt(9, 9, samples=100)
    assert coefficients.current == {"kl_coef": pytest.approx(0.1 * 1.2), "entropy_coef": 0.06}
