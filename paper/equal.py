"""Naive fine-tuning at LoRA's quality, for Figures 3 and 5 (Sec. 4.3): a network file.

    python -m paper.equal --base runs/SwinIR-AMO/net_g_ema.pt --iqa musiq \\
        --naive runs/SwinIR-AMO+FT_full/net_g_ema.pt --lora runs/SwinIR-AMO+FT/net_g_ema.pt \\
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR \\
        --out runs/SwinIR-AMO+FT_full_eq.pt
    python evaluate.py --models SwinIR-AMO+FT_full_eq=runs/SwinIR-AMO+FT_full_eq.pt --gt ... \\
        --lq ... --save-sr results/paper/sr --out results/paper/equal.csv

Two results differ in noise for a reason only if they are equally good. The naive network's weights
are scaled as --lora-scale scales adapters, base + s (naive - base), with the s in [0, 2] at which
the mean Q over the --lq images is nearest to that of the LoRA network.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import read_settings, save_atomic
from models.distributed import clean_exit
from models.flags import new_parser
from models.images import list_images, read_rgb
from models.iqa import load_iqa
from models.metrics import as_tensor, rounded
from models.weights import load_net

State = dict[str, Tensor]


def between(base: State, naive: State, scale: float) -> State:
    """base + scale (naive - base); what is no floating-point weight stays the base's."""
    return {key: torch.lerp(value, naive[key], scale) if value.is_floating_point() else value
            for key, value in base.items()}


def find_scale(quality_at: Callable[[float], float], target: float, steps: int = 10) -> float:
    """The scale in [0, 2] whose quality is nearest to the target, by bisection: it rises with it.

    The nearest one that was tried is returned, also if none reaches the target.
    """
    tried = {1.0: quality_at(1.0)}
    low, high = (0.0, 1.0) if tried[1.0] >= target else (1.0, 2.0)
    for _ in range(steps):
        middle = (low + high) / 2
        tried[middle] = quality_at(middle)
        low, high = (middle, high) if tried[middle] < target else (low, middle)
    return min(tried, key=lambda scale: abs(tried[scale] - target))


@torch.inference_mode()
def mean_quality(net: nn.Module, lqs: list[Tensor], metric: nn.Module) -> float:
    """Mean Q of the enlarged images, rounded to 8 bit as evaluate.py scores them."""
    return sum(metric(rounded(net(lq))).item() for lq in lqs) / len(lqs)


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # as in evaluate.py
    if not args.lq.is_dir() or not (files := list_images(args.lq)[0]):
        raise FileNotFoundError(f"--lq {args.lq}: no folder with PNG images")
    lqs = [as_tensor(read_rgb(file), device) for file in files]
    metric = load_iqa(args.iqa, device)
    net, naive, lora = (load_net(path).to(device) for path in (args.base, args.naive, args.lora))
    base, tuned = dict(net.state_dict()), naive.state_dict()
    base = {key: value.clone() for key, value in base.items()}
    if {k: v.shape for k, v in base.items()} != {k: v.shape for k, v in tuned.items()}:
        raise ValueError(f"--naive {args.naive}: another kind or size of network than {args.base}")

    def quality_at(scale: float) -> float:
        net.load_state_dict(between(base, tuned, scale))
        return mean_quality(net, lqs, metric)

    target = mean_quality(lora, lqs, metric)
    scale = find_scale(quality_at, target)
    print(f"naive at {scale:.3f} of its change has mean Q {quality_at(scale):.2f}, LoRA "
          f"{target:.2f}; {len(lqs)} images")
    state = {key: value.cpu() for key, value in net.state_dict().items()}
    save_atomic({"params_ema": state, "settings": read_settings(args.naive)}, args.out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m paper.equal")
    add = parser.add_argument
    for name, text in (("base", "both fine-tunings started from it"), ("naive", "all weights"),
                       ("lora", "adapters, merged (its net_g_ema.pt)")):
        add(f"--{name}", required=True, type=Path, metavar="FILE", help=f"checkpoint: {text}")
    add("--iqa", default="musiq", metavar="METRIC",
        help="quality model, as training's --iqa (default: %(default)s)")
    add("--lq", required=True, type=Path, metavar="DIR", help="low-quality test images, PNG")
    add("--out", required=True, type=Path, metavar="FILE", help="network file to write (.pt)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("equal.py"):
        main(parse_args())
