"""How much an image enlarged in tiles differs from the whole one, for every --net.

    python -m benchmarks.tiles        # random weights, scikit-image's astronaut
    python -m benchmarks.tiles --ckpt swinir.pth --crop 256 --tile 128

Writes results/tiles_cpu.csv: the largest and the mean difference of the output, in [0, 1]; the
largest difference where no two tiles overlap; the share of 8-bit values that change, and by how
much at most.
"""

import argparse

import torch
from skimage import data
from torch import Tensor, nn

from benchmarks.common import write_results
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.metrics import to_8bit
from models.tiles import OVERLAP, spans, upscale
from models.weights import load_net
from train_sr import PRESETS

HEADER = ["network", "crop", "tile", "largest", "mean", "largest_outside_overlaps",
          "changed_percent", "changed_by"]


def outside(side: int, tile: int, scale: int = 4) -> Tensor:
    """Bool (scale * side,): whether only one tile covers the output position along an axis."""
    covered = torch.zeros(side)
    for start, end in spans(side, tile):
        covered[start:end] += 1
    return (covered == 1).repeat_interleave(scale)


@torch.no_grad()
def compare(name: str, net: nn.Module, crop: int, tile: int) -> list[str]:
    image = torch.from_numpy(data.astronaut()[:crop, 100 : 100 + crop].copy())
    lq = image.permute(2, 0, 1)[None].float() / 255
    whole, tiled = net.eval()(lq), upscale(net, lq, tile)[0]
    difference = (whole - tiled).abs()
    single = outside(crop, tile)
    levels = (to_8bit(whole) - to_8bit(tiled)).abs()
    return [name, crop, tile, f"{difference.max():.2g}", f"{difference.mean():.2g}",
            f"{difference[..., single[:, None] & single].max():.2g}",
            f"{100 * (levels > 0).double().mean():.2g}", f"{levels.max():.0f}"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", nargs="*", default=[], metavar="FILE", help="checkpoints, instead of the presets")
    add("--crop", type=integer(1, 412),
        help="LQ pixels per side (default: 256; 128 for the paper's networks)")
    add("--tile", type=integer(64),
        help="LQ pixels per side (default: 128; 96 for the paper's networks)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    rows = [compare(f, load_net(f), args.crop or 256, args.tile or 128) for f in args.ckpt]
    for name, preset in PRESETS.items() if not args.ckpt else ():
        torch.manual_seed(0)
        tiny = name.endswith("_tiny")
        sizes = (args.crop or (256 if tiny else 128), args.tile or (128 if tiny else 96))
        rows.append(compare(f"{name}, random weights", preset["build"](), *sizes))
    write_results("tiles", HEADER, rows, "cpu",
                  [f"scikit-image's astronaut, neighbouring tiles share {OVERLAP} LQ pixels"])


if __name__ == "__main__":
    with clean_exit("benchmarks.tiles"):
        main(parse_args())
