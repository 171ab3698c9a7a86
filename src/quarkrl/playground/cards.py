"""Columns of completions as HTML. All text of models, prompts and rewards is escaped."""

from collections.abc import Sequence
from html import escape
from itertools import zip_longest

from quarkrl.playground.answers import Answer, Column, Turn, low_score
from quarkrl.playground.settings import Settings


def columns_html(columns: Sequence[Column], settings: Settings, query: str = "") -> str:
    """Return the columns, one beside the other where there is space.

    Args:
        columns: the columns, finished or not.
        settings: of the columns, with the messages that they answer or the text that they continue.
        query: of the URL that restores the page; its script reads it here.
    """
    low = low_score(list(columns))
    body = "".join(_column_html(column, settings, low) for column in columns)
    legend = "▼ marks the lowest fifth of the range of scores on this page."
    legend = "" if low is None else f'<p class="q-legend">{legend}</p>'
    return f'<div class="q-columns" data-query="{escape(query)}">{body}</div>{legend}'


def error_html(message: str) -> str:
    """Return a user error as one line; "" for no error."""
    return f'<p class="q-error" role="alert">{escape(message)}</p>' if message else ""


def _column_html(column: Column, settings: Settings, low: float | None) -> str:
    mean = "" if column.mean is None else f'<span class="q-mean">mean {column.mean:.2f}</span>'
    pairs = zip_longest(settings.messages, column.turns)
    turns = "".join(_turn_html(message, turn, settings.chat, low) for message, turn in pairs)
    return (
        f'<section class="q-column" style="grid-row: span {len(settings.messages) + 1}"><header>'
        f'<h2>{escape(column.title)}</h2>{mean}<span class="q-detail">{escape(column.detail)}</span></header>'
        f"{turns}</section>"
    )


def _turn_html(message: str, turn: Turn | None, is_chat: bool, low: float | None) -> str:
    """A message and its answers, or the completions of a text. A turn that is being sampled is None."""
    bubble = f'<p class="q-message">{escape(message)}</p>' if is_chat else ""
    if turn is None:
        return f'<div>{bubble}<p class="q-waiting">sampling …</p></div>'
    note = f'<p class="q-note">{escape(turn.note)}</p>' if turn.note else ""
    cards = "".join(_card_html(answer, "" if is_chat else message, low) for answer in turn.answers)
    return f"<div>{bubble}{note}{cards}</div>"


def _card_html(answer: Answer, prompt: str, low: float | None) -> str:
    is_low = low is not None and answer.score is not None and answer.score <= low
    badges = "".join(
        _badge_html(name, score, is_low and not i) for i, (name, score) in enumerate(answer.scores.items())
    )
    text = escape(answer.text) or '<span class="q-empty">(empty)</span>'
    prompt_html = f'<span class="q-prompt">{escape(prompt)}</span>' if prompt else ""
    return f'<article class="q-card{" q-low" if is_low else ""}"><p>{prompt_html}{text}</p>{badges}</article>'


def _badge_html(name: str, score: float | None, is_low: bool) -> str:
    number = "no score" if score is None else f"{score:.2f}"
    mark = '<span title="among the lowest scores">▼</span> ' if is_low else ""
    return f'<span class="q-score{" q-lowest" if is_low else ""}">{mark}{escape(name)} <b>{number}</b></span>'
