"""Check prose against the rules in `styles/quarkrl/`. Exit code 1 if a rule is broken.

    python tools/prose.py README.md docs        Markdown pages
    python tools/prose.py src                   docstrings and comments of Python files

The rules are in Vale's format, so that Vale reads the same files where it is installed. Vale itself is not a
dependency: its packages on PyPI and npm download a binary at run time. Three rule types of Vale are supported:
`existence`, `substitution` and `occurrence` (per sentence). Code blocks are skipped. A code span counts as one word.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

STYLE = Path(__file__).parents[1] / "styles" / "quarkrl"
_SENTENCE_END = re.compile(r"(?<=[.!?])[)\"”*]*\s+(?=[(\"“*]*[A-Z0-9\x00αβγΔ])")
_SECTION = re.compile(r"(?:Args|Attributes|Keys|Raises|Returns|Yields)\b.*:$")
_ARGUMENT = re.compile(r"^ {4}(?=\S)[^:]*: ")
_BLOCK_START = re.compile(r"^\s*(?:[-*+] |\d+\. |#+ |> )")


@dataclass(frozen=True)
class Block:
    """A paragraph, list item, heading or table cell: its plain text, and the line on which it starts."""

    line: int
    text: str


def load_rules(folder: Path = STYLE) -> list[dict[str, Any]]:
    """Return the rules of a Vale style, one per file."""
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yml"))]


def blocks_of(markdown: str) -> Iterator[Block]:
    """Yield the prose of a page block by block, without code blocks and HTML comments."""
    text = re.sub(r"<!--.*?-->", lambda match: "\n" * match[0].count("\n"), markdown, flags=re.S)
    paragraph: list[str] = []
    start, fenced = 1, False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fence = line.lstrip().startswith("```")
        table = line.lstrip().startswith("|")
        if fenced or fence or table or not line.strip() or _BLOCK_START.match(line):
            if paragraph:
                yield Block(start, _plain("\n".join(paragraph)))
            paragraph, start = [], number
        fenced ^= fence
        if fenced or fence or not line.strip():
            continue
        if table:
            yield from (Block(number, _plain(cell)) for cell in line.strip().strip("|").split("|"))
        else:
            start = start if paragraph else number
            paragraph.append(_BLOCK_START.sub("", line, count=1))


def _plain(text: str) -> str:
    """Remove Markdown from a block. A code span becomes one character, NUL, so that it counts as one word."""
    text = re.sub(r"(`+).+?\1", "\x00", text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\*\*|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", text)


def sentences_of(block: Block) -> Iterator[Block]:
    """Yield the sentences of a block with their lines."""
    position = 0
    for match in [*_SENTENCE_END.finditer(block.text), None]:
        end = match.start() if match else len(block.text)
        yield Block(block.line + block.text[:position].count("\n"), block.text[position:end].strip())
        position = match.end() if match else end


def check(markdown: str, rules: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Return the broken rules of a page as (line, message), in order of lines."""
    problems = []
    for rule in rules:
        if rule.get("scope") == "raw":
            for number, line in enumerate(markdown.splitlines(), 1):
                problems += [(number, rule["message"]) for pattern in rule["raw"] if re.search(pattern, line)]
            continue
        for block in blocks_of(markdown):
            for sentence in sentences_of(block):
                problems += [(sentence.line, message) for message in _check_sentence(sentence.text, rule)]
    return sorted(problems)


def _check_sentence(text: str, rule: dict[str, Any]) -> Iterator[str]:
    """Yield the messages of one rule for one sentence."""
    flags = re.IGNORECASE if rule.get("ignorecase") else 0
    words = " ".join(text.split())
    if rule["extends"] == "occurrence":
        count = len(re.findall(r"\S*[\w\x00]\S*", words))
        if count > rule["max"]:
            yield f"{rule['message']} ({count} words) “{words[:60]}…”".replace("\x00", "`…`")
    elif rule["extends"] == "substitution":
        for pattern, word in rule["swap"].items():
            for match in re.finditer(rf"\b(?:{pattern})\b", words, flags):
                yield rule["message"] % (match[0], word)
    else:
        for token in rule["tokens"]:
            for match in re.finditer(rf"\b(?:{token})\b", words, flags):
                yield rule["message"] % match[0]


def prose_of(path: Path) -> Iterator[Block]:
    """Yield the Markdown of a page, or the docstrings and the runs of comment lines of a Python file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield Block(1, text)
        return
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (docstring := ast.get_docstring(node)):
            yield Block(node.body[0].lineno, "\n".join(_markdown_of(docstring)))
    lines = [""] * (text.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            trailing = token.line[: token.start[1]].strip()  # A comment behind code is a paragraph of its own.
            lines[token.start[0] - 1] = ("- " if trailing else "") + token.string.lstrip("# ")
    yield Block(1, "\n".join(lines))


def _markdown_of(docstring: str) -> Iterator[str]:
    """Yield the lines of a docstring with its arguments as list items, and without indented code."""
    in_section = False
    for line in docstring.splitlines():
        if line and not line[0].isspace():
            in_section = bool(_SECTION.match(line))
            yield "" if in_section else line
        elif in_section:
            yield _ARGUMENT.sub("- ", line)
        else:
            yield ""


def main(arguments: list[str]) -> int:
    """Check files and folders. In a folder, check its Markdown pages, and its Python files if it has no pages."""
    rules, broken = load_rules(), 0
    for argument in arguments:
        folder = Path(argument)
        paths = sorted(folder.rglob("*.md")) or sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
        for path in paths:
            for prose in prose_of(path):
                for line, message in check(prose.text, rules):
                    print(f"{path}:{prose.line + line - 1}: {message}")
                    broken += 1
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
