"""What a training run is called, what decides its result, and what it says of itself.

args: the flags of train_sr.py and finetune_lora.py, resolved.
"""

import argparse
import os
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import check_finite, file_digest, name_and_digest
from models.hggt import MultiGT
from models.samplers import SCORING
from models.scores import cache_stem
from models.tiles import free_memory
from models.validation import kept_step
from models.weights import names_in

RECIPE = 3  # raised when the same settings train differently: older runs cannot resume
# Flags that do not decide the result
MACHINE = ("device", "rank", "world", "any_size", "num_workers", "save_every", "sample_every",
           "val", "checkpoint_reward", "fast_amo", "compile", "deterministic")


def uses_quality(args: argparse.Namespace) -> bool:
    """Whether --iqa decides anything in a run: it chooses the ground truth, or is the reward."""
    return args.sampler in SCORING or getattr(args, "lambda_q", 0) > 0


def run_folder(args: argparse.Namespace, name: str, usual: dict[str, object]) -> str:
    """The default folder of a run: network, name, and the settings that differ from `usual`.

    name: the run's sampler, stage1, or a fine-tuning's. Files are named by their stem, or by their
    folder if it is a run's. Longer names than 100 characters end in a checksum.
    """
    parts = [f"{args.net}-{name}"]
    for key, value in vars(args).items():
        if key in ("data", "init", "init_d") and value:
            value = os.path.normpath(value)
        if key not in usual or value == usual[key]:
            continue
        if key == "data":
            value = Path(value).resolve().name
        if key in ("init", "init_d"):
            path = Path(value or "none")
            value = path.parent.name if path.stem in ("net_g_ema", "last") else path.stem
        if key in ("iqa", "perceptual"):
            names = (text.partition("@") for text in ([value] if key == "perceptual" else value))
            value = "+".join(metric.replace(":", ".") + (at and f"-{Path(file).stem}")
                             for metric, at, file in names)
        if isinstance(value, list):
            value = "+".join(map(str, value))
        separator = "-" if isinstance(value, str) else ""
        shown = "" if value is True else f"{value:g}" if isinstance(value, float) else value
        parts.append(f"{key.replace('_', '-')}{separator}{shown}")
    folder = "_".join(parts)
    if len(folder) > 100:
        folder = f"{folder[:91]}-{zlib.crc32(folder.encode()):08x}"
    return f"runs/{folder}"


def trained_by(args: argparse.Namespace, name: str) -> str:
    """The one network of a default folder of this --net and name, for --init.

    Raises FileNotFoundError if there is none, ValueError if there are several.
    """
    folders = sorted(p.parent for p in Path("runs").glob(f"{args.net}-{name}*/net_g_ema.pt")
                     if re.fullmatch(f"{args.net}-{name}(_.*)?", p.parent.name))
    if not folders:
        raise FileNotFoundError(f"runs/{args.net}-{name}/net_g_ema.pt: not there; train it first, "
                                "or give --init FILE (none: random weights)")
    if len(folders) > 1:
        files = " ".join(f"{folder}/net_g_ema.pt" for folder in folders)
        raise ValueError(f"--init is missing; choose one of {files}")
    return str(folders[0] / "net_g_ema.pt")


def run_settings(args: argparse.Namespace, data: str) -> dict:
    """What decides a run's result, for resuming: flags, with files by name and checksum.

    data: `data_digest`
    """
    ignored = (*MACHINE, "out", "steps", "data", "cache")
    settings = {k: v for k, v in sorted(vars(args).items()) if k not in ignored}
    for key in ("init", "init_d"):
        if settings[key]:
            settings[key] = f"{Path(settings[key]).name} (sha256 {file_digest(settings[key])})"
    settings["iqa"] = "+".join(map(cache_stem, args.iqa)) if uses_quality(args) else None
    settings["perceptual"] = cache_stem(args.perceptual)
    if args.accumulate == 1:  # as before there was such a flag
        del settings["accumulate"]
    return settings | {"data": f"of sha256 {data}", "recipe": RECIPE}


def summary(args: argparse.Namespace, net_g: nn.Module, sets: MultiGT, lambdas: dict) -> str:
    """What a run is, in a few lines."""
    parameters = sum(p.numel() for p in net_g.parameters())
    trained = sum(p.numel() for p in net_g.parameters() if p.requires_grad)
    lr = f"lr {args.lr:g}" + (f", halved after {', '.join(map(str, args.milestones))}"
                              if args.milestones else "")
    losses = ", ".join(f"{weight:g} {name}" for name, weight in lambdas.items() if weight)
    return "\n".join([
        f"{args.out}: {type(net_g).__name__} of {parameters:,} parameters, {trained:,} of them "
        f"trained, from {args.init or 'random weights'}; on {args.device}, {args.world} processes"
        + memory(args.device),
        f"  data: {args.data}, {len(sets.names)} sets of {len(sets.paths[0])}; sampler "
        f"{args.sampler}" + (f"; Q: {' '.join(args.iqa)}" if uses_quality(args) else ""),
        f"  losses: {losses}" + (f"; perceptual: {args.perceptual}" if args.lambda_p else ""),
        f"  {args.steps:,} steps of {args.batch_size} patches of {args.patch_size} pixels; {lr}; "
        f"EMA {args.ema_decay}{' with warm-up' if args.ema_warmup else ''}",
    ])


def memory(device: torch.device) -> str:
    """The free memory of a device, as text; empty where it is not known."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return f", {free / 2**30:.0f} GiB of memory free" if free else ""


def ema_checkpoint(state: dict[str, Tensor], args: argparse.Namespace) -> dict:
    """What net_g_ema.pt holds: plain tensors that load on any machine, and what made them.

    state: the network's; with --net auto the keys are those of the file that it started from, and
    SwinIR's masks, without which other programs do not know it
    evaluate.py reads the settings. They name no folder: equal runs write equal files.
    Raises ValueError if a weight is not finite.
    """
    paths = ("init", "init_d", "out", "data", "cache")
    settings = {k: v for k, v in sorted(vars(args).items()) if k not in (*MACHINE, *paths)}
    iqa = [name.partition("@") for name in args.iqa if uses_quality(args)]
    settings["iqa"] = [name + at + Path(file).name for name, at, file in iqa]
    settings["perceptual"] = args.perceptual.partition("@")[0]
    names = names_in(args.init) if getattr(args, "any_size", False) else {}
    state = {names.get(k, k): v.cpu().contiguous() for k, v in state.items()}
    check_finite(state, f"{args.out}: the averaged network is not written")
    return {"params_ema": state, "settings": settings}


def origin(args: argparse.Namespace, sets: MultiGT) -> dict[str, str]:
    """What a model card says of a run besides its settings."""
    base = name_and_digest(args.init) if args.init else None
    n, members = len(sets.names), len(sets.paths[0])
    steps = kept_step(Path(args.out), args.steps)
    return {"base": base or "random weights", "steps": str(steps),
            "data": f"{n:,} photos" if sets.is_flat else f"{n:,} sets of {members} ground truths"}
