"""Time of a training step (train_sr.py) and of its parts, for both networks, with and without AMO.

    python -m benchmarks.step                        # on a GPU: the paper's share of one of four
    python -m benchmarks.step --net swinir --variants compile sdpa
    python -m benchmarks.step --argmax 200           # how often bf16 scores would flip AMO's choice

All networks, MUSIQ and VGG19 included, have the paper's sizes and random weights; images are
photographs. Each variant differs from the baseline, "amo", in what its name says. "amo again" is
the baseline repeat: its ratio is the noise of the comparison. Parts are timed one by one. "load,
degrade" is the CPU time of one worker; a GPU waits for it only if there are too few workers.
Writes results/step_cpu.csv, or a file named after the GPU.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import train_sr
from benchmarks.common import abba, spread, write_results
from benchmarks.photos import write_sets
from finetune_lora import OneByOne
from models import swinir
from models.dataset import MultiGTDataset
from models.degradations import degrade_patch
from models.discriminator import UNetDiscriminatorSN
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.hggt import load_sets
from models.iqa import load_iqa
from models.losses import VGG19_LAYERS, VGG19_WEIGHTS, VGG19Loss, gan_loss_g
from models.samplers import choose_argmax, sampling_weights

VARIANTS = ("upos", "contiguous", "unfused", "sdpa", "bf16", "compile", "autotune", "tf32")
GPU_VARIANTS = ("bf16", "compile", "autotune", "tf32")
HEADER = ["net", "variant", "batch", "patch", "seconds", "min", "max", "ratio", "tflop",
          "tflop_per_s", "peak_mib", "hours_300k", "max_abs_difference"]


class Step:
    """A training step to be called; `changes`: of VARIANTS, those that it has."""

    def __init__(self, args: argparse.Namespace, net: str, batch: dict, changes: frozenset):
        device = args.device
        self.args = train_sr.parse_args(["--net", net])
        self.args.bf16 = "bf16" in changes
        self.amo = "upos" not in changes
        layout = torch.contiguous_format if "contiguous" in changes else torch.channels_last
        torch.manual_seed(0)
        self.net_g = train_sr.PRESETS[net]["build"]().to(device, memory_format=layout)
        self.net_ema = copy.deepcopy(self.net_g).requires_grad_(False)
        self.net_d = UNetDiscriminatorSN().to(device, memory_format=layout)
        adam = functools.partial(torch.optim.Adam, lr=1e-4, betas=(0.9, 0.99),
                                 fused=None if "unfused" in changes else True)
        self.optim_g, self.optim_d = adam(self.net_g.parameters()), adam(self.net_d.parameters())
        self.percep = VGG19Loss(random_vgg19()).to(device, memory_format=layout)
        self.iqa = load_iqa("models.iqa:random_musiq", device)
        self.forward = torch.compile(self.net_g) if "compile" in changes else self.net_g
        self.sdpa, self.autotune, self.tf32 = (a in changes for a in ("sdpa", "autotune", "tf32"))
        self.batch = {k: batch[k].to(device) for k in ("lq", "gts")}

    def images(self) -> tuple[Tensor, Tensor]:
        return tuple(self.batch[k].float() / 255 for k in ("lq", "gts"))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.batch["lq"].device.type, torch.bfloat16, enabled=self.args.bf16)

    def __call__(self) -> None:
        set_flags(self.autotune, self.tf32)
        lq, gts = self.images()
        gt = gts[:, 0]
        if self.amo:
            choice = choose_argmax(gts, self.iqa)
            gt = gts[torch.arange(len(gts), device=gts.device), choice]
        with with_sdpa() if self.sdpa else contextlib.nullcontext():
            with self.autocast():
                sr = self.forward(lq).float()
                losses = train_sr.generator_losses(sr, gt, self.net_d, self.percep, None)
            total = losses["l_pix"] + losses["l_percep"] + 0.1 * losses["l_adv"]
            train_sr.optimise(self.optim_g, total, lr=1e-4)
        self.step_d(sr, gt)
        train_sr.ema_update(self.net_ema, self.net_g, 0.999)

    def step_d(self, sr: Tensor, gt: Tensor) -> None:
        with self.autocast():
            loss = train_sr.discriminator_loss(self.net_d, sr, gt)
        train_sr.optimise(self.optim_d, loss, lr=1e-4)

    @torch.no_grad()
    def output(self) -> Tensor:
        """Output of the untrained network, to compare the variants."""
        set_flags(self.autotune, self.tf32)
        with self.autocast(), with_sdpa() if self.sdpa else contextlib.nullcontext():
            return self.forward(self.images()[0]).float()

    def parts(self) -> dict[str, Callable[[], object]]:
        """The parts of a step, each to be timed alone."""
        lq, gts = self.images()
        gt = gts[:, 0].contiguous()
        sr = self.output().requires_grad_()

        def backward(loss: Callable[[], Tensor]) -> None:
            with self.autocast():
                value = loss()
            value.backward()

        return {
            "G, forward and backward": lambda: backward(lambda: self.net_g(lq).float().mean()),
            "VGG19 of SR and GT": lambda: backward(lambda: self.percep(sr, gt)),
            "D on SR": lambda: backward(lambda: gan_loss_g(self.net_d.requires_grad_(False)(sr))),
            "D's own step": lambda: self.step_d(sr, gt),
            "Q of all GTs (AMO)": lambda: choose_argmax(gts, self.iqa),
            "Adam of G, EMA": lambda: (self.optim_g.step(),
                                       train_sr.ema_update(self.net_ema, self.net_g, 0.999)),
        }  # fmt: skip


def set_flags(autotune: bool = False, tf32: bool = False) -> None:
    torch.backends.cudnn.benchmark = autotune
    torch.backends.cuda.matmul.allow_tf32 = tf32  # convolutions have it by default, never in Q


@contextlib.contextmanager
def with_sdpa():
    """SwinIR's attention by F.scaled_dot_product_attention, with the bias as its mask."""

    def forward(self: swinir.WindowAttention, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, t, c = x.shape
        qkv = self.qkv(x).view(b, n, t, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # (B * windows, heads, tokens, ...)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        bias = bias if mask is None else bias + mask[:, None]
        bias = bias.expand(b, n, -1, -1, -1).flatten(0, 1).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        x = x.view(b, n, -1, t, c // self.num_heads).transpose(2, 3)
        return self.proj(x.reshape(b, n, t, c))

    before, swinir.WindowAttention.forward = swinir.WindowAttention.forward, forward
    try:
        yield
    finally:
        swinir.WindowAttention.forward = before


def random_vgg19() -> dict[str, Tensor]:
    state, index, width_in = {}, 0, 3
    for width in VGG19_LAYERS:
        if width == "P":
            index += 1
            continue
        if index <= max(VGG19_WEIGHTS):
            conv = nn.Conv2d(width_in, width, 3)
            state |= {f"features.{index}.{k}": v.data for k, v in conv.named_parameters()}
        index, width_in = index + 2, width
    return state


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Peak memory of a call, above what is held before it; on a CPU resident memory, Linux only."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")

    def mib(key: str) -> float:
        return int(status.read_text().split(f"{key}:")[1].split()[0]) / 2**10

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = mib("VmRSS")
    call()
    return mib("VmHWM") - before


def tflop(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e12


def make_dataset(root: Path, net: str, patch: int, amo: bool) -> MultiGTDataset:
    sets = load_sets(root)
    shape = (len(sets.names), len(sets.paths[0]))
    weights = None if amo else sampling_weights("rand", None, None, 1, shape)
    setting = train_sr.PRESETS[net]["degradation"]
    return MultiGTDataset(sets, weights, patch, 0, functools.partial(degrade_patch,
                                                                     setting=setting))


@torch.no_grad()
def argmax_flips(root: Path, count: int, patch: int, device: torch.device) -> list[str]:
    """How often AMO's choice by rounded scores differs from that by float32, over `count` draws."""
    dataset = make_dataset(root, "swinir", patch, True)
    iqa = load_iqa("models.iqa:random_musiq", device)
    lines = []
    for how in ("bf16", "tf32") if device.type == "cuda" else ("bf16",):
        flips, moved = 0, []
        for draw in range(count):
            gts = torch.from_numpy(dataset[draw]["gts"]).to(device).float() / 255
            set_flags()
            exact = iqa(gts)
            set_flags(tf32=how == "tf32")
            with torch.autocast(device.type, torch.bfloat16, enabled=how == "bf16"):
                rough = iqa.net(gts).float().flatten()
            flips += int(exact.argmax() != rough.argmax())
            moved.append((exact - rough).abs().max().item())
        lines.append(f"arg max of 5 GTs, MUSIQ with random weights: {how} flips {flips} of {count} "
                     f"choices, moves scores by up to {max(moved):.2g}, in the median "
                     f"{statistics.median(moved):.2g}")
    return lines


def time_net(args: argparse.Namespace, net: str, root: Path, variants: list[str]) -> list[list]:
    """Rows of one network: a step of the baseline and of each variant, then the parts of a step."""
    cuda = args.device.type == "cuda"
    size = args.batch_size or ({"swinir": 8, "rrdb": 12}[net] if cuda else 1)
    dataset = make_dataset(root, net, args.patch_size, True)
    batch = default_collate([dataset[n] for n in range(size)])
    steps = {name: Step(args, net, batch, frozenset()) for name in ("amo", "amo again")}
    steps |= {name: Step(args, net, batch, frozenset([name]))
              for name in variants if net == "swinir" or name != "sdpa"}
    output = steps["amo"].output()
    moved = {name: (step.output() - output).abs().max().item() for name, step in steps.items()}
    flop = {name: tflop(steps[name]) for name in ("amo", "upos") if name in steps}
    peak = {name: peak_mib(step, args.device) for name, step in steps.items()}
    seconds, rows = abba(steps, args.repeats, "cuda" if cuda else "wall"), []
    baseline = statistics.median(seconds["amo"])
    for name, values in seconds.items():
        median, flops = statistics.median(values), flop.get(name, flop["amo"])
        rows.append([net, name, size, args.patch_size, *spread(values),
                     f"{median / baseline:.3f}", f"{flops:.3f}", f"{flops / median:.3f}",
                     f"{peak[name]:.0f}", f"{median * 300_000 / 3600:.1f}", f"{moved[name]:.2g}"])
    parts = abba(steps["amo"].parts(), args.repeats, "cuda" if cuda else "wall")
    single = make_dataset(root, net, args.patch_size, False)
    parts |= abba({f"load, degrade ({sampler}), one worker": lambda d=d: [d[n] for n in range(size)]
                   for sampler, d in (("amo", dataset), ("upos", single))}, args.repeats)
    for part, values in parts.items():
        rows.append([net, f"part: {part}", size, args.patch_size, *spread(values),
                     f"{statistics.median(values) / baseline:.3f}", *[""] * 5])
    return rows


def time_reward(args: argparse.Namespace) -> list[list]:
    """Rows: the term of Eq. 5 and its gradient: at once, again, and with --checkpoint-reward."""
    cuda = args.device.type == "cuda"
    size = args.batch_size or (8 if cuda else 4)
    reward = load_iqa("models.iqa:random_musiq", args.device, differentiable=True)
    sr = torch.rand(size, 3, args.patch_size, args.patch_size, device=args.device)

    def gradient(reward: nn.Module) -> None:
        reward(sr.requires_grad_()).mean().backward()

    variants = {"at once": functools.partial(gradient, reward),
                "at once again": functools.partial(gradient, reward),
                "one by one": functools.partial(gradient, OneByOne(reward))}
    peak = {name: peak_mib(call, args.device) for name, call in variants.items()}
    seconds = abba(variants, args.repeats, "cuda" if cuda else "wall")
    baseline = statistics.median(seconds["at once"])
    return [["MUSIQ as reward", name, size, args.patch_size, *spread(values),
             f"{statistics.median(values) / baseline:.3f}", "", "", f"{peak[name]:.0f}", "", ""]
            for name, values in seconds.items()]


def main(args: argparse.Namespace) -> None:
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = args.device.type == "cuda"
    variants = args.variants or [v for v in VARIANTS if cuda or v not in GPU_VARIANTS]
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder), 8)
        for net in args.net:
            rows += time_net(args, net, Path(folder), variants)
        rows += time_reward(args)
        if args.argmax:
            notes = argmax_flips(Path(folder), args.argmax, args.patch_size, args.device)
    write_results("step", HEADER, rows, args.device, [
        f"seconds: one step, median of {args.repeats}, variants in turn, "
        + ("by CUDA events" if cuda else "elapsed time")
        + "; tflop: counted by torch; max_abs_difference: of the untrained G's output", *notes])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--net", nargs="+", choices=("swinir", "rrdb"), default=["swinir", "rrdb"], help="networks")
    add("--variants", nargs="+", choices=VARIANTS,
        help="what to compare with the baseline; upos: no Q; bf16: autocast; autotune: "
        "cudnn.benchmark; tf32: in matrix products, too "
        f"(default: all, on a CPU all but {', '.join(GPU_VARIANTS)})")
    add("--batch-size", type=integer(1), metavar="N",
        help="images per process (default: the paper's 8 and 12; 1 on a CPU)")
    add("--patch-size", type=integer(16), default=256, help="GT pixels per side")
    add("--repeats", type=integer(1), default=5, help="timed steps per variant")
    add("--argmax", type=integer(0), default=0, metavar="N",
        help="also count flips over N draws")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("benchmarks.step"):
        main(parse_args())
