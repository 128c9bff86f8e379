"""Fill report.html and study.html: one self-contained file each, with slider.js inside.

Also a picture of such a page, for Figure 7.
"""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from models.images import read_rgb

# The pages load nothing and send nothing
HEAD = """<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">"""
FOLDER = Path(__file__).resolve().parent


def fill(name: str, data: object, **parts: str) -> str:
    """The text of the page `name`, each @NAME@ in it replaced by a part of that name.

    data: becomes @DATA@, as JSON. parts: HTML, already escaped. @HEAD@ is HEAD, @SLIDER@ the text
    of slider.js.
    """
    script = (FOLDER / "slider.js").read_text(encoding="utf-8")
    # Neither text may end the script element that it is in, nor begin a comment there
    parts |= {"HEAD": HEAD, "DATA": json.dumps(data).replace("<", "\\u003c"),
              "SLIDER": re.sub("<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)}
    template = (FOLDER / name).read_text(encoding="utf-8")
    # In one pass, so that an @NAME@ inside a part stays as it is
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], template)


def page_picture(page: Path, picture: Path) -> None:
    """Figure 7: a picture of a rater's page, where a browser is installed."""
    from paper.draw import DPI, WIDTH, picture_figure, save  # and matplotlib: the pages do not

    names, side = ("chromium", "chromium-browser", "google-chrome"), 900  # pixels of the window
    browser = next(filter(None, map(shutil.which, names)), None)
    fig, reason = None, f"no Chromium; it is a picture of {page}"
    if not page.is_file():
        reason = f"no {page}"
    elif browser:
        with tempfile.TemporaryDirectory() as folder:
            shot = Path(folder, "shot.png")
            reason = take_picture([
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--disable-background-networking", f"--user-data-dir={folder}/profile",
                f"--window-size={side},760", f"--force-device-scale-factor={WIDTH * DPI / side}",
                f"--screenshot={shot}", page.absolute().as_uri()])
            fig = picture_figure(read_rgb(shot)) if shot.is_file() else None
    save(fig, picture, reason)


def take_picture(command: list[str]) -> str:
    """Run the browser; returns why there is no picture, if there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{Path(command[0]).name} failed ({type(error).__name__})"
    lines = done.stderr.split("\n")
    return f"{Path(command[0]).name} ended with {done.returncode}: {' '.join(lines[-2:]).strip()}"
