"""The program that collects the pages of the documentation site."""

from __future__ import annotations

import re

import quarkrl
from tools.site import ROOT, linked_files


def test_the_site_has_what_the_first_page_links_to_directly_or_not(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("[guide](docs/guide.md#start), [paper](https://example.com)", encoding="utf-8")
    (tmp_path / "docs" / "guide.md").write_text(
        "![curve](curve.png) [home](../README.md) `[no](link)`", encoding="utf-8"
    )
    (tmp_path / "docs" / "curve.png").touch()
    (tmp_path / "docs" / "unlinked.md").touch()
    reached, broken = linked_files(tmp_path / "README.md")
    assert reached == {tmp_path / name for name in ("README.md", "docs/guide.md", "docs/curve.png")}
    assert broken == []


def test_a_link_to_a_missing_file_is_reported(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("[guide](docs/guide.md) and ![curve](curve.png)", encoding="utf-8")
    assert linked_files(page)[1] == [
        f"{page}: the link docs/guide.md leads to no file",
        f"{page}: the link curve.png leads to no file",
    ]


def test_the_page_of_the_python_api_has_each_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: quarkrl\.(\w+)$", page, re.M)) == set(quarkrl.__all__)
