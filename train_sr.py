"""Train 4x super-resolution on several ground truths per image (paper Sec. 4.1, 4.2; Table 5).

Stage two, the paper's: L1 + perceptual + GAN (Eq. 1); --sampler chooses the ground truth.

    torchrun --nproc_per_node=4 train_sr.py --sampler amo              # the paper's SwinIR-AMO
    torchrun --nproc_per_node=4 train_sr.py --net rrdb --sampler upos  # RealESRGAN-UPos, as HGGT
    python train_sr.py --sampler amo --init FILE       # CPU or one GPU; any public x4 network

Stage one, the initialisation: L1 alone on a flat folder of high-resolution crops.

    torchrun --nproc_per_node=4 train_sr.py --data datasets/DF2K_OST --lambda-p 0 --lambda-a 0 \\
        --init swinir_psnr.pth

In:  --data, a folder in one of the layouts of models/hggt.py (`python -m tools.check --data DIR`
     inspects it).
Out: --out (default runs/<net>-<sampler>, followed by the settings that differ from the paper's)
     with net_g_ema.pt (the result; .safetensors: the same), card.md, last.pt (all that a resume
     needs; evaluate.py reads it too), log.csv, samples/*.png (of the averaged network) and, where
     tensorboard is installed, tensorboard/. Rerun the same command to resume: draws depend on
     (seed, draw) alone, so a resumed run equals an uninterrupted one.
"""

import argparse
import copy
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from models.cache import PixelCache
from models.dataset import MultiGTDataset, StepBatchSampler, check_patch_size
from models.degradations import degrade_patch, usm_sharpen
from models.discriminator import UNetDiscriminatorSN
from models.distributed import (
    clean_exit,
    cleanup,
    dead_worker_named,
    init_distributed,
    rank_zero_first,
    start_method,
    start_worker,
)
from models.export import write_result
from models.flags import (
    PATCH_SIZE,
    SEED,
    folder_or_count,
    integer,
    new_parser,
    number,
    perceptual,
)
from models.hggt import MultiGT, is_flat_folder, load_sets
from models.iqa import FrozenMetric
from models.losses import VGG19Loss, gan_loss_d, gan_loss_g, laplacian_loss
from models.quality import (
    data_digest,
    image_digest,
    image_quality,
    in_tf32,
    load_quality,
    score_folder,
)
from models.rrdb import ResidualDenseBlock, RRDBNet
from models.run import TrainingRun
from models.samplers import LABELLED, SAMPLERS, FastArgmax, choose_argmax, sampling_weights
from models.settings import (
    ema_checkpoint,
    origin,
    run_folder,
    run_settings,
    summary,
    trained_by,
    uses_quality,
)
from models.swinir import SwinBlock, SwinIR, stochastic_depth
from models.validation import Pair, Validation, centres, hold_out, make_pairs, read_pairs
from models.weights import (
    load_discriminator,
    load_like,
    load_net,
    read_network,
    vgg19_state,
)

LOSSES = ("l_pix", "l_percep", "l_adv", "l_d", "l_iqa")  # of Eq. 1 and 5, columns of log.csv
# PAPER: Sec. 5, 8.2 (HGGT's settings). The `_tiny` nets are the demo's: minutes on a CPU.
PRESETS = {
    "swinir": {
        "build": functools.partial(SwinIR, upsampler="pixelshuffle"),
        "degradation": "one_round",
        "batch_size": 32,
        "milestones": [200_000, 250_000, 275_000, 287_500],
        "stage_one_milestones": [150_000, 240_000, 270_000, 285_000],
        "psnr": "swinir_psnr",  # the file that stage one starts from
        "drop_path": 0.1,  # stochastic depth; the default that HGGT's configs leave as it is
        "disc_feat": 64,
    },
    "rrdb": {
        "build": RRDBNet,
        "degradation": "two_round",
        "batch_size": 48,
        "milestones": [300_000],
        "stage_one_milestones": [300_000],
        "psnr": "esrgan_psnr",
        "drop_path": 0.0,
        "disc_feat": 64,
    },
}
PRESETS["other"] = PRESETS["rrdb"] | {"build": None}  # spandrel's, built from a file alone
PRESETS["swinir_tiny"] = PRESETS["swinir"] | {
    # A pixel-shuffle tail this small leaves a grid, which a small quality model rewards.
    "build": functools.partial(
        SwinIR, embed_dim=24, depths=(2, 2), num_heads=(2, 2), num_feat=16,
        upsampler="nearest+conv",
    ),
    "degradation": "light",
    "batch_size": 8,
    "drop_path": 0.0,
    "disc_feat": 8,
}
PRESETS["rrdb_tiny"] = PRESETS["rrdb"] | {
    "build": functools.partial(RRDBNet, num_feat=16, num_block=2, num_grow_ch=8),
    "batch_size": 8,
    "disc_feat": 8,
}


# ------------------------------------------------------------------------- the method


def generator_losses(
    sr: Tensor, gt: Tensor, net_d: nn.Module | None, percep: Callable | None,
    reward: nn.Module | None,
) -> dict[str, Tensor]:
    """The terms of Eq. 1, and of Eq. 5 with a reward, by their names in LOSSES; not yet weighted.

    sr, gt: (N, 3, H, W), gt in [0, 1]; the chosen ground truth serves every term.
    net_d, percep, reward: None where the term has no weight; reward: (N, 3, H, W) -> (N,)
    """
    losses = dict.fromkeys(LOSSES, torch.zeros((), device=sr.device))
    losses["l_pix"] = F.l1_loss(sr, gt)
    if percep is not None:
        losses["l_percep"] = percep(sr, gt)
    if net_d is not None:
        losses["l_adv"] = gan_loss_g(net_d.requires_grad_(False)(sr))
    if reward is not None:
        # PAPER: Eq. 5. Not clamped: outside [0, 1] a clamp would give no gradient back.
        losses["l_iqa"] = -reward(sr).mean()
    return losses


def discriminator_loss(net_d: nn.Module, sr: Tensor, gt: Tensor) -> Tensor:
    """Loss of net_d: ground truth is real (1), the generator's output is fake (0).

    Two forward passes, as HGGT's, in each of which spectral norm takes a step.
    """
    net_d.requires_grad_(True)
    return gan_loss_d(net_d(gt).float(), net_d(sr.detach()).float())


def split(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """A batch in `count` equal parts, whose mean gradients are the batch's."""
    parts = zip(*(values.chunk(count) for values in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def update(optim: torch.optim.Optimizer, lr: float) -> None:
    """One step of an optimiser with one group of parameters, whose gradients it drops."""
    optim.param_groups[0]["lr"] = lr
    optim.step()
    optim.zero_grad(set_to_none=True)


def lr_at(step: int, base: float, milestones: list[int]) -> float:
    """Learning rate of a 1-based step: halved once each milestone has been passed."""
    return base * 0.5 ** sum(step > m for m in milestones)


def ema_decay_at(step: int, decay: float, warmup: bool) -> float:
    """Decay of the averaged weights at a 1-based step; a warm-up lets short runs move them."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def ema_update(net_ema: nn.Module, net: nn.Module, decay: float) -> None:
    """net_ema <- decay * net_ema + (1 - decay) * net, over the trained parameters."""
    pairs = zip(net_ema.parameters(), net.parameters(), strict=True)
    averaged, trained = zip(*((e, p) for e, p in pairs if p.requires_grad), strict=True)
    torch._foreach_lerp_(averaged, trained, 1 - decay)


@dead_worker_named()
def fit(
    args: argparse.Namespace, sets: MultiGT, pairs: list[Pair], net_g: nn.Module,
    stage_one: bool = False,
    make_reward: Callable[[dict], nn.Module] | None = None, lambda_q: float = 0.0,
) -> nn.Module:
    """Train the parameters of net_g that require a gradient; returns the averaged network (EMA).

    pairs: for validation; empty: none
    make_reward: for Eq. 5 (fine-tuning); from what the run has saved to a differentiable quality
    model of the SR image, (N, 3, H, W) -> (N,), which lambda_q weighs.
    Everything that can be missing is loaded before the first step.
    """
    device, preset = args.device, PRESETS[args.net]
    cuda = device.type == "cuda"

    # Networks and losses
    net_ema, net_d, optim_g, optim_d = make_networks(args, net_g)
    ddp_g, ddp_d = wrap(net_g, args), wrap(net_d, args)  # for the gradients; the bare ones else
    set_backends(args)
    percep = perceptual_loss(args) if args.lambda_p > 0 else None
    lambdas = {"l_pix": args.lambda_l1, "l_percep": args.lambda_p, "l_adv": args.lambda_a,
               "l_iqa": lambda_q}
    # PAPER: float32 as HGGT ran it, with PyTorch's defaults (on an A100 TF32 in convolutions).
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)

    # The run: resumed, or refused before anything takes long
    images = image_digest(sets, score_folder(sets, args.out))
    settings = run_settings(args, data_digest(sets, images))
    run = TrainingRun(
        args, {"params_ema": net_ema, "params": net_g, "net_d": net_d, "optim_g": optim_g,
               "optim_d": optim_d},
        LOSSES, len(sets.paths[0]), settings)

    # Quality models and data
    quality = load_quality(args, sets, run.extra) if args.sampler == "amo" else None
    reward = make_reward(run.extra) if make_reward else None
    choose = functools.partial(choose_argmax, iqa=quality)
    if args.fast_amo:
        choose = FastArgmax(in_tf32(quality), quality)
    validation = make_validation(args, pairs, quality, reward, run)
    if args.compile:
        compile_blocks(net_g, net_d, percep, quality)
    loader = make_loader(args, sets, images, run.done + 1, stage_one)
    if args.rank == 0:
        print(summary(args, net_g, sets, lambdas))
        if args.sample_every:  # fixed crops: of the validation, or the first of the training
            run.shown = centres(pairs or first_samples(loader.dataset), args.patch_size)

    # Loop
    if validation and not run.done:
        run.validate(0, validation)
    for step, batch in run.steps(loader, functools.partial(describe, loader)):
        lr, lr_d = (lr_at(step, base, args.milestones) for base in (args.lr, args.lr_d))
        torch.manual_seed(args.seed << 32 | step * args.world + args.rank)  # dropout, if there is
        parts = split(batch, args.accumulate)  # one part: the batch
        for part in parts:
            lq = part["lq"].to(device, non_blocking=cuda).float() / 255  # (N, 3, h, w)
            gts = part["gts"].to(device, non_blocking=cuda).float() / 255  # (N, K or 1, 3, H, W)
            choice = part["choice"].to(device, non_blocking=cuda)
            if args.sampler == "amo":
                choice = choose(gts)
                gt = gts[torch.arange(len(gts), device=device), choice]
            else:
                gt = gts[:, 0]

            depth = ()  # what multiplies SwinIR's residual branches
            if preset["drop_path"]:
                depth = stochastic_depth(args.seed, part["draw"].tolist(), net_g.depths,
                                         preset["drop_path"]).to(device),
            with autocast():  # with --bf16; float16 would overflow in SwinIR
                sr = ddp_g(lq, *depth).float()  # (N, 3, H, W)
                losses = generator_losses(sr, gt, net_d, percep, reward)
            total = sum(weight * losses[name] for name, weight in lambdas.items())
            (total / args.accumulate).backward()
            part |= {"lq": lq, "sr": sr.detach(), "gt": gt, "choice": choice, "losses": losses}
        update(optim_g, lr)

        if net_d is not None:
            for part in parts:
                with autocast():
                    part["losses"]["l_d"] = discriminator_loss(ddp_d, part["sr"], part["gt"])
                (part["losses"]["l_d"] / args.accumulate).backward()
            update(optim_d, lr_d)

        ema_update(net_ema, net_g, ema_decay_at(step, args.ema_decay, args.ema_warmup))
        run.record(step, lr, parts)
        if validation and (step % args.val_every == 0 or step == args.steps):
            run.validate(step, validation)
    run.restore_good()
    return net_ema


# ------------------------------------------------------------------------- boilerplate


def load_data(args: argparse.Namespace) -> tuple[MultiGT, list[Pair]]:
    """The sets in --data, which must suit --sampler and --patch-size, and the pairs of --val."""
    sets, pairs = rank_zero_first(lambda: load_sets(args.data)), []
    if sets.is_flat:
        sets = large_enough(args, sets)
    if args.val and len(args.val) == 1:
        sets, held_out = hold_out(sets, args.val[0], args.out)
        degradation = PRESETS[args.net]["degradation"]
        pairs = make_pairs(held_out, args.patch_size,
                           functools.partial(degrade_patch, setting=degradation))
    elif args.val:
        pairs = read_pairs(*args.val)
    if args.sampler in LABELLED and sets.labels is None:
        raise ValueError(f"{args.data}: --sampler {args.sampler} needs labels/<range>/A,B,C; "
                         "use origs_only, rand, sma or amo without them")
    check_patch_size(sets, args.patch_size)
    return sets, pairs


def large_enough(args: argparse.Namespace, sets: MultiGT) -> MultiGT:
    """A flat folder at 1 / --shrink of its sides, without photos smaller than --patch-size."""
    rows = np.flatnonzero((sets.sizes // args.shrink >= args.patch_size).all(1))
    left_out = len(sets.names) - len(rows)
    if left_out and args.rank == 0:
        print(f"{args.data}: {left_out} of {len(sets.names)} photos are smaller than --patch-size "
              f"{args.patch_size} and left out" + (f" (--shrink {args.shrink})"
                                                   if args.shrink > 1 else ""))
    if not len(rows):
        raise ValueError(f"{args.data}: all {left_out} photos are smaller than --patch-size "
                         f"{args.patch_size}; give larger ones, or a smaller patch")
    return sets.subset(rows, args.shrink)


def build_generator(net: str, init: str | None, any_size: bool = False) -> nn.Module:
    """The network of --net, with the weights of a file or random ones; ready to train.

    any_size: whether the file decides on the size (--net auto)
    """
    if any_size:
        return load_net(init).requires_grad_(True).train()
    net_g = PRESETS[net]["build"]()
    return load_like(net_g, init, f"--net {net}") if init else net_g


def net_in(path: str) -> str:
    """The preset for the network in a file, by its keys."""
    return {SwinIR: "swinir", RRDBNet: "rrdb"}.get(read_network(path)[1], "other")


def build_discriminator(net: str, init: str | None) -> nn.Module:
    """The discriminator that --net trains against, with the weights of a file or random ones."""
    net_d = UNetDiscriminatorSN(num_feat=PRESETS[net]["disc_feat"])
    if init:
        load_discriminator(net_d, init)
    return net_d


def make_networks(
    args: argparse.Namespace, net_g: nn.Module
) -> tuple[nn.Module, nn.Module | None, torch.optim.Optimizer, torch.optim.Optimizer | None]:
    """Move net_g to the device; make its average, the discriminator and both optimisers.

    The last two are None without a GAN loss.
    """
    net_g.to(args.device, memory_format=torch.channels_last).train()  # up to 2x as fast, CPU too
    net_ema = copy.deepcopy(net_g).eval().requires_grad_(False)
    adam = functools.partial(torch.optim.Adam, betas=(0.9, 0.99), fused=args.device.type != "mps")
    optim_g = adam([p for p in net_g.parameters() if p.requires_grad], lr=args.lr)
    if args.lambda_a == 0:
        return net_ema, None, optim_g, None
    torch.manual_seed(args.seed)
    net_d = build_discriminator(args.net, args.init_d)
    net_d.to(args.device, memory_format=torch.channels_last)
    return net_ema, net_d, optim_g, adam(net_d.parameters(), lr=args.lr_d)


def make_validation(
    args: argparse.Namespace, pairs: list[Pair], quality: nn.Module | None,
    reward: nn.Module | None, run: TrainingRun,
) -> Validation | None:
    """The validation on `pairs`; None without. Q is AMO's, else the reward's, else that of --iqa.

    ValueError if a resumed run cannot go on with it.
    """
    if not pairs:
        return None
    # A compiled Q takes one size of images, so the validation has a copy
    scorer = copy.deepcopy(quality) if args.compile else quality
    validation = Validation(pairs, scorer or reward, args.iqa[0], args.device)
    run.check_validation(validation)
    return validation


def perceptual_loss(args: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    """That of --perceptual: (sr, gt), each (N, 3, H, W) -> scalar."""
    if args.perceptual == "laplacian":
        return laplacian_loss
    file = args.perceptual.partition("@")[2]
    state = rank_zero_first(lambda: vgg19_state(file))  # rank 0 may download the weights
    return VGG19Loss(state).to(args.device, memory_format=torch.channels_last)


def make_loader(
    args: argparse.Namespace, sets: MultiGT, images: str, first: int, stage_one: bool
) -> DataLoader:
    """This rank's batches of the steps from `first` on.

    Which set, patch, flip, degradation and ground truth is a function of (seed, draw).
    images: `image_digest` of the sets
    """
    degradation = PRESETS[args.net]["degradation"]
    dataset = MultiGTDataset(
        sets, gt_weights(args, sets), args.patch_size, args.seed,
        functools.partial(degrade_patch, setting=degradation),
        # Real-ESRNet trains on USM-sharpened GT; stage two does not (HGGT).
        prepare=usm_sharpen if stage_one and degradation == "two_round" else None,
        cache=args.cache and rank_zero_first(lambda: PixelCache(args.cache, sets, images)),
    )
    batches = StepBatchSampler(first, args.steps, args.batch_size, args.rank, args.world)
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=args.num_workers,
        pin_memory=args.device.type == "cuda", worker_init_fn=start_worker,
        multiprocessing_context=start_method() if args.num_workers else None)


def first_samples(dataset: MultiGTDataset) -> list[Pair]:
    """The first training samples; where AMO has yet to choose, with the original."""
    samples = [dataset[draw] for draw in range(4)]
    return [(s["lq"].transpose(1, 2, 0), s["gts"][0].transpose(1, 2, 0)) for s in samples]


def gt_weights(args: argparse.Namespace, sets: MultiGT) -> np.ndarray | None:
    """Sampling weights over the ground truths of each set, (n, K) (Eq. 2-4); None for amo."""
    quality = image_quality(args, sets) if args.sampler in ("sma", "smp") else None
    shape = (len(sets.names), len(sets.paths[0]))
    return sampling_weights(args.sampler, sets.labels, quality, args.tau, shape)


def set_backends(args: argparse.Namespace) -> None:
    """Let cuDNN search for the fastest convolutions (shapes are fixed), or be deterministic."""
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def compile_blocks(*modules: nn.Module | Callable | None) -> None:
    """torch.compile, in place, of the repeated blocks of a generator, and of other modules whole.

    A whole generator would take minutes to compile. With adapters it stays as it is: each adapted
    layer has a class of its own, for which its block would be compiled anew. The keys of the state
    dict do not change.
    """
    for module in modules:
        if isinstance(module, nn.Module) and not hasattr(module, "lora_groups"):
            blocks = [m for m in module.modules() if isinstance(m, SwinBlock | ResidualDenseBlock)]
            metrics = [m.net for m in module.modules() if isinstance(m, FrozenMetric)]
            for part in blocks or metrics or [module]:
                part.compile(dynamic=False)


def wrap(net: nn.Module | None, args: argparse.Namespace) -> nn.Module | None:
    """The network under DDP where there are several processes."""
    if net is None or args.world == 1:
        return net
    # The buffers (masks, spectral norm's vectors) evolve identically on every rank.
    ids = [args.device.index] if args.device.type == "cuda" else None
    return DistributedDataParallel(net, broadcast_buffers=False, device_ids=ids)


def describe(loader: DataLoader, step: int) -> str:
    """The samples of a step on this rank, for an error message."""
    draws, dataset = loader.batch_sampler.of_step(step), loader.dataset
    names = ", ".join(dataset.sets.names[dataset.set_of(draw)] for draw in draws)
    return f"draws {draws[0]} to {draws[-1]}: {names}"


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    # PAPER: the initialisation (HGGT's) is PSNR-pretrained: L1 alone
    stage_one = args.lambda_p == 0 and args.lambda_a == 0
    resolve_args(args, stage_one)
    torch.manual_seed(args.seed)
    net_g = build_generator(args.net, args.init, args.any_size)
    sets, pairs = load_data(args)
    net_ema = fit(args, sets, pairs, net_g, stage_one)
    if args.rank == 0:
        checkpoint = ema_checkpoint(net_ema.state_dict(), args)
        write_result(Path(args.out), net_ema, checkpoint, origin(args, sets))
        print(f"wrote {Path(args.out) / 'net_g_ema.pt'}")
    cleanup()


def resolve_net(args: argparse.Namespace) -> None:
    """--net auto becomes the kind of network in --init, and args.any_size is set."""
    given = args.init not in (None, "none")
    args.net = args.net or ("auto" if given else "swinir")
    args.any_size = args.net == "auto"
    if args.any_size and not given:
        raise ValueError("--net auto: takes the network from --init; give a file")
    args.net = net_in(args.init) if args.any_size else args.net


def resolve_args(
    args: argparse.Namespace, stage_one: bool = False,
    tuning: Callable[[argparse.Namespace], dict[str, object]] | None = None,
) -> None:
    """Fill in what depends on the net, the stage and the machine; refuse impossible values.

    tuning: gives the usual values of a fine-tuning, where they are not a training's
    """
    args.rank, args.world, args.device = init_distributed()
    resolve_net(args)
    preset, data = PRESETS[args.net], "datasets/DF2K_OST" if stage_one else "datasets/HGGT"
    if args.sampler is None and (stage_one or is_flat_folder(args.data or data)):
        args.sampler = "origs_only"
    if args.sampler is None:
        raise ValueError(f"--sampler is missing; choose one of {', '.join(SAMPLERS)}")

    # The paper's values; a run folder is named by what differs from them
    before = args.sampler if tuning else "stage1"
    usual = {
        "data": data, "shrink": 1, "init_d": None,
        "iqa": ["musiq"], "tau": 10.0, "lambda_l1": 1.0, "lambda_p": 0.0 if stage_one else 1.0,
        "lambda_a": 0.0 if stage_one else 0.1, "perceptual": "vgg19",
        "batch_size": preset["batch_size"], "patch_size": 256, "lr": 2e-4 if stage_one else 1e-4,
        "milestones": preset["stage_one_milestones" if stage_one else "milestones"], "lr_d": None,
        "accumulate": 1, "ema_decay": 0.999, "ema_warmup": False, "bf16": False, "seed": 0,
    } | (tuning(args) if tuning else {})
    for key, value in usual.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if not uses_quality(args):
        del usual["iqa"], usual["tau"]
    args.lr_d = args.lr if args.lr_d is None else args.lr_d
    usual["lr_d"] = args.lr
    if args.init is None and not stage_one:
        args.init = trained_by(args, before)
    usual["init"] = f"runs/{args.net}-{before}/net_g_ema.pt"
    if stage_one and (args.init is None or Path(args.init).stem == preset["psnr"]):
        usual["init"] = args.init  # random, or the paper's start
    name = "stage1" if stage_one else args.sampler + ("+FT" if tuning else "")
    args.out = args.out or run_folder(args, name, usual)
    args.init = None if args.init == "none" else args.init
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if args.num_workers is None:
        args.num_workers = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    if args.val and [type(value) for value in args.val] not in ([str, str], [int]):
        raise ValueError(f"--val {' '.join(map(str, args.val))}: give two folders, LQ GT, or a "
                         "number of images to hold out")
    if len(set(args.iqa)) < len(args.iqa):
        raise ValueError(f"--iqa {' '.join(args.iqa)}: a metric twice; name each once")
    if args.batch_size % (args.world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} is the total: it must be divisible by "
                         f"the {args.world} processes times --accumulate {args.accumulate}")
    if args.fast_amo and args.sampler != "amo":
        raise ValueError(f"--fast-amo: --sampler {args.sampler} scores no patches; leave it out")
    kept = args.ema_decay**args.steps
    if kept > 0.05 and not args.ema_warmup and args.rank == 0:  # about steps < 3 / (1 - decay)
        print(f"warning: --steps {args.steps} are few for --ema-decay {args.ema_decay}: the "
              f"averaged network keeps {100 * kept:.0f} % of the initial weights; --ema-warmup "
              "lets it follow", file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a training run, shared with finetune_lora.py."""
    add = parser.add_argument
    add("--net", choices=["auto", *(net for net in PRESETS if net != "other")],
        help="network and its settings; auto: as --init has it, of any size, other networks by "
        "spandrel with RealESRGAN's settings (default: auto with --init, else swinir)")
    add("--data", help="multi-GT folder, or flat folder of HR images (default: datasets/HGGT; "
        "stage one: datasets/DF2K_OST)")
    add("--shrink", type=integer(1, 16), default=1, metavar="N",
        help="read the photos of a flat folder at 1/N of their sides, which hides JPEG's artefacts")
    add("--cache", metavar="DIR",
        help="decode the images once into a file in DIR and read crops from it (HGGT: 79 GB)")
    add("--sampler", choices=SAMPLERS, help="what chooses the ground truth (paper Sec. 4.2, 5; "
        "default of a flat folder: origs_only)")
    add("--init", help="weights to start from; none: random ones (default: what stage one wrote, "
        "runs/<net>-stage1*/net_g_ema.pt; stage one itself: random)")
    add("--init-d", help="discriminator to start from (a last.pt or a public net_d file)")
    add("--out", help="run folder (default: runs/<net>-<sampler>, and what differs from the "
        "paper's settings)")
    add("--iqa", nargs="+", default=["musiq"], metavar="NAME[@FILE]",
        help="quality model of sma, smp, amo and of the reward: pyiqa name or module:function; of "
        "several the mean of their standardised scores, on the scale of the first")
    add("--tau", type=number(1e-6), default=10.0,
        help="softmax temperature, in units of --iqa's score")
    add("--lambda-l1", type=number(0), default=1.0, help="weight of the L1 loss")
    add("--lambda-p", type=number(0), default=1.0, help="weight of the perceptual loss")
    add("--lambda-a", type=number(0), default=0.1,
        help="weight of the GAN loss; 0: no discriminator")
    add("--perceptual", type=perceptual, default="vgg19", metavar="vgg19[@FILE]|laplacian",
        help="perceptual loss; torchvision's VGG19, or a file of its weights; laplacian needs none")
    add("--steps", type=integer(1), default=300_000, help="optimiser steps in all")
    add("--batch-size", type=integer(1),
        help="samples per step over all processes (default: 32 SwinIR, 48 others)")
    add("--patch-size", type=PATCH_SIZE, default=256, help="GT patch side in pixels")
    add("--lr", type=number(1e-12, 1),
        help="Adam learning rate of net_g (default: 1e-4; stage one 2e-4)")
    add("--lr-d", type=number(0, 1), help="Adam learning rate of the discriminator (default: --lr)")
    add("--milestones", type=integer(1), nargs="*",
        help="steps after which the learning rate is halved (default: the paper's: 200000 250000 "
        "275000 287500 SwinIR, 300000 others; stage one of SwinIR 150000 240000 270000 285000)")
    add("--ema-decay", type=number(0, 0.999999), default=0.999,
        help="decay of the averaged weights per step")
    add("--ema-warmup", action="store_true",
        help="average over fewer steps at first: decay (1 + step) / (10 + step), at most "
        "--ema-decay; for short runs")
    add("--val", nargs="+", type=folder_or_count, metavar="LQ GT|N", help="what to score the "
        "averaged network on: folders of PNGs, LQ a quarter of GT's size, or the centres "
        "of N images of a flat folder, which are then not trained on")
    add("--val-every", type=integer(1), default=5000, help="steps between validations")
    add("--guard", type=number(0, 100), default=0.0,
        help="with --val: stop when PSNR lies more than this many dB below the start's at two "
        "validations in a row, and go back to the last one before; 0: never")
    add("--seed", type=SEED, default=0, help="seed of weights and draws")
    add("--bf16", action="store_true",
        help="bfloat16 in the networks and VGG19, faster on GPUs that have it; never in --iqa")
    add("--accumulate", type=integer(1), default=1, metavar="N",
        help="take each step's batch in N parts, for less memory: equal gradients, but spectral "
        "norm takes N times as many steps")
    add("--fast-amo", action="store_true",
        help="AMO on a GPU: score in TF32, and again in float32 where the best two are close")
    add("--compile", action="store_true",
        help="torch.compile of blocks, discriminator, VGG19 and AMO's quality model")
    add("--deterministic", action="store_true",
        help="deterministic kernels on a GPU, where there are any; slower")
    add("--num-workers", type=integer(0, 1024),
        help="data worker processes per rank; 0: none (default: its share of the cores, up to 8)")
    add("--log-every", type=integer(1), default=100, help="steps between rows of log.csv")
    add("--save-every", type=integer(1), default=5000, help="steps between writes of last.pt")
    add("--sample-every", type=integer(0), default=5000,
        help="steps between sample images; 0: none")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("train_sr.py"):
        main(parse_args())
