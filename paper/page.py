"""Fill report.html and study.html: one self-contained file each, with slider.js inside."""

import json
import re
from pathlib import Path

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
