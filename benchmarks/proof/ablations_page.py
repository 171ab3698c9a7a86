"""Make docs/NAME.md and its pictures from the files that `run.py --matrix NAME.yaml` has written.

NAME is that of the matrix: ablations or kinds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page import Point, draw, points, table


def write(matrix: dict[str, Any], results: Path, docs: Path) -> Path:
    """Write the page and its pictures into `docs`; return its file."""
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    name = matrix["name"]
    lines = [(Path(__file__).parent / f"{name}.md").read_text(encoding="utf-8")]
    for task, facts in matrix["tasks"].items():
        base, found = points(results / task)
        if base is not None:
            for group in dict.fromkeys(method["group"] for method in matrix["methods"].values()):
                title, figure = ", ".join(filter(None, [facts.get("title"), group])), f"{facts['unwanted']} probability"
                lines += section(title, group, matrix["methods"], base, found, figure, images)
    file = docs / f"{name}.md"
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return file


def section(
    title: str, group: str, methods: dict[str, Any], base: Point, found: list[Point], figure: str, images: Path
) -> Iterator[str]:
    """Yield the lines of a group of variants, and draw its picture; the first of all methods is in every group."""
    first = next(iter(methods))
    names = {key: method["name"] for key, method in methods.items() if key == first or method["group"] == group}
    shown = [point for key in names for point in found if point.method == key]
    if all(point.method == first for point in shown):  # None of the group has run.
        return
    file = images / f"ablation-{title.replace(' ', '-').replace(',', '')}.svg"
    draw(base, shown, figure, file, names)
    yield f"## {title[0].upper()}{title[1:]}"
    yield ""
    yield f"![{figure} against perplexity: {title}]({images.name}/{file.name})"
    yield ""
    yield from table(base, [(names[point.method], point) for point in shown], figure)
    yield ""
