"""Build the documentation site into build/site: `python -m tools.site`. A broken link or anchor fails the build.

The pages link to files all over the repository, so that the links work on GitHub. Zensical needs one folder with all
of them. So this program copies README.md and every file that it links to, directly or not, into build/pages.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.S | re.M)


def linked_files(start: Path) -> tuple[set[Path], list[str]]:
    """Return `start` and the files that it links to, directly or through other pages; and a line per broken link."""
    reached, broken, waiting = {start}, [], [start]
    while waiting:
        page = waiting.pop()
        if page.suffix != ".md":
            continue
        for target in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
            path = (page.parent / target).resolve()
            if not path.is_file():
                broken.append(f"{page}: the link {target} leads to no file")
            elif path not in reached:
                reached.add(path)
                waiting.append(path)
    return reached, broken


def collect() -> list[str]:
    """Copy README.md and all that it links to into build/pages; return a line per fault."""
    reached, faults = linked_files(ROOT / "README.md")
    faults += [f"{page}: no page links to it" for page in sorted((ROOT / "docs").rglob("*.md")) if page not in reached]
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in [*reached, ROOT / "docs" / "site.css"]:
        copy = PAGES / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return faults


def main() -> int:
    """Collect the pages and build the site; return 1 if a link is broken or a page of docs/ has no link to it."""
    if faults := collect():
        print(*faults, sep="\n")
        return 1
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", "mkdocs.yml"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
