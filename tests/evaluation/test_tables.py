"""An evaluation as people see it: tables that fit, curves, an image."""

from __future__ import annotations

import io
from math import nan

import numpy as np
import pytest
from rich.console import Console

from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.corpus import CorpusRow
from quarkrl.evaluation.evaluate import Evaluation, Row
from quarkrl.evaluation.plots import check_plot, plot_curves
from quarkrl.evaluation.tables import curves, print_side_by_side, print_table

PROMPTS = load_prompts(["You are", "They said"])


def row(name: str, reward: float, quantile: int | None = None, scale: float = 1.0, prompts: str = "in") -> Row:
    figures = {"reward": reward, "toxicity probability": 1 - reward, "vader: score": reward / 2}
    figures |= {"perplexity": 100 * reward, "dist-2": 0.8, "rep-2": 1.5, "diversity": nan}
    return Row(
        name=name,
        figures=figures,
        left_out={"unscored": 0, "perplexity_dropped": 3 if name == "best" else 0},
        completions=[[f"{name} a", f"{name} b"], [f"{name} c", f"{name} d"]],
        rewards=np.array([[0.5, nan], [0.9, 0.2]]),
        prompts_name=prompts,
        quantile=quantile,
        guidance_scale=scale,
        intervals={key: (value - 0.03, value + 0.05) for key, value in figures.items()},
        scores={},
        perplexities=np.ones((2, 2)),
    )


def evaluation(rows: list[Row], corpus: tuple[CorpusRow, ...] = ()) -> Evaluation:
    sets = {r.prompts_name: PROMPTS for r in rows}
    protocol = {
        "prompts": {name: {"count": 2, "left_out": {"too long": 4} if name == "out" else {}} for name in sets},
        "samples_per_prompt": 2,
        "sampling": {"top_p": 0.9, "max_new_tokens": 20, "do_sample": True},
        "perplexity_model": "gpt2",
        "corpus": {"count": 7},
    }
    return Evaluation(rows, protocol, sets, list(corpus))


def printed(found: Evaluation, width: int = 100) -> list[str]:
    file = io.StringIO()
    print_table(found, Console(file=file, width=width, highlight=False, markup=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


REFERENCE, BEST, WORST = row("reference", 0.5), row("best", 0.9, 2), row("worst", 0.4, 0)


def test_metrics_stand_beside_half_their_interval_and_judges_apart():
    assert printed(evaluation([REFERENCE, BEST, WORST])) == [
        "                         reference    best token   worst token",
        "reward                0.500 ±0.040  0.900 ±0.040  0.400 ±0.040",
        "toxicity probability  0.500 ±0.040  0.100 ±0.040  0.600 ±0.040",
        "vader",
        "  score               0.250 ±0.040  0.450 ±0.040  0.200 ±0.040",
        "perplexity             50.00 ±0.04   90.00 ±0.04   40.00 ±0.04",
        "dist-2                0.800 ±0.040  0.800 ±0.040  0.800 ±0.040",
        "diversity                        -             -             -",
        "left out, perplexity dropped: reference 0, best 3, worst 0",
        "2 prompts, 2 samples each, top-p 0.9, 20 tokens; perplexity under gpt2; ± half of the 95 % bootstrap interval",
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_many_columns_become_several_tables_that_fit(width):
    found = evaluation([REFERENCE, *(row(str(q), 0.2 * q + 0.1, q) for q in range(5))])
    lines = printed(found, width)[:-2]
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("toxicity probability") for line in lines) >= 2
    assert {f"token {q}" in line for q in range(5) for line in lines if "token" in line}


def test_the_control_curve_is_a_table_of_what_was_asked_for_and_what_came_of_it():
    rows = [REFERENCE, row("0", 0.2, 0), row("1", 0.5, 1), row("2", 0.9, 2), row("best γ=2", 0.95, 2, 2.0)]
    lines = printed(evaluation(rows))
    start = next(i for i, line in enumerate(lines) if line.startswith("quantile asked for"))
    # A bar reaches from the lowest end of an interval, .17, to the highest, .95: 12 blocks.
    assert [line.split() for line in lines[start + 1 : start + 4]] == [
        ["0", "0.200", "±0.040", "0.800", "20.00", "0.800", "-"],
        ["1", "0.500", "±0.040", "█████", "0.500", "50.00", "0.800", "-"],
        ["2", "0.900", "±0.040", "███████████", "0.100", "90.00", "0.800", "-"],
    ]
    start = next(i for i, line in enumerate(lines) if line.startswith("guidance scale γ"))
    assert [line.split()[:2] for line in lines[start + 1 : start + 3]] == [["1", "0.900"], ["2", "0.950"]]


def test_two_quantiles_make_no_curve_and_guidance_starts_at_one():
    assert curves([REFERENCE, BEST, WORST]) == []
    ((label, points),) = curves([REFERENCE, BEST, WORST, row("γ", 1, 2, 4.0), row("γ", 0, 2, 0.5)])
    assert label.startswith("guidance") and [scale for scale, _ in points] == [0.5, 1, 4]
    assert points[1][1] is BEST


def test_every_set_of_prompts_has_its_table_and_the_corpus_one():
    corpus = CorpusRow("reference", {"perplexity": 30.0, "rep/16": 0.25}, {"perplexity": (29, 31)}, {}, 1234)
    lines = printed(evaluation([REFERENCE, BEST, row("reference", 0.1, prompts="out")], (corpus,)))
    assert lines[0] == "in: 2 prompts" and "out: 2 prompts" in lines
    assert lines[lines.index("corpus: 7 texts, 1234 tokens predicted") + 2 :][:2] == [
        "perplexity  30.00 ±1.00",
        "rep/16            0.250",
    ]
    assert "prompts left out of out: 4 too long" in lines
    assert "left out (in), perplexity dropped: reference 0, best 3" in lines


def test_side_by_side_shows_where_the_reference_is_at_its_worst():
    file = io.StringIO()
    print_side_by_side(evaluation([REFERENCE, BEST]), 1, Console(file=file, width=100))
    text = file.getvalue()  # .2 is the lowest reward: the second sample of the second prompt.
    assert "They said" in text and "reference d" in text and "best d" in text and "You are" not in text


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_curves_are_drawn_for_each_set_the_same_each_time(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(str(q), 0.2 * q, q, prompts=name) for name in ("in", "out") for q in range(3)]
    rows += [row("best γ=2", 0.9, 2, 2.0, prompts=name) for name in ("in", "out")]
    rows.insert(0, REFERENCE)
    path = tmp_path / "plots" / f"curve.{suffix}"
    plot_curves(evaluation(rows), path)
    first = path.read_bytes()
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        plot_curves(evaluation(rows), path)
        assert path.read_bytes() == first


def test_what_cannot_be_drawn_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"curve\.gif': want a name that ends in .png, .svg, .pdf"):
        check_plot("curve.gif")
    with pytest.raises(UserError, match="no curve to plot: want --quantiles all"):
        plot_curves(evaluation([REFERENCE, BEST, WORST]), tmp_path / "curve.png")
