"""Tests run on one thread, so that their results do not depend on the machine."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, for the tests of the pages."""
    from playwright.sync_api import Error as PlaywrightError
    from playwright.sync_api import sync_playwright

    found = (shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome"))
    executable = next(filter(None, found), None)  # None: playwright's own, if it is installed
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=executable, args=[
                "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                "--no-first-run", "--disable-component-update", "--disable-sync"])
        except PlaywrightError as error:
            pytest.fail("no Chromium to test the page with: apt install chromium, or "
                        f"python -m playwright install chromium ({str(error)[:200]})")
        yield browser
        browser.close()
