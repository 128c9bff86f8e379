"""docs/first-day.md, as a newcomer runs it: in a clone, from its first line to its last."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scripts import ROOT, environment

from models.checkpoint import read_csv
from models.validation import validations


def test_the_first_day(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    page = (ROOT / "docs/first-day.md").read_text()
    script, = (block.split("```")[0] for block in page.split("```bash\n")[1:])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=clone, text=True,
                            capture_output=True, env=environment(PATH=path), timeout=900)
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    runs = clone / "runs/first"
    for run, steps in (("stage1", ["0", "100", "200"]), ("amo+ft", ["0", "10", "20", "30", "40"])):
        rows = validations(runs / run)
        assert [row["step"] for row in rows] == steps[: len(rows)] and len(rows) >= 3
        assert {"val_psnr", "val_ssim", "val_q"} < set(rows[0])
        assert (runs / run / "net_g_best.pt").is_file()
    first, last = (float(row["val_psnr"]) for row in validations(runs / "stage1")[::2])
    assert last > first + 3  # dB: it has learnt
    table, _ = read_csv(runs / "table5.csv")
    tuned = {row["model"]: row for row in table}
    assert float(tuned["AMO+FT"]["q"]) > float(tuned["AMO"]["q"])
    assert float(tuned["AMO+FT"]["psnr"]) > float(tuned["AMO"]["psnr"]) - 1
    enlarged = sorted((runs / "sr").glob("*.png"))
    assert len(enlarged) == len(list((clone / "datasets/first/HGGT/Test").rglob("Blind_LR/*.png")))
    assert np.asarray(Image.open(enlarged[0])).std() > 1
    assert "\r" not in result.stderr  # no bars off a terminal
