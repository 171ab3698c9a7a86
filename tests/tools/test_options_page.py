"""docs/options.md is what the declarations of the options say."""

from __future__ import annotations

from tools.options_page import PAGE, page


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tools.options_page"


def test_an_option_has_its_default_limits_and_resume_rule():
    entries = {line.split("`")[1]: line for line in page().splitlines() if line.startswith("- `")}
    assert entries["num_quantiles"].startswith("- `num_quantiles` (`5`): ")
    assert entries["num_quantiles"].endswith("Valid: at least 2. Resume: no.")
    assert entries["draw"].endswith("Valid: uniform or balanced. Resume: from a checkpoint.")
    assert entries["num_iterations"].endswith("Resume: yes.")
    assert entries["eval_top_p"].endswith("Resume: depends.")
    assert entries["reward"].startswith("- `reward` (required): ")
