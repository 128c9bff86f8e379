"""Time of a training step (train_sr.py) and of its parts, for both networks, with and without AMO.

    python -m benchmarks.step                        # on a GPU: the paper's share of one of four
    python -m benchmarks.step --net swinir --variants compile attention
    python -m benchmarks.step --argmax 200           # how often bf16 scores would flip AMO's choice

All networks, MUSIQ and VGG19 included, have the paper's sizes and random weights; images are
photographs. Each variant differs from the baseline, "amo", in what its name says. "amo again" is
the baseline repeat: its ratio is the noise of the comparison. On a GPU steps follow each other
without a pause, as in training. Parts are timed one by one. "load, degrade" is the CPU time of one
worker; a GPU waits for it only if there are too few workers. Writes results/step_cpu.csv, or a file
named after the GPU.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import finetune_lora
import train_sr
from benchmarks.common import abba, spread, write_results
from benchmarks.photos import write_sets
from models import swinir
from models.dataset import MultiGTDataset
from models.degradations import degrade_patch
from models.discriminator import UNetDiscriminatorSN
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.hggt import load_sets
from models.iqa import load_iqa
from models.lora import add_lora
from models.losses import VGG19_LAYERS, VGG19_WEIGHTS, VGG19Loss, gan_loss_g
from models.quality import in_tf32
from models.samplers import FastArgmax, choose_argmax, sampling_weights

# attention: the other of SwinIR's two; pyiqa: its own preparation of MUSIQ's patches; apart: the
# products of LoRA one by one; heuristics: without cuDNN's search; best: all that is faster
VARIANTS = ("upos", "contiguous", "unfused", "attention", "pyiqa", "lora", "apart", "bf16",
            "compile", "fast_amo", "tf32", "best", "heuristics")
GPU_VARIANTS = ("bf16", "compile", "fast_amo", "tf32", "best", "heuristics")
BEST = {"bf16", "compile", "fast_amo"}
HEADER = ["net", "variant", "batch", "patch", "seconds", "min", "max", "ratio", "tflop", "tflop_q",
          "peak_mib", "hours_300k", "max_abs_difference"]
BACK_TO_BACK = 10  # steps of a timing on a GPU


class Step:
    """A training step to be called; `changes`: of VARIANTS, those that it has."""

    def __init__(self, args: argparse.Namespace, net: str, batch: dict, changes: frozenset):
        self.changes = changes | (BEST if "best" in changes else set())
        device, self.bf16 = args.device, "bf16" in self.changes
        layout = torch.contiguous_format if "contiguous" in changes else torch.channels_last
        torch.manual_seed(0)
        self.net_g = train_sr.PRESETS[net]["build"]().to(device, memory_format=layout)
        if changes & {"lora", "apart"}:
            preset = finetune_lora.PRESETS[net]
            add_lora(self.net_g, preset["targets"], preset["rank"])
        if "apart" in changes:
            self.net_g.lora_groups = []
        self.net_ema = copy.deepcopy(self.net_g).requires_grad_(False)
        self.net_d = UNetDiscriminatorSN().to(device, memory_format=layout)
        adam = functools.partial(torch.optim.Adam, lr=1e-4, betas=(0.9, 0.99),
                                 fused=None if "unfused" in changes else True)
        self.optim_g = adam([p for p in self.net_g.parameters() if p.requires_grad])
        self.optim_d = adam(self.net_d.parameters())
        self.percep = VGG19Loss(random_vgg19()).to(device, memory_format=layout)
        self.iqa = load_iqa("models.iqa:random_musiq", device)
        self.choose = functools.partial(choose_argmax, iqa=self.iqa)
        if "fast_amo" in self.changes:
            self.choose = FastArgmax(in_tf32(self.iqa), self.iqa)
        if "compile" in self.changes:
            train_sr.compile_blocks(self.net_g, self.net_d, self.percep, self.iqa)
        self.batch = {k: batch[k].to(device) for k in ("lq", "gts")}
        while "fast_amo" in self.changes and self.choose.measured < FastArgmax.SETS:
            self.choose(self.images()[1])  # its first sets are scored twice

    def images(self) -> tuple[Tensor, Tensor]:
        return tuple(self.batch[k].float() / 255 for k in ("lq", "gts"))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.batch["lq"].device.type, torch.bfloat16, enabled=self.bf16)

    def settings(self) -> contextlib.AbstractContextManager:
        """Those of this step, as another variant may have run before."""
        torch.backends.cudnn.benchmark = "heuristics" not in self.changes
        # Convolutions have TF32 by default, never in Q
        torch.backends.cuda.matmul.allow_tf32 = "tf32" in self.changes
        if "pyiqa" in self.changes:
            return pyiqas_musiq()
        return other_attention() if "attention" in self.changes else contextlib.nullcontext()

    def __call__(self) -> None:
        with self.settings():
            lq, gts = self.images()
            gt = gts[:, 0]
            if "upos" not in self.changes:
                gt = gts[torch.arange(len(gts), device=gts.device), self.choose(gts)]
            with self.autocast():
                sr = self.net_g(lq).float()
                losses = train_sr.generator_losses(sr, gt, self.net_d, self.percep, None)
            (losses["l_pix"] + losses["l_percep"] + 0.1 * losses["l_adv"]).backward()
            train_sr.update(self.optim_g, lr=1e-4)
            self.step_d(sr, gt)
            train_sr.ema_update(self.net_ema, self.net_g, 0.999)

    def step_d(self, sr: Tensor, gt: Tensor) -> None:
        with self.autocast():
            loss = train_sr.discriminator_loss(self.net_d, sr.detach(), gt)
        loss.backward()
        train_sr.update(self.optim_d, lr=1e-4)

    @torch.no_grad()
    def output(self) -> Tensor:
        """Output of the untrained network, to compare the variants."""
        with self.settings(), self.autocast():
            return self.net_g(self.images()[0]).float()

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
            "Adam of G, EMA": lambda: (train_sr.update(self.optim_g, lr=1e-4),
                                       train_sr.ema_update(self.net_ema, self.net_g, 0.999)),
        }  # fmt: skip


@contextlib.contextmanager
def other_attention() -> Iterator[None]:
    """SwinIR's fused attention on a CPU, its plain one on a GPU."""
    before = swinir.plain_attention, swinir.fused_attention
    swinir.fused_attention, swinir.plain_attention = before
    try:
        yield
    finally:
        swinir.plain_attention, swinir.fused_attention = before


@contextlib.contextmanager
def pyiqas_musiq() -> Iterator[None]:
    """Without what models/iqa.py prepares once."""
    from pyiqa.data import multiscale_trans_util as musiq

    def pad(x: Tensor, length: int) -> Tensor:  # as pyiqa does, in short
        zeros = torch.zeros((*x.shape[:2], length)).to(x)
        return torch.cat([x, zeros], -1)[:, :, :length]

    before = musiq.get_hashed_spatial_pos_emb_index, musiq._pad_or_cut_to_max_seq_len
    musiq.get_hashed_spatial_pos_emb_index = before[0].__wrapped__
    musiq._pad_or_cut_to_max_seq_len = pad
    try:
        yield
    finally:
        musiq.get_hashed_spatial_pos_emb_index, musiq._pad_or_cut_to_max_seq_len = before


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


def make_batch(args: argparse.Namespace, net: str, root: Path) -> tuple[MultiGTDataset, dict]:
    """AMO's samples, and the first batch of them."""
    cuda = args.device.type == "cuda"
    size = args.batch_size or ({"swinir": 8, "rrdb": 12}[net] if cuda else 1)
    dataset = make_dataset(root, net, args.patch_size, True)
    return dataset, default_collate([dataset[n] for n in range(size)])


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
            exact = iqa(gts)
            if how == "tf32":
                rough = in_tf32(iqa)(gts)
            else:
                with torch.autocast(device.type, torch.bfloat16):
                    rough = iqa.net(gts).float().flatten()
            flips += int(exact.argmax() != rough.argmax())
            moved.append((exact - rough).abs().max().item())
        lines.append(f"arg max of 5 GTs, MUSIQ with random weights: {how} flips {flips} of {count} "
                     f"choices, moves scores by up to {max(moved):.2g}, in the median "
                     f"{statistics.median(moved):.2g}")
    return lines


def time_net(args: argparse.Namespace, net: str, root: Path, variants: list[str]) -> list[list]:
    """Rows of one network: a step of the baseline and of each variant, then the parts of a step."""
    cuda, clock = args.device.type == "cuda", "cuda" if args.device.type == "cuda" else "wall"
    dataset, batch = make_batch(args, net, root)
    size = len(batch["lq"])
    steps = {name: Step(args, net, batch, frozenset()) for name in ("amo", "amo again")}
    steps |= {name: Step(args, net, batch, frozenset([name]))
              for name in variants if net == "swinir" or name != "attention"}
    output = steps["amo"].output()
    moved = {name: (step.output() - output).abs().max().item() for name, step in steps.items()}
    flop, flop_q = tflop(steps["amo"]), tflop(lambda: steps["amo"].choose(steps["amo"].images()[1]))
    peak = {name: peak_mib(step, args.device) for name, step in steps.items()}
    rows, seconds = [], abba(steps, args.repeats, clock, BACK_TO_BACK if cuda else 1)
    baseline = statistics.median(seconds["amo"])
    for name, values in seconds.items():
        median, q = statistics.median(values), 0 if name == "upos" else flop_q
        rows.append([net, name, size, args.patch_size, *spread(values),
                     f"{median / baseline:.3f}", f"{flop - flop_q + q:.3f}", f"{q:.3f}",
                     f"{peak[name]:.0f}", f"{median * 300_000 / 3600:.1f}", f"{moved[name]:.2g}"])
    parts = abba(steps["amo"].parts(), args.repeats, clock)
    single = make_dataset(root, net, args.patch_size, False)
    parts |= abba({f"load, degrade ({sampler}), one worker": lambda d=d: [d[n] for n in range(size)]
                   for sampler, d in (("amo", dataset), ("upos", single))}, args.repeats)
    for part, values in parts.items():
        rows.append([net, f"part: {part}", size, args.patch_size, *spread(values),
                     f"{statistics.median(values) / baseline:.3f}", *[""] * 5])
    return rows


def time_alone(args: argparse.Namespace, net: str, variant: str) -> list[list]:
    """Rows of a variant and the baseline, in processes of their own: cuDNN keeps its plans."""
    rows = []
    for name in ("amo", variant, variant, "amo"):
        command = ["-m", "benchmarks.step", "--net", net, "--alone", name, "--patch-size",
                   args.patch_size, "--repeats", args.repeats, "--batch-size", args.batch_size or 0]
        text = subprocess.run([sys.executable, *map(str, command)], check=True, text=True,
                              stdout=subprocess.PIPE).stdout
        rows.append([net, f"{name}, alone", "", args.patch_size, *text.split()[-3:], *[""] * 6])
    return rows


def print_alone(args: argparse.Namespace, net: str, root: Path) -> None:
    """Median, minimum and maximum of one variant."""
    _, batch = make_batch(args, net, root)
    step = Step(args, net, batch, frozenset({args.alone} - {"amo"}))
    cuda = args.device.type == "cuda"
    seconds = abba({args.alone: step}, args.repeats, "cuda" if cuda else "wall",
                   BACK_TO_BACK if cuda else 1)
    print(*spread(seconds[args.alone]))


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
                "one by one": functools.partial(gradient, finetune_lora.OneByOne(reward))}
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
        if args.alone:
            print_alone(args, args.net[0], Path(folder))
            return
        for net in args.net:
            rows += time_net(args, net, Path(folder), [v for v in variants if v != "heuristics"])
            rows += time_alone(args, net, "heuristics") if "heuristics" in variants else []
        rows += time_reward(args)
        if args.argmax:
            notes = argmax_flips(Path(folder), args.argmax, args.patch_size, args.device)
    write_results("step", HEADER, rows, args.device, [
        f"seconds: one step, median of {args.repeats}, variants in turn, "
        + ("by CUDA events" if cuda else "elapsed time")
        + "; tflop: counted by torch, tflop_q: of them Q's, in float32; max_abs_difference: of the "
        "untrained G's output", *notes])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--net", nargs="+", choices=("swinir", "rrdb"), default=["swinir", "rrdb"], help="networks")
    add("--variants", nargs="+", choices=VARIANTS,
        help="what to compare with the baseline; upos: no Q; attention: the plain one (on a CPU "
        "the fused one); pyiqa: without what is prepared once for MUSIQ; lora: adapters; apart: "
        "their products one by one; tf32: in matrix products, too; best: bf16, compile, fast_amo; "
        "heuristics: without cuDNN's search, in a process of its own "
        f"(default: all, on a CPU all but {', '.join(GPU_VARIANTS)})")
    add("--alone", choices=("amo", *VARIANTS), help="print the seconds of one variant only")
    add("--batch-size", type=integer(0), metavar="N",
        help="images per process (default: the paper's 8 and 12; 1 on a CPU)")
    add("--patch-size", type=integer(16), default=256, help="GT pixels per side")
    add("--repeats", type=integer(1), default=5, help="timed steps per variant")
    add("--argmax", type=integer(0), default=0, metavar="N",
        help="also count flips over N draws")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("benchmarks.step"):
        main(parse_args())
