"""The built documentation site in a real browser: no request leaves, search works, a phone can show it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
PAGES = [
    "index.html",
    "docs/guide.html",
    "docs/algorithm.html",
    "docs/api.html",
    "docs/choosing.html",
    "docs/results.html",
    "docs/results-real-text.html",
    "docs/notebook/index.html",
]

pytestmark = pytest.mark.slow


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the site, built anew and served on loopback."""
    pytest.importorskip("zensical")
    # The processes of pytest-xdist share the folder of the site: the first one builds it for all.
    run, shared = os.environ.get("PYTEST_XDIST_TESTRUNUID"), tmp_path_factory.getbasetemp().parent
    is_built = shared / f"site-{run}"
    with FileLock(shared / "site.lock"):
        if run is None or not is_built.exists():
            built = subprocess.run([sys.executable, "-m", "tools.site"], cwd=ROOT, capture_output=True, text=True)
            assert built.returncode == 0, built.stdout + built.stderr
            is_built.touch()
    handler = functools.partial(QuietHandler, directory=str(ROOT / "build" / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def page(browser, site):
    """A page that aborts every request to another host; afterwards there were none, and no error."""
    page = browser.new_page()
    foreign, errors = [], []

    def route(request):
        if request.request.url.startswith(site):
            request.continue_()
        else:
            foreign.append(request.request.url)
            request.abort()

    page.context.route("**/*", route)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert foreign == []
    assert errors == []


@pytest.mark.parametrize("path", PAGES)
def test_a_page_requests_nothing_from_other_hosts_and_fits_a_phone(page, site, path):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(site + path, wait_until="networkidle")
    assert page.locator("article h1").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_search_finds_an_option(page, site):
    page.goto(site, wait_until="networkidle")
    page.keyboard.press("/")
    page.keyboard.type("kl_coef")
    page.get_by_role("link", name="Options").first.wait_for()
