"""The report in a real browser: hostile texts stay texts, no request leaves, the table works, a phone can show it."""

from __future__ import annotations

import pytest
from helpers.run_directories import write_run

from quarkrl.report import write_report

HOSTILE = [
    "<script>window.hit = 'script'; fetch('http://example.com/fetched')</script>",
    '"><img src="http://example.com/image.png" onerror="window.hit = \'image\'">',
    "</script><script>window.hit = 'closed'; alert(1)</script>",
    "<svg onload=\"window.hit = 'svg'\"></svg><iframe src='javascript:parent.hit = 1'></iframe>",
    "</td></tr></table><style>@import url(http://example.com/style.css)</style>",
    "{{ 7 * 7 }} {% raw %} ${window.hit = 'template'}",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    return write_report(write_run(run, prompts=HOSTILE, completions=[*HOSTILE, " plain words"], iterations=3))


@pytest.fixture
def open_page(browser, report):
    """Open the report with some settings; afterwards check that nothing ran and that nothing was requested."""
    events: list[str] = []
    pages = []

    def open_report(**settings):
        page = browser.new_page(**settings)
        page.on("dialog", lambda dialog: (events.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("request", lambda request: events.append(request.url))
        page.goto(report.as_uri())
        pages.append(page)
        return page

    yield open_report
    for page in pages:
        assert page.evaluate("typeof window.hit") == "undefined"
        page.close()
    assert events == [report.as_uri()] * len(pages)  # The file itself, and no word on the console.


def visible_rows(page):
    return page.locator("#completions tbody tr:visible")


def test_hostile_texts_are_shown_as_texts(open_page):
    page = open_page()
    assert page.locator("#completions").inner_text().count("window.hit = 'script'") > 1
    assert page.get_by_text("{{ 7 * 7 }}").count() > 1
    assert page.locator("img, iframe, link, script[src]").count() == 0


def test_table_filters_and_sorts(open_page):
    page = open_page()
    assert visible_rows(page).count() == 50 and page.locator("#count").inner_text() == "50 of 126"
    page.locator("#search").fill("plain FETCHED")
    assert visible_rows(page).count() == 3  # The prompt that fetches, with the plain completion, in 3 iterations.
    page.locator("#iteration").select_option("1")
    assert visible_rows(page).count() == 1
    page.locator("#search").fill("")
    page.locator("#quantile").select_option("0")
    assert page.locator("#count").inner_text() == "14 of 14"
    page.locator("#iteration").select_option("")
    page.get_by_role("button", name="reward").click()
    rewards = [float(text) for text in page.locator("#completions tbody tr:visible td:nth-child(3)").all_inner_texts()]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 42
    page.get_by_role("button", name="reward").click()
    assert page.locator("#completions th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.locator("#quantile").select_option("")
    page.get_by_role("button", name="show more").click()
    assert visible_rows(page).count() == 126


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_page_never_scrolls_sideways(open_page, width, scheme):
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 128) == (scheme == "dark")


def test_page_works_without_scripts(open_page, browser):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(open_page().url)
    assert visible_rows(page).count() == 126  # All of them, and no controls that would do nothing.
    assert not page.locator(".controls").is_visible()
    page.close()
