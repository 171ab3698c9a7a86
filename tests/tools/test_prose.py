"""`tools/prose.py` finds long sentences and banned words in prose, and nothing in code."""

import pytest

from tools.prose import check, load_rules, main

TWENTY_SIX_WORDS = "Word " + "word " * 24 + "word."


@pytest.fixture(scope="module")
def rules():
    return load_rules()


def test_a_sentence_of_26_words_is_reported_with_its_line(rules):
    ((line, message),) = check(f"# Title\n\nShort one. {TWENTY_SIX_WORDS}\n", rules)
    assert line == 3 and "26" in message


def test_a_sentence_of_25_words_is_allowed(rules):
    assert check("Word " + "word " * 23 + "word. Next one.", rules) == []


def test_list_items_and_paragraphs_are_separate_sentences(rules):
    half = "word " * 14
    assert check(f"- {half}\n- {half}\n\n{half}\n\n| {half} |\n| {half} |\n", rules) == []


def test_a_code_span_counts_as_one_word_and_a_code_block_as_none(rules):
    code = "`" + "word " * 40 + "`"
    assert check(f"See {code}.\n\n```sh\n{TWENTY_SIX_WORDS} goes on from\n```\n", rules) == []


def test_a_paraphrase_is_reported_with_the_fields_word_across_a_line_break(rules):
    ((line, message),) = check("The run goes on\nfrom the checkpoint.", rules)
    assert line == 1 and "resume" in message


def test_a_table_row_wider_than_the_screen_is_reported(rules):
    wide = "| " + "x" * 130 + " |"
    assert [line for line, _ in check(f"| a |\n|---|\n{wide}\n", rules)] == [3]


def test_the_command_fails_on_a_page_that_breaks_a_rule(tmp_path, capsys):
    (tmp_path / "good.md").write_text("All is well.", encoding="utf-8")
    assert main([str(tmp_path)]) == 0
    (tmp_path / "bad.md").write_text(TWENTY_SIX_WORDS, encoding="utf-8")
    assert main([str(tmp_path)]) == 1
    assert "bad.md:1" in capsys.readouterr().out


def test_docstrings_and_comments_of_python_files_are_checked_and_their_code_is_not(tmp_path, capsys):
    lines = ['"""A module."""', "", "# The run goes on", "# from there.", f'text = "{TWENTY_SIX_WORDS}"']
    (tmp_path / "module.py").write_text("\n".join(lines), encoding="utf-8")
    assert main([str(tmp_path)]) == 1
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [f"{tmp_path}/module.py:3"]
