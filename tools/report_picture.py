"""The picture of a run's report in README: `python -m tools.report_picture RUN docs/images/report.png`.

Chromium takes it, by playwright: `/usr/bin/chromium`, or the program that CHROMIUM names.
"""

import io
import os
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from quarkrl.report import write_report

_SIZE = {"width": 1200, "height": 1420}
_COLORS = 128  # A page of text needs no more, and the file is a third as large.


def main(run: str, picture: str) -> None:
    """Write the report of a run, and the picture of its top."""
    report = write_report(Path(run))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
        page = browser.new_page(viewport=_SIZE)
        page.goto(report.resolve().as_uri())
        pixels = page.screenshot()
        browser.close()
    image = Image.open(io.BytesIO(pixels)).convert("RGB")
    image.quantize(_COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
