"""paper/page.py: the picture of a page, without, with a broken and with a working browser."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from paper.page import page_picture

BROWSER = """#!/bin/sh
for a in "$@"; do case $a in
    --screenshot=*) out="${a#--screenshot=}";; --user-data-dir=*) mkdir "${a#--user-data-dir=}";;
esac; done
echo "$@" > FOLDER/arguments
RESULT
"""


@pytest.fixture
def browse(tmp_path, monkeypatch, capsys):
    """Take a picture of a page with a stub of a browser that ends as given; returns the line."""
    page = tmp_path / "page.html"
    page.write_text("<p>left or right?")

    def browse(result):
        browser = tmp_path / "browser.sh"
        browser.write_text(BROWSER.replace("FOLDER", str(tmp_path)).replace("RESULT", result))
        browser.chmod(0o755)
        monkeypatch.setattr(shutil, "which", {"chromium": str(browser)}.get)
        page_picture(page, tmp_path / "figure7.png")
        return capsys.readouterr().out

    return browse


def test_the_browser_s_picture_is_written_at_the_width_of_the_page(browse, tmp_path):
    Image.new("RGB", (2070, 400), (1, 2, 3)).save(tmp_path / "made.png")
    assert browse(f"cp {tmp_path}/made.png $out") == "figure7.png: written, with a PDF\n"
    image = Image.open(tmp_path / "figure7.png")
    assert image.size == (2070, 400) and image.convert("RGB").getpixel((1000, 200)) == (1, 2, 3)
    words = (tmp_path / "arguments").read_text().split()
    assert words[-1] == (tmp_path / "page.html").as_uri() and "--window-size=900,760" in words
    assert f"--force-device-scale-factor={2070 / 900}" in words
    folder = next(w for w in words if w.startswith("--user-data-dir=")).partition("=")[2]
    assert not Path(folder).parent.exists()


def test_a_browser_that_fails_is_said(browse, tmp_path):
    line = browse("echo no display >&2; exit 3")
    assert line == "figure7.png: not made, browser.sh ended with 3: no display\n"
    assert not (tmp_path / "figure7.png").exists()


def test_no_browser_and_no_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    page_picture(tmp_path / "page.html", tmp_path / "figure7.png")
    assert f"figure7.png: not made, no {tmp_path / 'page.html'}\n" == capsys.readouterr().out
    (tmp_path / "page.html").touch()
    page_picture(tmp_path / "page.html", tmp_path / "figure7.png")
    assert "not made, no Chromium; it is a picture of" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")
def test_a_real_browser_draws_the_page(tmp_path, capsys):
    (tmp_path / "page.html").write_text("<body style='background: #123456'>")
    page_picture(tmp_path / "page.html", tmp_path / "figure7.png")
    assert capsys.readouterr().out == "figure7.png: written, with a PDF\n"
    image = Image.open(tmp_path / "figure7.png").convert("RGB")
    assert image.size == (2070, 1748) and image.getpixel((1000, 900)) == (0x12, 0x34, 0x56)
