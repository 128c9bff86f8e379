"""Train 4x super-resolution on several ground truths per image (paper Sec. 4.1, 4.2; Table 5).

Stage two (the paper's): L1 + perceptual + GAN, Eq. 1, with the ground truth chosen by --sampler.

    python train_sr.py --sampler amo --init runs/swinir-stage1/net_g_ema.pt       # CPU or one GPU
    torchrun --nproc_per_node=4 train_sr.py --sampler amo --init ...              # the paper's run
    torchrun --nproc_per_node=4 train_sr.py --net rrdb --sampler upos --init ...  # RealESRGAN, HGGT

Stage one (the initialisation): L1 alone on a flat folder of high-resolution crops.

    torchrun --nproc_per_node=4 train_sr.py --data datasets/DF2K_OST --lambda-p 0 --lambda-a 0

In:  --data, a folder in one of the layouts of models/hggt.py (`--check-data` inspects it).
Out: --out (default runs/<net>-<sampler>) with net_g_ema.pt (the result), last.pt (everything that a
     resume needs; evaluate.py reads it too), log.csv, samples/*.png and, where tensorboard is
     installed, tensorboard/. Running the same command again resumes; draws depend on (seed, draw)
     alone, so a resumed run equals an uninterrupted one.
"""

import argparse
import copy
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.cache import PixelCache
from models.checkpoint import (
    TrainingLog,
    file_digest,
    load_file,
    load_last,
    read_state,
    save_atomic,
    save_last,
)
from models.degradations import degrade_patch, usm_sharpen
from models.discriminator import UNetDiscriminatorSN
from models.distributed import (
    Interrupt,
    any_rank,
    clean_exit,
    dead_worker_named,
    cleanup,
    gather,
    init_distributed,
    rank_zero_first,
    start_worker,
)
from models.dataset import MultiGTDataset, StepBatchSampler, check_patch_size
from models.hggt import MultiGT, check_data, load_sets, read_rgb
from models.iqa import load_iqa, min_side
from models.losses import LossWatch, VGG19Loss, gan_loss_d, gan_loss_g, laplacian_loss
from models.rrdb import RRDBNet
from models.samplers import SAMPLERS, choose_argmax, sampling_weights
from models.scores import (
    MeanOfMetrics,
    cache_stem,
    mean_standardised,
    scale_of,
    score_images,
)
from models.swinir import SwinIR

LOSSES = ("l_pix", "l_percep", "l_adv", "l_d", "l_iqa")
CALIBRATION_DRAWS = 128  # whose ground truths bring several metrics (--iqa a b) to one scale

# PAPER: Sec. 5, 8.2 (HGGT's settings). The `_tiny` nets are the demo's: minutes on a CPU.
PRESETS = {
    "swinir": {
        "build": functools.partial(SwinIR, upsampler="pixelshuffle"),
        "degradation": "one_round",
        "batch_size": 32,
        "milestones": [200_000, 250_000, 275_000, 287_500],
        "stage_one_milestones": [150_000, 240_000, 270_000, 285_000],
        "disc_feat": 64,
    },
    "rrdb": {
        "build": RRDBNet,
        "degradation": "two_round",
        "batch_size": 48,
        "milestones": [300_000],
        "stage_one_milestones": [300_000],
        "disc_feat": 64,
    },
}
PRESETS["swinir_tiny"] = PRESETS["swinir"] | {
    # A pixel-shuffle tail this small leaves a grid, which a small quality model rewards.
    "build": functools.partial(
        SwinIR, embed_dim=24, depths=(2, 2), num_heads=(2, 2), num_feat=16,
        upsampler="nearest+conv",
    ),
    "degradation": "light",
    "batch_size": 8,
    "disc_feat": 8,
}
PRESETS["rrdb_tiny"] = PRESETS["rrdb"] | {
    "build": functools.partial(RRDBNet, num_feat=16, num_block=2, num_grow_ch=8),
    "batch_size": 8,
    "disc_feat": 8,
}


# ------------------------------------------------------------------------- the method


def lr_at(step: int, base: float, milestones: list[int]) -> float:
    """Learning rate of a 1-based step: halved once each milestone has been passed."""
    return base * 0.5 ** sum(step > m for m in milestones)


@torch.no_grad()
def ema_update(net_ema: nn.Module, net: nn.Module, decay: float) -> None:
    """net_ema <- decay * net_ema + (1 - decay) * net, over the trained parameters."""
    pairs = zip(net_ema.parameters(), net.parameters(), strict=True)
    averaged, trained = zip(*((e, p) for e, p in pairs if p.requires_grad), strict=True)
    torch._foreach_lerp_(averaged, trained, 1 - decay)


# ------------------------------------------------------------------------- boilerplate


def load_checked(args: argparse.Namespace) -> nn.Module:
    """The network in --init, which must be of the kind and size of --net."""
    state, net = read_state(args.init), PRESETS[args.net]["build"]()
    if not type(net).matches(state):
        raise ValueError(f"{args.init}: not a {type(net).__name__}, which --net {args.net} is")
    try:
        loaded = type(net).from_state(state)
    except ValueError as error:
        raise ValueError(f"{args.init}: {error}") from error
    shapes = {k: v.shape for k, v in net.named_parameters()}
    if shapes != {k: v.shape for k, v in loaded.named_parameters()}:
        raise ValueError(f"{args.init}: {type(net).__name__} of another size than --net {args.net}")
    return loaded


def load_discriminator(net_d: nn.Module, path: str) -> None:
    """Weights of the discriminator from a run's last.pt or a public net_d file."""
    data = load_file(path)
    state = data["net_d"] if "net_d" in data else read_state(path)
    try:
        net_d.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: holds no discriminator of this size for --init-d") from error


def other_metrics(args: argparse.Namespace) -> str:
    """What --iqa adds to the name of a run folder: nothing if it is the paper's."""
    names = "+".join(name.partition("@")[0].replace(":", ".") for name in args.iqa)
    return "" if names == "musiq" else f"_{names}"


def load_quality(args: argparse.Namespace, side: int, differentiable: bool = False) -> nn.Module:
    """--iqa for images of that smaller side: one NR-IQA, or several as one, not yet calibrated."""
    for name in args.iqa:
        if side < min_side(name):
            raise ValueError(f"--iqa {name}: needs images of {min_side(name)} px, these are {side}")
    metrics = rank_zero_first(lambda: [load_iqa(name, args.device, differentiable=differentiable)
                                  for name in args.iqa])  # rank 0 may download their weights
    return metrics[0] if len(metrics) == 1 else MeanOfMetrics(metrics)


@torch.no_grad()
def calibrate(args: argparse.Namespace, draws: MultiGTDataset, metrics: MeanOfMetrics) -> Tensor:
    """Scale of several metrics, (2, M): their scores of all ground truths of the first draws."""
    scores = []
    for draw in range(CALIBRATION_DRAWS):
        patches = torch.from_numpy(draws[draw]["gts"]).to(args.device).float() / 255
        scores.append(metrics.each(patches).cpu().numpy())
    scale = scale_of(np.concatenate(scores), args.iqa)
    for name, mean, deviation in zip(args.iqa, *scale, strict=True):
        print(f"--iqa {name}: {mean:.4g} ± {deviation:.4g} over the patches of "
              f"{CALIBRATION_DRAWS} draws")
    return torch.tensor(scale, dtype=torch.float32)


def image_quality(args: argparse.Namespace, sets: MultiGT, iqa: nn.Module) -> np.ndarray:
    """Quality of every whole ground truth, (n, K), for sma and smp (paper Sec. 4.2).

    Scored once, shared among the ranks, and kept in <data>/.scores (or in the run folder, where the
    data is read-only) under the metric's name and each image's path relative to the data.
    """
    home = sets.root if os.access(sets.root, os.W_OK) else args.out
    keys = np.array([[os.path.relpath(p, sets.root) for p in row] for row in sets.paths], object)
    images = dict(zip(keys.flat, (p for row in sets.paths for p in row), strict=True))
    qualities = []
    for name, metric in zip(args.iqa, getattr(iqa, "metrics", [iqa]), strict=True):
        scores = score_images(name, lambda metric=metric: metric, images, Path(home) / ".scores",
                              args.device, None, args.rank, args.world, gather)
        quality = scores.of(keys) if scores else np.full(keys.shape, np.nan)
        if np.isnan(quality).any():
            raise ValueError(f"--iqa {name}: could not score every image of {sets.root}, see above")
        qualities.append(quality)
    scores = np.stack(qualities, -1)  # (n, K, M)
    return quality if len(args.iqa) == 1 else mean_standardised(scores, scale_of(scores, args.iqa))


def run_settings(args: argparse.Namespace) -> dict:
    """What decides a run's result, for resuming: flags, with files by name and checksum."""
    passed = ("device", "rank", "world", "out", "steps", "num_workers", "save_every",
              "sample_every", "check_data", "data", "cache", "checkpoint_reward")
    settings = {k: v for k, v in sorted(vars(args).items()) if k not in passed}
    for key in ("init", "init_d"):
        if settings[key]:
            settings[key] = f"{Path(settings[key]).name} (sha256 {file_digest(settings[key])})"
    scored = args.sampler in ("sma", "smp", "amo") or args.lambda_q
    return settings | {"iqa": "+".join(map(cache_stem, args.iqa)) if scored else None}


def data_settings(sets: MultiGT) -> str:
    """The training data by its names, sizes and labels, wherever it lies."""
    digest = hashlib.sha256(repr(sets.names).encode() + sets.sizes.tobytes())
    if sets.labels is not None:
        digest.update(sets.labels.tobytes())
    return f"{len(sets.names)} sets (sha256 {digest.hexdigest()[:12]})"


def sample_rows(lq: Tensor, sr: Tensor, gt: Tensor, count: int = 4) -> np.ndarray:
    """One image, uint8 (H, W, 3), a row per sample: LQ (nearest x4), SR, the chosen GT."""
    big = F.interpolate(lq[:count], size=gt.shape[-2:], mode="nearest")
    rows = torch.cat([big, sr[:count].detach().float().clamp(0, 1), gt[:count]], -1)
    return (rows.permute(0, 2, 3, 1).flatten(0, 1) * 255).round().byte().cpu().numpy()


def ema_checkpoint(net: nn.Module) -> dict:
    """What net_g_ema.pt holds: plain tensors that load on any machine."""
    return {"params_ema": {k: v.cpu().contiguous() for k, v in net.state_dict().items()}}


def not_finite(step: int, *nets: nn.Module | None) -> tuple[int, str] | None:
    """(step, which weights) if a gradient has spoilt any, as LossWatch says it of the losses."""
    for net in nets:
        for name, values in net.named_parameters() if net is not None else ():
            if not values.isfinite().all():
                return step, f"{type(net).__name__}.{name}"
    return None


# ------------------------------------------------------------------------- training


def score_reward(reward: nn.Module, sr: Tensor, one_by_one: bool) -> Tensor:
    """Q of (N, 3, H, W), (N,); one by one in the memory of one image's graph, each scored twice."""
    if not one_by_one:
        return reward(sr)
    return torch.cat([checkpoint(reward, x, use_reentrant=False) for x in sr.split(1)])


def step_generator(
    args: argparse.Namespace, net_g: nn.Module, net_d: nn.Module | None, percep: Callable,
    reward: nn.Module | None, optim: torch.optim.Optimizer, lq: Tensor, gt: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of net_g: Eq. 1, and Eq. 5 with a reward; gt (N, 3, H, W) serves every term.

    Returns the output for lq, (N, 3, H, W), and the terms by their names in LOSSES.
    """
    losses = dict.fromkeys(LOSSES, torch.zeros((), device=lq.device))
    if net_d is not None:
        net_d.requires_grad_(False)
    # ASSUMED: bfloat16 in the networks and VGG19 where the GPU has it; HGGT trains in float32.
    with torch.autocast(lq.device.type, torch.bfloat16, enabled=args.bf16):  # fp16 overflows SwinIR
        sr = net_g(lq).float()
        losses["l_pix"] = F.l1_loss(sr, gt)
        if args.lambda_p > 0:
            losses["l_percep"] = percep(sr, gt)
        if net_d is not None:
            losses["l_adv"] = gan_loss_g(net_d(sr))
        if reward is not None:
            # PAPER: Eq. 5. Not clamped: outside [0, 1] a clamp would have no gradient back.
            losses["l_iqa"] = -score_reward(reward, sr, args.checkpoint_reward).mean()
    total = (args.lambda_l1 * losses["l_pix"] + args.lambda_p * losses["l_percep"]
             + args.lambda_a * losses["l_adv"] + args.lambda_q * losses["l_iqa"])
    optim.zero_grad(set_to_none=True)
    total.backward()
    optim.step()
    return sr, losses


def step_discriminator(
    args: argparse.Namespace, net_d: nn.Module, optim: torch.optim.Optimizer, gt: Tensor, sr: Tensor
) -> Tensor:
    """One step of net_d: real 1, fake 0. Returns its loss."""
    net_d.requires_grad_(True)
    # ASSUMED: one batch of both, so spectral norm iterates once; HGGT's code runs it twice.
    with torch.autocast(gt.device.type, torch.bfloat16, enabled=args.bf16):
        real, fake = net_d(torch.cat([gt, sr.detach()])).float().chunk(2)
        loss = gan_loss_d(real, fake)
    optim.zero_grad(set_to_none=True)
    loss.backward()
    optim.step()
    return loss


@dead_worker_named()
def fit(args: argparse.Namespace, net_g: nn.Module, reward: nn.Module | None = None) -> nn.Module:
    """Train what requires a gradient in net_g on args.data; returns the averaged network (EMA).

    reward: a differentiable NR-IQA of the SR image, (N, 3, H, W) -> (N,), for Eq. 5 (fine-tuning).
    The loop reads: batch, choice, net_g step, net_d step, EMA, log, save.
    """
    rank, world, device = args.rank, args.world, args.device
    out, preset = Path(args.out), PRESETS[args.net]
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} is the total: it must be divisible by "
                         f"the {world} processes")

    # Data and sampler. Everything that can be missing is asked for here, before the first step.
    sets = rank_zero_first(lambda: load_sets(args.data))
    if args.sampler in ("upos", "smp") and sets.labels is None:
        raise ValueError(f"{args.data}: --sampler {args.sampler} needs labels/<range>/A,B,C; "
                         "use origs_only, rand, sma or amo without them")
    check_patch_size(sets.paths, sets.sizes, args.patch_size)
    shape = (len(sets.names), len(sets.paths[0]))
    stage_one = args.lambda_p == 0 and args.lambda_a == 0 and reward is None
    iqa = quality = None
    if args.sampler in ("sma", "smp", "amo"):
        iqa = load_quality(args, args.patch_size if args.sampler == "amo"
                           else int(sets.sizes.min()))

    # Networks, losses, optimisers
    net_g.to(device, memory_format=torch.channels_last).train()  # up to twice as fast, CPU too
    net_ema = copy.deepcopy(net_g).eval().requires_grad_(False)
    trained = [p for p in net_g.parameters() if p.requires_grad]
    adam = functools.partial(torch.optim.Adam, betas=(0.9, 0.99), fused=True)
    optim_g = adam(trained, lr=args.lr)
    net_d = optim_d = None
    if args.lambda_a > 0:
        torch.manual_seed(args.seed)
        net_d = UNetDiscriminatorSN(num_feat=preset["disc_feat"])
        if args.init_d:
            load_discriminator(net_d, args.init_d)
        net_d.to(device, memory_format=torch.channels_last)
        optim_d = adam(net_d.parameters(), lr=args.lr_d)
    percep = laplacian_loss
    if args.perceptual == "vgg19" and args.lambda_p > 0:
        percep = rank_zero_first(VGG19Loss).to(device, memory_format=torch.channels_last)

    # Resume: all state is in last.pt, written atomically
    out.mkdir(parents=True, exist_ok=True)
    settings = run_settings(args) | {"data": data_settings(sets)}
    meter = torch.zeros(1 + len(LOSSES) + shape[1], dtype=torch.float64, device=device)
    done, state = 0, load_last(out, settings)
    if state:
        net_g.load_state_dict(state["params"])
        net_ema.load_state_dict(state["params_ema"])
        optim_g.load_state_dict(state["optim_g"])
        if net_d is not None:
            net_d.load_state_dict(state["net_d"])
            optim_d.load_state_dict(state["optim_d"])
        done = state["step"]
        if rank == 0:  # it is the sum over the ranks
            meter = state["meter"].to(device)
    header = ["step", "lr", *LOSSES, *(f"share_{k}" for k in range(shape[1]))]
    if rank == 0:
        if done:
            print(f"resuming {out} at step {done}")
        log = TrainingLog(out, header, done, args.log_every)

    # The samples: which set, patch, flip, degradation and GT is a function of (seed, draw)
    make_draws = functools.partial(
        MultiGTDataset, sets.paths, sets.sizes, patch_size=args.patch_size, seed=args.seed, read=read_rgb,
        degrade=functools.partial(degrade_patch, setting=preset["degradation"]),
        # Real-ESRNet trains on USM-sharpened GT; stage two does not (HGGT).
        prepare=usm_sharpen if stage_one and preset["degradation"] == "two_round" else None,
        cache=args.cache and rank_zero_first(lambda: PixelCache(args.cache, sets.root, sets.paths,
                                                           sets.sizes, read_rgb)),
    )
    scale = state and state.get("iqa_scale")
    scored = [m for m in (args.sampler == "amo" and iqa, reward) if isinstance(m, MeanOfMetrics)]
    if scored and scale is None:
        no_lq = make_draws(None, degrade=lambda read, top, _, size, rng: read(top + size)[:1, :1])
        scale = gather(calibrate(args, no_lq, scored[0]) if rank == 0 else None)[0]
    for metric in scored:
        metric.scale = scale.to(device)
    if args.sampler in ("sma", "smp"):
        quality = image_quality(args, sets, iqa)
    draws = make_draws(sampling_weights(args.sampler, sets.labels, quality, args.tau, shape))

    # Wrapped networks for the gradient steps, the bare ones for everything else. The buffers
    # (masks, spectral norm's vectors) evolve identically on every rank and need no broadcast.
    wrap = functools.partial(DistributedDataParallel, broadcast_buffers=False,
                             device_ids=[device.index] if device.type == "cuda" else None)
    ddp_g = wrap(net_g) if world > 1 else net_g
    ddp_d = wrap(net_d) if world > 1 and net_d is not None else net_d
    batches = StepBatchSampler(done + 1, args.steps, args.batch_size, rank, world)
    loader = DataLoader(
        draws, batch_sampler=batches,
        num_workers=args.num_workers, pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if args.num_workers else None,
    )

    watch, interrupt = LossWatch(LOSSES, device), Interrupt()
    bar = tqdm(loader, initial=done, total=args.steps, desc=out.name, unit="it", disable=rank > 0)
    for step, batch in enumerate(bar, start=done + 1):
        lq = batch["lq"].to(device, non_blocking=True).float() / 255  # (N, 3, h, w)
        gts = batch["gts"].to(device, non_blocking=True).float() / 255  # (N, K or 1, 3, H, W)
        choice = batch["choice"].to(device, non_blocking=True)
        if args.sampler == "amo":
            choice = choose_argmax(gts, iqa)
            gt = gts[torch.arange(len(gts), device=device), choice]
        else:
            gt = gts[:, 0]

        lr = optim_g.param_groups[0]["lr"] = lr_at(step, args.lr, args.milestones)
        sr, losses = step_generator(args, ddp_g, net_d, percep, reward, optim_g, lq, gt)
        if net_d is not None:
            optim_d.param_groups[0]["lr"] = lr_at(step, args.lr_d, args.milestones)
            losses["l_d"] = step_discriminator(args, ddp_d, optim_d, gt, sr)
        ema_update(net_ema, net_g, args.ema_decay)

        # Log: means since the last row, over all ranks; no time in it, so that runs compare equal
        shares = F.one_hot(choice, shape[1]).double().mean(0)
        parts = torch.stack([losses[k].detach() for k in LOSSES])
        meter += torch.cat([meter.new_ones(1), parts.double(), shares])
        if step % args.log_every == 0 or step == args.steps:
            sums = meter.clone()
            if world > 1:
                dist.all_reduce(sums)
            mean = (sums[1:] / sums[0]).tolist()
            if step % args.log_every == 0:  # else a longer run goes on with this row's interval
                meter.zero_()
            if rank == 0:
                log.row(step, lr, mean)
                bar.set_postfix({k: f"{m:.3g}" for k, m in zip(LOSSES, mean, strict=False) if m})
        if rank == 0 and args.sample_every and step % args.sample_every == 0:
            log.images(step, sample_rows(lq, sr, gt))

        # Save: now and then, at the end, and when a signal asks to stop; never what is not finite
        save = step % args.save_every == 0 or step == args.steps
        bad = watch(step, parts)
        stop, failed = any_rank(bool(interrupt.caught), bool(bad))
        if (save or stop) and not failed:
            bad = watch() or not_finite(step, net_g, net_d)
            failed, = any_rank(bool(bad))
        if failed:
            if bad:
                numbers = batches.of_step(bad[0])
                names = ", ".join(sets.names[draws.set_of(n)] for n in numbers)
                bad = (f"step {bad[0]}: not finite: {bad[1]}; draws {numbers[0]} to {numbers[-1]}: "
                       f"{names}; {out} keeps its last good checkpoint")
            raise ValueError(next(text for text in gather(bad) if text))
        if save or stop:
            saved = meter.clone()
            if world > 1:
                dist.all_reduce(saved)
            if rank == 0:
                save_last(
                    out,
                    {
                        "params_ema": net_ema.state_dict(), "params": net_g.state_dict(),
                        "net_d": net_d.state_dict() if net_d is not None else None,
                        "optim_g": optim_g.state_dict(),
                        "optim_d": optim_d.state_dict() if optim_d is not None else None,
                        "step": step, "meter": saved, "settings": settings, "iqa_scale": scale,
                    },
                )
        if stop and step < args.steps:
            if rank == 0:
                print(f"{out}: stopped by a signal after step {step}; the same command goes on")
            cleanup()
            sys.exit(0)
    interrupt.restore()
    return net_ema


def main(args: argparse.Namespace) -> None:
    if args.check_data:
        problems = check_data(args.data)
        if problems:
            raise ValueError(f"{args.data}: {len(problems)} problems, listed above")
        return
    resolve_args(args)
    torch.manual_seed(args.seed)
    if args.init:
        net_g = load_checked(args)
    else:
        net_g = PRESETS[args.net]["build"]()
        if args.rank == 0 and args.lambda_p + args.lambda_a > 0:
            print("no --init: from random weights. The paper starts from stage one "
                  "(--lambda-p 0 --lambda-a 0) or public PSNR weights.", file=sys.stderr)
    net_ema = fit(args, net_g)
    if args.rank == 0:
        save_atomic(ema_checkpoint(net_ema), Path(args.out) / "net_g_ema.pt")
        print(f"wrote {Path(args.out) / 'net_g_ema.pt'}")
    cleanup()


def resolve_args(args: argparse.Namespace) -> None:
    """Fill in what depends on the net, the stage and the machine."""
    preset = PRESETS[args.net]
    args.rank, args.world, args.device = init_distributed()
    torch.backends.cudnn.allow_tf32 = False  # it moves scores of Q; the networks run in bf16
    stage_one = args.lambda_p == 0 and args.lambda_a == 0 and not args.lambda_q
    if stage_one:
        # PAPER: PSNR-pretrained initialisation (HGGT): L1 only, lr 2e-4
        args.sampler = args.sampler or "origs_only"
    if args.sampler is None:
        raise ValueError(f"--sampler is missing; choose one of {', '.join(SAMPLERS)}")
    milestones = preset["stage_one_milestones" if stage_one else "milestones"]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    defaults = {
        "num_workers": min(8, max(1, share)),
        "batch_size": preset["batch_size"],
        "lr": 2e-4 if stage_one else 1e-4,
        "milestones": milestones,
        "out": f"runs/{args.net}-{'stage1' if stage_one else args.sampler}"
        + other_metrics(args) * (args.sampler in ("sma", "smp", "amo"))
        + (f"-seed{args.seed}" if args.seed else ""),
        "bf16": args.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr_d is None:
        args.lr_d = args.lr
    for name in ("tau", "steps", "batch_size", "patch_size", "log_every", "save_every"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    if len(set(args.iqa)) < len(args.iqa):
        raise ValueError(f"--iqa {' '.join(args.iqa)}: a metric twice; name each once")
    if args.patch_size % 8:
        raise ValueError(f"--patch-size {args.patch_size}: must be a multiple of 8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a training run, shared with finetune_lora.py."""
    add = parser.add_argument
    add("--net", choices=list(PRESETS), default="swinir", help="network and its settings")
    add("--data", default="datasets/HGGT", help="multi-GT folder, or flat folder of HR crops")
    add("--cache", metavar="DIR",
        help="decode the images once into a file in DIR and read crops from it (HGGT: 79 GB)")
    add("--sampler", choices=SAMPLERS, help="who chooses the ground truth (paper Sec. 4.2, 5)")
    add("--init", help="weights to start from (params_ema, params or bare state dict)")
    add("--init-d", help="discriminator to start from (a last.pt or a public net_d file)")
    add("--out", help="run folder (default: runs/<net>-<sampler>)")
    add("--iqa", nargs="+", default=["musiq"], metavar="NAME[@FILE]",
        help="NR-IQA of sma, smp, amo and of the reward: pyiqa name or module:function; of several "
        "the mean of their standardised scores, on the scale of the first")
    add("--tau", type=float, default=10.0, help="softmax temperature, in units of --iqa's score")
    add("--lambda-l1", type=float, default=1.0, help="weight of the L1 loss")
    add("--lambda-p", type=float, default=1.0, help="weight of the perceptual loss")
    add("--lambda-a", type=float, default=0.1, help="weight of the GAN loss; 0: no discriminator")
    add("--perceptual", choices=("vgg19", "laplacian"), default="vgg19",
        help="perceptual loss; laplacian needs no weights")
    add("--steps", type=int, default=300_000, help="optimiser steps in all")
    add("--batch-size", type=int, help="samples per step over all processes (default: the paper's)")
    add("--patch-size", type=int, default=256, help="GT patch side in pixels")
    add("--lr", type=float, help="Adam learning rate of net_g (1e-4; stage one 2e-4)")
    add("--lr-d", type=float, help="Adam learning rate of the discriminator (default: --lr)")
    add("--milestones", type=int, nargs="*", help="steps after which the learning rate is halved")
    add("--ema-decay", type=float, default=0.999, help="decay of the averaged weights per step")
    add("--seed", type=int, default=0, help="seed of weights and draws")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None,
        help="bfloat16 autocast (default: where the GPU has it)")
    add("--num-workers", type=int,
        help="data worker processes per rank; 0: none (default: its share of the cores, up to 8)")
    add("--log-every", type=int, default=100, help="steps between rows of log.csv")
    add("--save-every", type=int, default=5000, help="steps between writes of last.pt")
    add("--sample-every", type=int, default=5000, help="steps between sample images; 0: none")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument("--check-data", action="store_true",
                        help="decode all of --data, print counts and everything wrong, and stop")
    parser.set_defaults(lambda_q=0.0, checkpoint_reward=False)  # Eq. 5 is finetune_lora.py's
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("train_sr.py"):
        main(parse_args())
