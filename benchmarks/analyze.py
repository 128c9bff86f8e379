"""Images per second of scoring (models/scores.py), one at a time and batched by size.

    python -m benchmarks.analyze                   # one CPU core or one GPU, about a minute

MUSIQ and the demo's Q, both with random weights; PNG photographs of two sizes in turns. An image is
decoded once for each metric, by threads that are eight batches ahead; "decode" is that alone.
Batches of one are the reference and run twice, the second time as the null arm. Writes
results/analyze_cpu.csv, or the GPU's.
"""

import argparse
import contextlib
import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.common import abba, spread, write_results
from benchmarks.photos import write_sets
from demo.quality import QNet
from models.iqa import load_iqa
from models.scores import read_batches, read_or_error, score_images

METRICS = ("models.iqa:random_musiq", "benchmarks.analyze:random_q")
SIDES = (512, 384)


def random_q() -> nn.Module:
    torch.manual_seed(0)
    return QNet()


def write_images(root: Path, count: int) -> dict[str, str]:
    """{key: path} of `count` photographs, the sizes in turns."""
    for side in SIDES:
        write_sets(root / str(side), -(-count // (5 * len(SIDES))), side)
    paths = sorted(root.rglob("*.png"), key=lambda path: (path.name, path.parent.parent.name))
    return {str(path.relative_to(root)): str(path) for path in paths[:count]}


def score(name: str, net: nn.Module, images: dict[str, str], device: str, batch_size: int) -> None:
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stderr(io.StringIO()):
        result = score_images(name, lambda: net, images, Path(cache), device, batch_size)
    if len(result.quality) < len(images):
        raise RuntimeError(f"{name}: not every image was scored")


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    rows, n = [], args.images or (256 if device == "cuda" else 8)
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), n)
        for name in METRICS:
            net = load_iqa(name, device)
            one = functools.partial(score, name, net, images, device, 1)
            arms = {
                "batch_1": one, "batch_1_null": one,
                f"batch_{args.batch_size}": functools.partial(score, name, net, images, device,
                                                              args.batch_size),
                "decode": lambda: list(
                    read_batches(images, args.batch_size, read_or_error)),
            }
            seconds = abba(arms, args.repeats, device)
            base, decode = (np.array(seconds[arm]) for arm in ("batch_1", "decode"))
            for arm, values in seconds.items():
                rows.append([
                    name, arm, *spread(np.array(values) / n * 1000),
                    f"{n / np.median(values):.2f}", f"{np.median(base / values):.2f}",
                    f"{100 * np.median(decode) / np.median(values):.1f}"])
    header = ["metric", "arm", "ms_per_image", "min", "max", "images_per_second", "times_batch_1",
              "decode_percent"]
    time = "CPU time of all threads" if device == "cpu" else "time between two events"
    write_results("analyze", header, rows, device, [
        f"{n} PNG photographs of side {' and '.join(map(str, SIDES))}, random weights",
        f"{time}, {args.repeats} times: median, minimum, maximum; batch_1_null: batch_1 itself"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--images", type=int, metavar="N", help="how many (default: 8, on a GPU 256)")
    add("--batch-size", type=int, default=8, metavar="N", help="batched arm (default: %(default)s)")
    add("--repeats", type=int, default=3, help="timed calls of each arm (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
