"""A report: what is in it, what it does without, and that nothing in it can act."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from helpers.run_directories import builtin_tokenizer, write_run

from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.report import write_comparison, write_report
from quarkrl.report.pool_history import read_pool_history
from quarkrl.report.run_files import read_run
from quarkrl.report.samples import MAX_ROWS, choose_rows, truncate_to_budget
from quarkrl.report.sections import frontier, headlines

HOSTILE = ["<script>window.hit=1</script>", '"><img src=x onerror="f()">', "</script><b onclick='f()'>"]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The report of a run with an evaluation, of which every text is hostile."""
    run = write_run(tmp_path_factory.mktemp("runs") / "<run>", HOSTILE[:2], HOSTILE, iterations=3)
    return text_of(write_report(run))


@pytest.fixture(scope="module")
def young(tmp_path_factory):
    """A run that has sampled once, and has no evaluation."""
    return write_run(tmp_path_factory.mktemp("runs") / "young", iterations=1, evaluated=False)


def text_of(path) -> str:
    return path.read_text(encoding="utf-8")


def test_report_shows_figures_charts_and_completions(page):
    assert "<h1>kindness</h1>" in page and "run <b>&lt;run&gt;</b>" in page
    assert "before 0.400 ±&#8239;0.100" in page and re.search(r"0\.900\s*<small>±&#8239;0\.100", page)
    assert "Better: the reward went from 0.400 to 0.900" in page and "On 2 held-out prompts × 1 samples;" in page
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page)
    assert {"Reward by iteration", "Quantile edges", "Reward against KL", "KL to the reference"} <= set(titles)
    assert "Control: reward over the requested quantile" not in titles  # Two quantiles are no curve.
    assert page.count('role="img" aria-label="') == len(titles)
    body = page.partition('id="completions"')[2]
    assert body.count("<tr>") - 1 == 3 * 6  # All samples: 3 iterations of 2 prompts with 3 completions.


def test_texts_cannot_act(page):
    assert page.count("<script") == 1 and page.count("</script>") == 1
    assert "<img" not in page and "<b onclick" not in page and "&lt;script&gt;window.hit=1&lt;/script&gt;" in page
    assert "default-src 'none'" in page


def test_file_refers_to_no_other(page):
    markup = re.sub(r"&lt;.*?&gt;|&#34;.*?&gt;", "", page)  # Without the hostile texts.
    for name in ("src=", "href=", "url(", "@import", "<link", "<iframe"):
        assert name not in markup, name
    # Namespaces of SVG are names, not addresses.
    assert set(re.findall(r"\w+://[\w./]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert " id=" not in "".join(re.findall(r"<svg.*?</svg>", page, re.S))  # Two charts would have the same.


def test_young_run_without_evaluation_shows_what_it_explored(young):
    page = text_of(write_report(young))
    assert "the run has no evaluation on held-out prompts" in page and "Prompt by prompt" not in page
    assert "not finished, iteration 1 of 1" in page
    assert "Reward by iteration" in page and "Quantile edges" not in page


def test_pool_is_read_iteration_by_iteration(tmp_path):
    history = read_pool_history(write_run(tmp_path / "run") / "pool", {"num_quantiles": 3})
    # Rewards 0/6 … 5/6 twice: edges at ranks 4 and 8 of 12, and at 2 and 4 of 6.
    np.testing.assert_allclose(history.edges[:, 0], [[2 / 6, 4 / 6], [2 / 6, 4 / 6]])
    assert history.sizes(0).tolist() == [[2, 2, 2], [2, 2, 2]]
    assert history.lengths.shape == (12,) and history.diversity_samples == 6


def test_frontier_pairs_the_reward_with_the_kl_before_it(tmp_path):
    points = frontier(read_run(write_run(tmp_path / "run", iterations=3)))
    np.testing.assert_allclose(points, [(0.0, 0.4), (0.1, 0.5), (0.2, 0.6)])


def test_change_is_good_only_if_intervals_are_apart(tmp_path):
    reward, perplexity = headlines(read_run(write_run(tmp_path / "run")).results)
    assert reward.good is True and perplexity.good is None
    assert (reward.before, reward.after) == (0.4, 0.9) and reward.margins == pytest.approx((0.1, 0.1))


def test_large_pool_is_sampled_from_every_iteration(tmp_path):
    history = read_run(write_run(tmp_path / "run", completions=[f" {i}" for i in range(40)], iterations=4)).history
    rows = choose_rows(history, lambda: None, limit=60)
    assert len(rows) == 60 and {row.iteration for row in rows} == {1, 2, 3, 4}
    first = [row for row in rows if row.iteration == 4 and row.kind == "best"]
    assert [row.rewards[0] for row in first] == [i / 80 for i in (79, 78, 77, 76, 75)]
    assert rows[0] == first[0] and rows[0].quantiles == [2]


def test_more_iterations_than_rows_leaves_some_out(tmp_path):
    history = read_run(write_run(tmp_path / "run", completions=[" a", " b"], iterations=9)).history
    assert {row.iteration for row in choose_rows(history, lambda: None, limit=9)} == {1, 5, 9}


def test_long_texts_are_truncated_to_two_megabytes(tmp_path):
    run = write_run(tmp_path / "run", prompts=["<" * 900] * 2, completions=["b" * 99, "c" * 99, "&" * 900 + "e"])
    (row, *_) = choose_rows(read_run(run).history, builtin_tokenizer)
    (cut, *_) = truncate_to_budget([row] * MAX_ROWS, 1_000_000)
    assert cut.prompt.startswith("…") and cut.completion.endswith("…")
    assert (
        len(cut.prompt) == len(cut.completion) == 60
    )  # 1,500 × 60 × (4 + 5) bytes of &lt; and &amp; are below a million.


def test_comparison_shows_the_options_that_differ(tmp_path):
    runs = [write_run(tmp_path / name, kl_coef=coef, seed=1) for name, coef in (("a", 0.1), ("b", 0.2))]
    page = text_of(write_comparison(runs, tmp_path / "both.html"))
    options = page.partition("Options that differ")[2]
    assert re.search(r">kl_coef</th><td>0.1</td><td>0.2</td>", options) and "seed" not in options
    assert "Reward against KL" in page and "<h1>2 runs</h1>" in page
    assert "<td>2 held-out prompts × 1</td>" in page and "different rewards" not in page
    assert "reward, worst quantile</th><td>0.200<small> ±&#8239;0.100" in page


def test_a_comparison_of_different_rewards_says_so(tmp_path):
    runs = [write_run(tmp_path / name, reward=name) for name in ("kindness", "brevity")]
    assert "The runs have different rewards" in text_of(write_comparison(runs, tmp_path / "both.html"))


def test_a_best_quantile_that_is_large_by_its_ceiling_is_explained(tmp_path):
    page = text_of(write_report(write_run(tmp_path / "run", reward_ceiling=0.95)))
    assert "Rewards from the reward_ceiling of 0.95 on count as equal" in page


def test_command_writes_the_report_into_the_run(young, capsys):
    assert main(["report", str(young)]) == 0
    assert (young / "report.html").stat().st_size < 2_000_000
    assert f"report: {young / 'report.html'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("missing", {}, "must be the directory of a run"),
        ("empty", {}, "must hold samples or a model"),
        ("run", {"output": "report.pdf"}, "must end in .html"),
    ],
)
def test_bad_input_is_one_line(tmp_path, run, options, message):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        write_report(tmp_path / run, **options)


def test_missing_library_is_one_line_that_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match="pip install vl-convert-python"):
        write_report(write_run(tmp_path / "run"))


def test_failure_to_draw_is_a_note_at_the_end_of_a_run(tmp_path, monkeypatch, capsys):
    from quarkrl.cli.report import try_to_report

    run = write_run(tmp_path / "run")
    next((run / "pool").glob("*.parquet")).write_bytes(b"damaged")
    assert try_to_report(run) is None
    assert f"Try again: quarkrl report {run}" in capsys.readouterr().err


def test_damaged_results_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text(json.dumps({"results": [1]}), encoding="utf-8")
    assert read_run(run).results is None
