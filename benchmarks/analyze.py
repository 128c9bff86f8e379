"""Images per second of scoring (models/scores.py), one at a time and in batches of equal size.

    python -m benchmarks.analyze                   # one CPU core or one GPU, about a minute

MUSIQ and the demo's Q, both with random weights, score PNG photographs of two sizes in turn.
Threads decode each image once for each metric, eight batches ahead; the variant "decode" does that
alone. Batches of one are the baseline; it runs twice, and the baseline repeat shows the noise.
Writes results/analyze_cpu.csv, or a file named after the GPU.
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
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.iqa import load_iqa
from models.scores import read_batches, read_or_error, score_images

METRICS = ("models.iqa:random_musiq", "benchmarks.analyze:random_q")
SIDES = (512, 384)


def random_q() -> nn.Module:
    torch.manual_seed(0)
    return QNet()


def write_images(root: Path, count: int) -> dict[str, str]:
    """{key: path} of `count` photographs, the sizes in turn."""
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
            variants = {
                "batch_1": one, "batch_1_repeat": one,
                f"batch_{args.batch_size}": functools.partial(score, name, net, images, device,
                                                              args.batch_size),
                "decode": lambda: list(read_batches(images, args.batch_size, read_or_error)),
            }
            seconds = abba(variants, args.repeats, device)
            base, decode = (np.array(seconds[variant]) for variant in ("batch_1", "decode"))
            for variant, values in seconds.items():
                rows.append([
                    name, variant, *spread(np.array(values) / n * 1000),
                    f"{n / np.median(values):.2f}", f"{np.median(base / values):.2f}",
                    f"{100 * np.median(decode) / np.median(values):.1f}"])
    header = ["metric", "variant", "ms_per_image", "min", "max", "images_per_second",
              "times_batch_1", "decode_percent"]
    time = "CPU time of all threads" if device == "cpu" else "time between two events"
    write_results("analyze", header, rows, device, [
        f"{n} PNG photographs of side {' and '.join(map(str, SIDES))}, random weights",
        f"{time}, {args.repeats} times: median, minimum, maximum; batch_1_repeat: batch_1 again"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=integer(1), metavar="N",
        help="number of images (default: 8, on a GPU 256)")
    add("--batch-size", type=integer(1), default=8, metavar="N",
        help="images, of the batched variant (default: %(default)s)")
    add("--repeats", type=integer(1), default=3,
        help="timed calls of each variant (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("benchmarks.analyze"):
        main(parse_args())
