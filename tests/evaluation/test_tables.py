"""An evaluation in the terminal: tables that fit its width, curves, completions side by side."""

from __future__ import annotations

import io

import pytest
from helpers.evaluation_helpers import evaluation_of, row_with
from rich.console import Console

from quarkrl.evaluation.results import CorpusRow, Evaluation, curves
from quarkrl.evaluation.tables import print_side_by_side, print_table

REFERENCE, BEST, WORST = row_with("reference", 0.5), row_with("best", 0.9, 2), row_with("worst", 0.4, 0)


def printed(evaluation: Evaluation, width: int = 100) -> list[str]:
    file = io.StringIO()
    print_table(evaluation, Console(file=file, width=width, highlight=False, markup=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_each_figure_has_half_its_interval_and_judges_have_blocks():
    assert printed(evaluation_of([REFERENCE, BEST, WORST])) == [
        "                         reference  best quantile  worst quantile",
        "reward                0.500 ±0.040   0.900 ±0.040    0.400 ±0.040",
        "toxicity probability  0.500 ±0.040   0.100 ±0.040    0.600 ±0.040",
        "vader",
        "  score               0.250 ±0.040   0.450 ±0.040    0.200 ±0.040",
        "perplexity             50.00 ±0.04    90.00 ±0.04     40.00 ±0.04",
        "dist-2                0.800 ±0.040   0.800 ±0.040    0.800 ±0.040",
        "diversity                        -              -               -",
        "not counted, completions of a perplexity from 10,000 on: reference 0, best 3, worst 0",
        "perplexity after a truncated prompt: reference 0, best 0, worst 7",
        "2 prompts, 2 samples per prompt, top-p 0.9, 20 tokens; perplexity under gpt2; "
        "± half of the 95 % bootstrap interval",
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_many_columns_become_several_tables_that_fit(width):
    evaluation = evaluation_of([REFERENCE, *(row_with(str(q), 0.2 * q + 0.1, q) for q in range(5))])
    lines = printed(evaluation, width)[:-2]
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("toxicity probability") for line in lines) >= 2
    headings = " ".join(line for line in lines if "quantile" in line)
    assert all(f"quantile {q}" in headings for q in range(5))


def test_a_curve_is_a_table_of_requested_value_reward_and_bar():
    rows = [REFERENCE, row_with("0", 0.2, 0), row_with("1", 0.5, 1), row_with("2", 0.9, 2)]
    lines = printed(evaluation_of([*rows, row_with("best γ=2", 0.95, 2, 2.0)]))
    start = next(i for i, line in enumerate(lines) if line.startswith("requested"))
    # A bar spans the intervals, from .17 to .95, in 10 blocks.
    assert [line.split() for line in lines[start + 2 : start + 5]] == [
        ["0", "0.200", "±0.040", "0.800", "20.00", "0.800", "-"],
        ["1", "0.500", "±0.040", "████", "0.500", "50.00", "0.800", "-"],
        ["2", "0.900", "±0.040", "█████████", "0.100", "90.00", "0.800", "-"],
    ]
    start = next(i for i, line in enumerate(lines) if line.startswith("guidance"))
    assert [line.split()[:2] for line in lines[start + 3 : start + 5]] == [["1", "0.900"], ["2", "0.950"]]


def test_curves_fit_80_columns():
    rows = [REFERENCE, *(row_with(str(quantile), 0.2 * quantile, quantile) for quantile in range(5))]
    lines = printed(evaluation_of([*rows, row_with("best γ=2", 0.95, 4, 2.0)]), 80)
    assert max(map(len, lines[:-1])) <= 80 and not any("…" in line for line in lines)


def test_two_quantiles_are_no_curve_and_a_guidance_curve_includes_1():
    assert curves([REFERENCE, BEST, WORST]) == []
    ((label, points),) = curves([REFERENCE, BEST, WORST, row_with("γ", 1, 2, 4.0), row_with("γ", 0, 2, 0.5)])
    assert label.startswith("guidance") and [scale for scale, _ in points] == [0.5, 1, 4]
    assert points[1][1] is BEST


def test_each_set_of_prompts_and_the_corpus_have_a_table():
    corpus = CorpusRow("reference", {"perplexity": 30.0, "rep/16": 0.25}, {"perplexity": (29, 31)}, {}, 1234)
    lines = printed(evaluation_of([REFERENCE, BEST, row_with("reference", 0.1, prompts="out")], (corpus,)))
    assert lines[0] == "in: 2 prompts" and "out: 2 prompts" in lines
    assert lines[lines.index("corpus: 7 texts, 1234 predicted tokens") + 2 :][:2] == [
        "perplexity  30.00 ±1.00",
        "rep/16            0.250",
    ]
    assert "skipped prompts of out: 4 too long" in lines
    assert "not counted (in), completions of a perplexity from 10,000 on: reference 0, best 3" in lines


def test_side_by_side_shows_the_prompts_with_the_reference_s_lowest_rewards():
    file = io.StringIO()
    print_side_by_side(evaluation_of([REFERENCE, BEST]), 1, Console(file=file, width=100))
    text = file.getvalue()  # The lowest reward is .2, of the second sample of the second prompt.
    assert "They said" in text and "reference d" in text and "best d" in text and "You are" not in text
