"""`read_rating`: the rating in a judge's answer, or None. It is never guessed.

The answer is parsed as JSON first, then searched for ratings that are marked as such, like "**Score:** 8". Ratings that
differ are no rating, unless one is marked as the final one. The rated text may contain a rating too, and the judge may
quote it.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

NUMBER = r"[+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?"

_TAG = r"(?:think|thinking|thought|thoughts|reason|reasoning|reflection|scratchpad)"
_REASONING = re.compile(
    rf"(?P<opening><{_TAG}>|\[THINK\]|◁think▷)|</{_TAG}>|\[/THINK\]|◁/think▷",
    re.IGNORECASE,
)

_NAMES = ("score", "rating")
_DECORATION = r"[ \t*_`\"'{(\[]*"
# After the number: no more digits, no range ("7-8", "7 to 8"), no percentage.
_END = r"(?![0-9]|[.,][0-9]|\s*(?:-|–|to\b)\s*[0-9]|\s*%)"
_VALUE = rf"(?P<value>{NUMBER}){_END}(?:[ \t*_`\"']*(?:/|\bout of\b|\bof\b)\s*(?P<best>{NUMBER}){_END})?"
_NAME = (
    rf"(?<![\w-])(?:(?P<qualifier>[a-z]+)[ \t]+)?(?:{'|'.join(_NAMES)})"
    r"(?:\s*\([^()\n]{0,40}\)|[ \t]+out of [0-9]+)?[ \t*_`\"']*"
)
_MARKS = [
    # "Score: 8", "**Final score (1-10):** 8/10", "'score': 8", "Rating = [[8]]".
    re.compile(rf"{_NAME}[:=：]{_DECORATION}{_VALUE}", re.IGNORECASE),
    # "### Score", and "8" alone in the next line.
    re.compile(rf"{_NAME}[:=：]?[ \t*_]*\n[\s*_`]*{_VALUE}[ \t*_`.]*(?:\n|$)", re.IGNORECASE),
    re.compile(rf"<(?P<qualifier>)(?:{'|'.join(_NAMES)})>\s*{_VALUE}\s*</", re.IGNORECASE),
    re.compile(rf"\\boxed(?P<qualifier>)\s*\{{\s*{_VALUE}\s*\}}"),
]
_ONLY_A_NUMBER = re.compile(rf"[\s*_`\"']*{_VALUE}[\s*_`\"'.]*")
_FINAL = {"final", "overall", "total"}
_LIMITS = {"max", "maximum", "min", "minimum", "best", "worst", "highest", "lowest", "possible", "perfect"}


def read_rating(content: str, low: float, high: float, *, truncated: bool = False) -> float | None:
    """Return the rating in a judge's answer, or None if there is none from `low` to `high`, or there are several.

    Args:
        content: the answer.
        low: the worst rating.
        high: the best rating.
        truncated: the answer is incomplete, so a number at its end is too.
    """
    content = _without_reasoning(content).replace("−", "-").strip()
    if truncated:
        content = re.sub(r"[0-9.,]+$", "", content)
    ratings = {_number(value, high) for value in _json_ratings(content)} or _marked_ratings(content, high)
    if not ratings and not truncated:
        ratings = {_number(content, high)}
    rating = ratings.pop() if len(ratings) == 1 else None
    return rating if rating is not None and low <= rating <= high else None


def _without_reasoning(content: str) -> str:
    """The answer without its reasoning, in one pass. A tag that only closes has been opened by the chat template."""
    pieces: list[str] = []
    start: int | None = 0  # Of the piece; None within reasoning.
    for tag in _REASONING.finditer(content):
        if not tag["opening"]:
            if start is not None:
                pieces.clear()
            start = tag.end()
        elif start is not None:
            pieces.append(content[start : tag.start()])
            start = None
    if start is not None:
        pieces.append(content[start:])
    return "".join(pieces)


def _json_ratings(content: str) -> Iterator[Any]:
    """The ratings in the JSON objects of a text, of any type."""
    decoder, position = json.JSONDecoder(parse_int=float), 0
    while (position := content.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(content, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        yield from _ratings_of(value)


def _ratings_of(value: Any) -> list[Any]:
    """The ratings in a JSON value: those of the outermost level that has one."""
    level = [value]
    while level:
        objects = [item for item in level if isinstance(item, dict)]
        if ratings := [item[key] for item in objects for key in item if key.strip().lower() in _NAMES]:
            return ratings
        children = [child for item in objects for child in item.values()]
        level = children + [child for item in level if isinstance(item, list) for child in item]
    return []


def _number(value: Any, high: float) -> float | None:
    """The number that a JSON value, or a text of nothing else, is."""
    if isinstance(value, str):
        match = _ONLY_A_NUMBER.fullmatch(value)
        return _value(match, high) if match else None
    return value if isinstance(value, float) else None


def _marked_ratings(content: str, high: float) -> set[float | None]:
    """The ratings that are marked as such; those that are marked as final, if there are any."""
    matches = [match for mark in _MARKS for match in mark.finditer(content)]
    qualified = [((match["qualifier"] or "").lower(), _value(match, high)) for match in matches]
    final = {value for qualifier, value in qualified if qualifier in _FINAL}
    return final or {value for qualifier, value in qualified if qualifier not in _LIMITS}


def _value(match: re.Match[str], high: float) -> float | None:
    """The rating of a match; None if it is on another scale, as in "4/5" on a scale of 1 to 10."""
    best = match["best"]
    return float(match["value"]) if best is None or float(best) == high else None
