"""Fine-tune low-rank adapters to raise an NR-IQA score directly (paper Sec. 4.3, 8.3, 9; Eq. 5).

    torchrun --nproc_per_node=4 finetune_lora.py --sampler amo    # AMO+FT, from runs/swinir-amo
    torchrun --nproc_per_node=4 finetune_lora.py --sampler upos   # UPos+FT, from runs/swinir-upos
    ... --net rrdb                                                # RealESRGAN
    python finetune_lora.py --sampler amo --init FILE             # CPU or one GPU, other weights
    python finetune_lora.py --data PHOTOS --init RealESRGAN_x4plus.pth   # any network, your photos
    ... --lambda-a 0.1 --init-d runs/swinir-upos/last.pt                             # FT_IG
    ... --lambda-q 0 --lambda-a 0.2 --init-d runs/swinir-upos/last.pt                # FT_NNR,IGx2
    ... --lambda-p 2                                                                 # FT_HP
    ... --iqa paq2piq                                                                # FT_PaQ2PiQ
    ... --full                                     # naive: all weights (Fig. 3, 5), adversarial

In:  --init, a network trained by train_sr.py (or a public one); --data as there.
Out: --out (default runs/<net>-<sampler>+FT...) with lora.pt (the adapters; adapter/: for PEFT),
     net_g_ema.pt (merged: a plain network again, no extra cost; .safetensors: the same), card.md,
     last.pt, log.csv, samples/*.png, tensorboard/. Rerun the same command to resume.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import train_sr
from models.checkpoint import check_finite, save_atomic, sha256
from models.distributed import clean_exit, cleanup
from models.export import write_adapter, write_result
from models.flags import describe, integer, new_parser, number
from models.lora import add_lora, lora_state, merged_state
from models.quality import load_quality
from models.settings import ema_checkpoint, origin

# PAPER: Sec. 8.3. SwinIR: the MLPs, rank 48, lr 5e-6 halved at 5,000 steps;
# RealESRGAN: the convolutions inside the RRDBs, rank 24, lr 5e-5.
# ASSUMED: other networks as RealESRGAN, all layers but the first and the last convolution.
PRESETS = {
    "swinir": {"targets": ("*.mlp.fc1", "*.mlp.fc2"), "rank": 48, "lr": 5e-6, "halve": [5000]},
    "rrdb": {"targets": ("body.*.rdb?.conv?",), "rank": 24, "lr": 5e-5, "halve": []},
}
PRESETS["other"] = PRESETS["rrdb"] | {"targets": None}


class OneByOne(nn.Module):
    """A reward in the memory of one image's graph: each image is scored again in the backward pass.

    (N, 3, H, W) -> (N,)
    """

    def __init__(self, reward: nn.Module):
        super().__init__()
        self.reward = reward

    def forward(self, sr: Tensor) -> Tensor:
        return torch.cat([checkpoint(self.reward, x, use_reentrant=False) for x in sr.split(1)])


def main(args: argparse.Namespace) -> None:
    resolve_args(args)

    # The base network and its adapters
    net_g = train_sr.build_generator(args.net, args.init, args.any_size)
    base_sha256 = sha256(args.init)
    torch.manual_seed(args.seed)
    targets = [] if args.full else adapt(args, net_g)

    # The quality model as the reward
    sets, pairs = train_sr.load_data(args)

    def make_reward(saved: dict) -> nn.Module:
        reward = load_quality(args, sets, saved, differentiable=True)
        return OneByOne(reward) if args.checkpoint_reward else reward

    net_ema = train_sr.fit(args, sets, pairs, net_g, lambda_q=args.lambda_q,
                           make_reward=make_reward if args.lambda_q else None)

    # The adapters alone, and the merged plain network
    if args.rank == 0:
        out = Path(args.out)
        lora = {
            "lora": lora_state(net_ema), "rank": args.lora_rank, "targets": targets,
            "alpha": float(args.lora_rank or 0), "base_sha256": base_sha256,
        }
        check_finite(lora["lora"], f"{out}: the adapters are not written")
        merged = ema_checkpoint(merged_state(net_ema), args)
        if not args.full:
            save_atomic(lora, out / "lora.pt")
            print(write_adapter(out / "adapter", net_ema, lora))
        write_result(out, net_ema, merged, origin(args, sets))
        print(f"wrote {out / 'net_g_ema.pt'}")
    cleanup()


def preset_of(args: argparse.Namespace) -> dict:
    return PRESETS[args.net.removesuffix("_tiny")]


def adapt(args: argparse.Namespace, net: nn.Module) -> list[str]:
    """Give a network its adapters; returns their targets, patterns of layer names.

    Raises ValueError if one matches nothing, or a layer that training does not reach.
    """
    trained = trained_layers(net)
    convolutions = [name for name in trained if isinstance(net.get_submodule(name), nn.Conv2d)]
    targets = args.lora_targets or preset_of(args)["targets"] or [
        name for name in trained if name not in (convolutions[0], convolutions[-1])]
    if idle := set(add_lora(net, targets, args.lora_rank)) - set(trained):
        raise ValueError(f"--lora-targets: training does not reach {min(idle)}")
    return list(targets)


def trained_layers(net: nn.Module) -> list[str]:
    """Names of the linear and convolution layers that training reaches.

    Some networks, as SPAN, keep further ones for inference, which they compute from these.
    """
    net = copy.deepcopy(net).train()  # its statistics and gradients change
    with torch.random.fork_rng(devices=[]):
        net(torch.rand(2, 3, 16, 16)).mean().backward()  # 2: BatchNorm trains on no single value
    return [name for name, layer in net.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.grad is not None]


def usual_values(args: argparse.Namespace) -> dict[str, object]:
    """The paper's values of a fine-tuning, where they are not a training's."""
    preset = preset_of(args)
    return {"lambda_q": 0.05, "lambda_a": 0.0, "full": False, "lr": preset["lr"],
            "lora_rank": None if args.full else preset["rank"], "lora_targets": None,
            "milestones": preset["halve"]}


def resolve_args(args: argparse.Namespace) -> None:
    """Fill in what depends on the net and the variant, and what train_sr.py fills in."""
    args.lora_rank = None if args.full else args.lora_rank
    train_sr.resolve_args(args, tuning=usual_values)
    if args.init is None:
        raise ValueError("--init none: fine-tuning starts from a trained network")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    train_sr.add_arguments(parser)
    describe(
        parser, init="network to start from (default: what training with --sampler wrote, "
        "runs/<net>-<sampler>*/net_g_ema.pt)",
        data="multi-GT folder, or flat folder of HR images (default: datasets/HGGT)",
        out="run folder (default: runs/<net>-<sampler>+FT, and what differs from the paper's "
        "settings)", lr="Adam learning rate of net_g (default: 5e-6 SwinIR, 5e-5 others)",
        milestones="steps after which the learning rate is halved (default: 5000 SwinIR, none "
        "others)")
    add = parser.add_argument
    add("--lambda-q", type=number(0), default=0.05,
        help="weight of the quality score in its own units (Eq. 5); 0: no reward")
    add("--checkpoint-reward", action="store_true",
        help="score images one by one and again in the backward pass: less memory, more time")
    add("--lora-rank", type=integer(1, 1024),
        help="rank of the adapters (default: 48 SwinIR, 24 others)")
    add("--lora-targets", nargs="+", metavar="PATTERN",
        help="shell patterns of the layers that get adapters (default: the paper's: the MLPs of "
        "SwinIR, the convolutions in RealESRGAN's blocks; others: all but the first and last "
        "convolution)")
    add("--full", action="store_true", help="naive fine-tuning of all weights, without adapters")
    # ASSUMED: FT_IG and FT_NNR start from the discriminator that --init was trained against
    # (--init-d) and go on training it, at the adapters' learning rate. The paper names neither.
    # ASSUMED: FT_HP is --lambda-p 2; the paper says only that lambda_P is higher.
    # PAPER: Sec. 4.3, 8.3. The critic's place is taken by Q: no GAN loss; 20,000 steps.
    parser.set_defaults(lambda_a=0.0, steps=20_000, guard=0.3, val_every=500)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("finetune_lora.py"):
        main(parse_args())
