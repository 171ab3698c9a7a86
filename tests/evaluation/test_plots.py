"""The curves of an evaluation as an image."""

from __future__ import annotations

import pytest
from helpers.evaluation_helpers import evaluation_of, row_with

from quarkrl.errors import UserError
from quarkrl.evaluation.plots import check_plot, plot_curves

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_curves_of_each_set_are_drawn_and_a_repeated_plot_is_identical(suffix, tmp_path):
    rows = [row_with("reference", 0.5)]
    rows += [row_with(str(q), 0.2 * q, q, prompts=name) for name in ("in", "out") for q in range(3)]
    rows += [row_with("best γ=2", 0.9, 2, 2.0, prompts=name) for name in ("in", "out")]
    path = tmp_path / "plots" / f"curve.{suffix}"
    plot_curves(evaluation_of(rows), path)
    first = path.read_bytes()
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        plot_curves(evaluation_of(rows), path)
        assert path.read_bytes() == first


def test_an_unknown_suffix_is_an_error():
    with pytest.raises(UserError, match=r"^plot 'curve\.gif': must end in .*\.png"):
        check_plot("curve.gif")


def test_an_evaluation_without_a_curve_is_an_error(tmp_path):
    rows = [row_with("reference", 0.5), row_with("best", 0.9, 2), row_with("worst", 0.4, 0)]
    with pytest.raises(UserError, match=r"^plot: .*--quantiles all"):
        plot_curves(evaluation_of(rows), tmp_path / "curve.png")
