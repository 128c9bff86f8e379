"""Write a tiny network that interpolates, for stage one of the demo to start from.

    python -m demo.nets --net swinir_tiny --seed 0 --out runs/demo/start.pt

The paper starts stage one from public PSNR-trained weights. The demo's 400 steps on a CPU cannot
replace them: a random network of this size needs all of them to learn to pass its input on. So a
few weights of each convolution are set such that the network doubles the image twice, exactly, with
a [1 2 1] filter. All other weights stay random, and all are trained.
"""

import argparse

import torch
from torch import nn

from models.checkpoint import save_atomic
from models.distributed import clean_exit
from models.flags import SEED, new_parser
from models.swinir import SwinIR
from train_sr import PRESETS

COLOURS = 3


@torch.no_grad()
def start_as_interpolation(net: nn.Module) -> nn.Module:
    """Make a SwinIR ("nearest+conv") or an RRDBNet interpolate, in place; returns it.

    A leaky ReLU f of slope a passes a signed value x on as a pair: f(x) - f(-x) = (1 + a) x. So six
    channels of each layer of the tail carry +RGB and -RGB. The body's branch starts at zero.
    """
    if isinstance(net, SwinIR):
        net.conv_after_body.weight.zero_()
        net.conv_after_body.bias.zero_()
        slope = 0.01  # of the activation in conv_before_upsample; 0.2 in the others
        carry(net.conv_first, None, pair=False)
        carry(net.conv_before_upsample[0], None, pair=True)
    else:
        net.conv_body.weight.zero_()
        net.conv_body.bias.zero_()
        slope = None  # no activation before conv_up1
        carry(net.conv_first, None, pair=False)
    carry(net.conv_up1, slope, pair=True, smooth=True)
    carry(net.conv_up2, 0.2, pair=True, smooth=True)
    carry(net.conv_hr, 0.2, pair=True)
    carry(net.conv_last, 0.2, pair=False)
    return net


def carry(conv: nn.Conv2d, slope: float | None, pair: bool, smooth: bool = False) -> None:
    """Let the first outputs of a 3x3 convolution carry RGB.

    slope:  of the activation before it, if its input is the pair +RGB, -RGB; None for plain RGB
    pair:   output +RGB and -RGB, not RGB alone
    smooth: filter with [1 2 1] x [1 2 1] / 16, which turns nearest doubling into linear
    """
    taps = torch.tensor([1.0, 2.0, 1.0] if smooth else [0.0, 1.0, 0.0])
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    for out in range(2 * COLOURS if pair else COLOURS):
        colour, sign = out % COLOURS, 1.0 if out < COLOURS else -1.0
        conv.weight[out].zero_()
        conv.bias[out].zero_()
        if slope is None:
            conv.weight[out, colour] = sign * kernel
        else:
            conv.weight[out, colour] = sign * kernel / (1 + slope)
            conv.weight[out, COLOURS + colour] = -sign * kernel / (1 + slope)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    net = start_as_interpolation(PRESETS[args.net]["build"]())
    save_atomic({"params_ema": net.state_dict()}, args.out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.split("\n")[0], "python -m demo.nets")
    parser.add_argument("--net", choices=[n for n in PRESETS if n.endswith("_tiny")],
                        default="swinir_tiny", help="preset of train_sr.py")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the random weights")
    parser.add_argument("--out", required=True, help="weight file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("demo.nets"):
        main(parse_args())
