"""A first look at AMO at real size: RealESRGAN_x4plus trained on ground truths made of photographs.

    python -m benchmarks.amo_photos     # half an hour on 2 CPU cores; needs spandrel

tools/enhance.py makes three further ground truths of each training photo, at a quarter of its
sides: by RealESRGAN_x4plus and by the two networks that `COMPARE=1 bash run_all.sh photos` tuned.
Each enlarges a photo four times, which is then reduced again. From RealESRGAN_x4plus, 300 steps
each learn from the original, from any ground truth, and from the one that Q prefers (AMO). There is
no discriminator, as none has been trained against this network. Rerun the same command to resume.

Out: results/photos/amo.csv, the test photos' scores and the share of each ground truth.
"""

import argparse
import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.equal_q import (
    ABOUT_Q,
    COLUMNS,
    PERCEPTUAL,
    RESULTS,
    WORK,
    Q,
    cells,
    run,
    score,
)
from models.checkpoint import write_csv
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.photos import read_srgb
from models.weights import load_net
from tools.prefetch import fetch_network

RUNS, STEPS = Path("runs/amo_photos"), 300
SAMPLERS = {"OrigsOnly": "origs_only", "Rand": "rand", "AMO": "amo"}


def make_sets(base: Path) -> None:
    """RUNS/sets: original/ and a folder for each of the three networks."""
    (RUNS / "photos").mkdir(parents=True, exist_ok=True)
    for file in sorted((WORK / "train").glob("*.jpg")):
        small = Image.fromarray(read_srgb(file)).reduce(4)
        small.save(RUNS / "photos" / f"{file.stem}.png")
    networks = {"x4plus": base, "adapters": WORK / "lora/net_g_ema.pt",
                "all_weights": WORK / "full/net_g_ema.pt"}
    for name, file in networks.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not there; first run COMPARE=1 bash run_all.sh "
                                    "photos")
        link = RUNS / f"{name}.pt"
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    run("-m", "tools.enhance", RUNS / "photos", RUNS / "sets", "--with",
        *(RUNS / f"{name}.pt" for name in networks), threads=2)


def train(base: Path, row: str) -> None:
    run("train_sr.py", "--data", RUNS / "sets", "--init", base, "--sampler", SAMPLERS[row],
        "--iqa", Q, "--perceptual", PERCEPTUAL, "--lambda-a", 0, "--batch-size", 2, "--patch-size",
        128, "--lr", 2e-5, "--ema-decay", 0.95, "--steps", STEPS, "--num-workers", 0, "--log-every",
        STEPS, "--save-every", 50, "--sample-every", STEPS, "--out", RUNS / row)


def shares(row: str) -> list[str]:
    """The share of each ground truth in a run, in the order of the folders."""
    with open(RUNS / row / "log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return [f"{float(last[key]):.3f}" for key in last if key.startswith("share_")]


def main(args: argparse.Namespace) -> None:
    base = Path(fetch_network("realesrgan_x4plus"))
    make_sets(base)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda row: train(base, row), SAMPLERS))
    rows = [["base", *cells(np.nanmean(score(load_net(base), "test"), 0)), *[""] * 4]]
    for row in SAMPLERS:
        scores = np.nanmean(score(load_net(RUNS / row / "net_g_ema.pt"), "test"), 0)
        rows.append([row, *cells(scores), *shares(row)])
    write_csv(RESULTS / "amo.csv", ["model", *COLUMNS, "original", "adapters", "all_weights",
                                    "x4plus"], rows, [
        f"a first look: one seed, {STEPS} steps, no discriminator; Q: {Q}, by which AMO chooses",
        ABOUT_Q,
        "the last four columns: the share of each ground truth in training"])
    print((RESULTS / "amo.csv").read_text())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m benchmarks.amo_photos")
    parser.add_argument("--jobs", type=integer(1, 64), default=2,
                        help="runs side by side, one thread each (default: 2)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("amo_photos.py"):
        main(parse_args())
