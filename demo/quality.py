"""Train the demo's two tiny no-reference quality models: Q, and a judge of another kind.

    python -m demo.quality --data datasets/demo/swinir-seed0 --which q --out q.pt
    python -m demo.quality --data datasets/demo/swinir-seed0 --which judge --out judge.pt

Takes under a minute each on one core. The scripts then know "demo.quality:q@q.pt" as an NR-IQA, as
they know "musiq". Q chooses the GTs and is the reward of fine-tuning; the judge only looks on.

Both learn to rank, as RankIQA does (Liu et al. 2017): pristine images are degraded with known
severity; the net regresses it and orders the versions of a crop by it. Q and the judge differ in
input, net and seed, so that what fools Q need not fool the judge. They share the severity rule and
the photographs.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from demo.data import add_noise, blur, fractal, jpeg, resize, rng_of, to_float, to_uint8, unsharp
from models.checkpoint import read_state, save_atomic
from models.distributed import clean_exit
from models.flags import SEED, new_parser

CROP, GROUPS, VERSIONS = 64, 8, 4  # a step sees 8 crops of 64 pixels, each in 4 versions
POOL = 30  # versions of each pristine image, made in advance; the first is the image itself
STEPS = {"q": 350, "judge": 300}

# The nets: (N, 3, H, W) in [0, 1] -> (N,) in [0, 100], up = better; H, W >= 32. The score is the
# mean of bounded local scores, so that a strip of the image counts by its area. Fine-tuning easily
# hacks a score of globally pooled features by a strip along the border.


class QNet(nn.Module):
    """RGB and its high-pass, four GELU stages with average pooling; 64k parameters.

    norm: with batch norms, for training; `fold` merges them into the convolutions
    """

    def __init__(self, norm: bool = False):
        super().__init__()
        c = 16

        def stage(c_in: int, c_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, 1, 1, padding_mode="reflect")
            return [conv, nn.BatchNorm2d(c_out), nn.GELU()] if norm else [conv, nn.GELU()]

        self.features = nn.Sequential(
            *stage(6, c), nn.AvgPool2d(2), *stage(c, 2 * c), nn.AvgPool2d(2),
            *stage(2 * c, 4 * c), nn.AvgPool2d(2), *stage(4 * c, 4 * c),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Conv2d(4 * c, 48, 1), nn.GELU(), nn.Conv2d(48, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)
        features = self.features(torch.cat([(x - 0.45) / 0.25, 10 * fine], 1))  # (N, 4c, H/8, W/8)
        return 100 * torch.sigmoid(self.head(features)).mean((1, 2, 3))

    def fold(self) -> None:
        """Merge the batch norms into the convolutions, so that train and eval mode are equal."""
        layers: list[nn.Module] = []
        for layer in self.features:
            if isinstance(layer, nn.BatchNorm2d):
                layers[-1] = fuse_conv_bn_eval(layers[-1].eval(), layer.eval())
            else:
                layers.append(layer)
        self.features = nn.Sequential(*layers)


class JudgeNet(nn.Module):
    """Luma, locally normalised at two scales, ReLU stages with max pooling; 41k parameters."""

    def __init__(self):
        super().__init__()
        c = 16

        def stage(c_in: int, c_out: int) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]

        self.scales = nn.ModuleList(
            nn.Sequential(*stage(3, c), *stage(c, 2 * c), *stage(2 * c, 3 * c)) for _ in range(2)
        )
        self.head = nn.Sequential(nn.Conv2d(6 * c, 32, 1), nn.ReLU(), nn.Conv2d(32, 1, 1))
        g = torch.exp(-((torch.arange(7) - 3.0) ** 2) / 4.5)
        window = (g[:, None] * g / g.sum() ** 2)[None, None]
        self.register_buffer("window", window, persistent=False)

    def normalised(self, y: torch.Tensor) -> torch.Tensor:
        """(N, 1, H, W) -> (N, 3, H, W): normalised luma (MSCN), detail, local contrast."""
        padded = F.pad(y, (3, 3, 3, 3), mode="reflect")
        mean = F.conv2d(padded, self.window)
        std = (F.conv2d(padded**2, self.window) - mean**2).clamp_min(0).add(1e-6).sqrt()
        return torch.cat([(y - mean) / (std + 0.04), 8 * (y - mean), 6 * std], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        full = self.scales[0](self.normalised(y))  # (N, 3c, H/8, W/8)
        half = self.scales[1](self.normalised(F.avg_pool2d(y, 2)))  # (N, 3c, H/16, W/16)
        features = torch.cat([full, F.interpolate(half, full.shape[-2:])], 1)
        return 100 * torch.sigmoid(self.head(features)).mean((1, 2, 3))


NETS = {"q": QNet, "judge": JudgeNet}


def q(weights: str | None = None) -> nn.Module:
    """Q with its weights, in eval mode. Raises ValueError or FileNotFoundError with the file."""
    return _load("q", weights)


def judge(weights: str | None = None) -> nn.Module:
    """The judge, as `q`."""
    return _load("judge", weights)


def _load(which: str, weights: str | None) -> nn.Module:
    make = f"python -m demo.quality --which {which} --data DATA --out FILE.pt"
    if weights is None:
        raise ValueError(f"demo.quality:{which} needs weights, @FILE.pt; make them with {make}")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file; make it with {make}")
    net = NETS[which]()
    try:
        net.load_state_dict(read_state(weights))
    except RuntimeError as error:
        raise ValueError(f"{weights}: not the weights of {which}; make them with {make}") from error
    return net.eval().to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU


# Training data. Images are float32 (H, W, 3) in [0, 1].


def blur_quality(sigma: float) -> float:
    """sigma in pixels"""
    return 1 - 0.95 * min(1.0, sigma / 2.6) ** 0.8


def noise_quality(sigma: float) -> float:
    """sigma on the [0, 1] scale"""
    return 1 - 0.9 * min(1.0, sigma / 0.12) ** 0.8


def jpeg_quality(factor: float) -> float:
    """factor: JPEG's own, 1 to 95"""
    return 1 - 0.85 * min(1.0, max(0.0, 92 - factor) / 84)


def sharpened(quality: float, amount: float, enough: float) -> float:
    """Quality after unsharp masking, which makes up for blur up to the amount `enough`."""
    return quality ** (1 / (1 + 0.35 * amount)) * (1 - 0.8 * min(1, max(0, amount - enough) / 4))


Degraded = tuple[np.ndarray, float]  # an image and its quality in [0, 1], 1 = pristine

# One function for each kind of degradation: image, level in [0, 1], rng -> Degraded. The qualities
# of successive steps multiply. The price of each level was set by eye.


def add_grain(x: np.ndarray, quality: float, sigma: float, rng: np.random.Generator) -> Degraded:
    return add_noise(x, sigma, rng), quality * noise_quality(sigma)


def compress(x: np.ndarray, quality: float, factor: float) -> Degraded:
    return jpeg(x, factor), quality * jpeg_quality(factor)


def blurred(x: np.ndarray, level: float, rng: np.random.Generator) -> Degraded:
    sigma = 3 * level**1.3
    return blur(x, sigma), blur_quality(sigma)


def noisy(x: np.ndarray, level: float, rng: np.random.Generator) -> Degraded:
    return add_grain(x, 1.0, 0.12 * level, rng)


def compressed(x: np.ndarray, level: float, rng: np.random.Generator) -> Degraded:
    return compress(x, 1.0, 92 - 84 * level)


def enlarged(x: np.ndarray, level: float, rng: np.random.Generator) -> Degraded:
    """A low-resolution image, perhaps with noise and JPEG blocks of its own, made large again."""
    size = x.shape[0]
    small = int(size / (1 + 3 * level))
    method = rng.choice([Image.BICUBIC, Image.BILINEAR, Image.NEAREST])
    x, quality = resize(x, small, small), 1 - 0.9 * level**0.7
    if rng.uniform() < 0.5:
        x, quality = add_grain(x, quality, rng.uniform(0, 12) / 255, rng)
    if rng.uniform() < 0.5:
        x, quality = compress(x, quality, rng.uniform(50, 95))
    x = resize(x, size, size, int(method))
    if rng.uniform() < 0.6:  # sharpened again, as super-resolution is
        amount = 3 * rng.uniform()
        x = unsharp(x, rng.uniform(0.8, 2.0), amount)
        quality = sharpened(quality, amount, 1 + 0.6 * level)
    return x, quality


def oversharp(x: np.ndarray, level: float, rng: np.random.Generator) -> Degraded:
    return unsharp(x, rng.uniform(0.8, 1.6), 5 * level), 1 - 0.7 * max(0.0, level - 0.08) ** 0.8


def deblurred(x: np.ndarray, level: float, rng: np.random.Generator) -> Degraded:
    """Blur that sharpening partly makes up for, or more than that; it amplifies noise as well."""
    sigma, amount = rng.uniform(0.5, 2.2), 4 * level
    grain = max(0.0, rng.uniform(-2, 3)) / 255
    x = unsharp(add_noise(blur(x, sigma), grain, rng), max(0.8, sigma), amount)
    quality = sharpened(blur_quality(sigma), amount, 1 + 0.6 * sigma)
    quality *= noise_quality(grain * (1 + amount))
    if rng.uniform() < 0.3:
        x, quality = add_grain(x, quality, rng.uniform(0, 0.05), rng)
    if rng.uniform() < 0.3:
        x, quality = compress(x, quality, rng.uniform(30, 92))
    return x, quality


def patterned(x: np.ndarray, level: float, rng: np.random.Generator) -> Degraded:
    """What reward hacking looks like: stripes, checks, structured grain."""
    size, quality = x.shape[0], 1.0
    if rng.uniform() < 0.7:
        sigma = rng.uniform(0, 2.5)
        x, quality = blur(x, sigma), blur_quality(sigma)
    row, column = 2 * np.pi * np.mgrid[:size, :size] / rng.integers(2, 7)
    stripes, checks = np.cos(column), np.cos(row) * np.cos(column)
    diagonal, grain = np.cos(row + column), fractal(size, 0.0, rng)[..., 0]
    pattern = [stripes, stripes.T, diagonal, checks, checks, grain][rng.integers(6)]
    pattern = np.sign(pattern + 1e-6)  # off the zeros of the cosines
    if rng.uniform() < 0.5:
        pattern = gaussian_filter(pattern, rng.uniform(0.5, 1))
    pattern = pattern / (pattern.std() + 1e-6)
    x = x + 0.1 * level * pattern[..., None] * rng.uniform(0.3, 1, 3)
    return x, quality * (1 - 0.9 * level**0.7)


KINDS = (blurred, noisy, compressed, enlarged, enlarged, oversharp, deblurred, patterned, patterned,
         None)  # equally likely; None leaves the image as it is


def degrade(x: np.ndarray, rng: np.random.Generator) -> Degraded:
    """One random degradation of known severity."""
    kind, level, quality = KINDS[rng.choice(len(KINDS))], rng.uniform(), 1.0
    if kind:
        x, quality = kind(x, level, rng)
        if rng.uniform() < 0.25:
            x = jpeg(x, rng.uniform(80, 97))
    return np.clip(x, 0, 1).astype(np.float32), float(np.clip(quality, 0, 1))


def make_pool(
    images: list[np.ndarray], versions: int, seed: int, text: str
) -> tuple[np.ndarray, np.ndarray]:
    """Versions of each image, the first one untouched, and their qualities.

    text: label of the progress bar
    Returns uint8 (n, versions, H, W, 3) and float32 (n, versions).
    """
    pool = np.empty((len(images), versions, *images[0].shape), np.uint8)
    qualities = np.ones((len(images), versions), np.float32)
    for i, image in enumerate(tqdm(images, text, unit="image", disable=None)):
        rng = rng_of(seed, i)
        pool[i, 0] = to_uint8(image)
        for j in range(1, versions):
            x, qualities[i, j] = degrade(image, rng)
            pool[i, j] = to_uint8(x)
    return pool, qualities


def to_tensor(x: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [0, 1]"""
    return torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() / 255


def read_pristine(data: Path, split: str) -> list[np.ndarray]:
    folder = data / "pristine" / split
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no *.png; run python -m demo.data --out {data}")
    return [to_float(Image.open(path)) for path in paths]


# Training.


def ranking_loss(score: torch.Tensor, quality: torch.Tensor, group: int) -> torch.Tensor:
    """Hinge loss on the pairs within each group of `group` versions of a crop; a scalar.

    score, quality: (N,) in [0, 1]. The scores of a pair should differ by at least half of its
    difference in quality. Pairs of almost equal quality do not count.
    """
    score, quality = score.view(-1, group), quality.view(-1, group)
    d = score[:, :, None] - score[:, None]
    t = quality[:, :, None] - quality[:, None]
    return F.relu(0.5 * t.abs() - t.sign() * d)[t.abs() > 0.05].mean()


def train(
    which: str, pool: np.ndarray, qualities: np.ndarray, steps: int, seed: int
) -> tuple[nn.Module, list[float]]:
    """Train "q" or "judge" by regression and ranking, with AdamW and a one-cycle schedule.

    pool, qualities: see make_pool. Returns the net, in eval mode, and the loss of each step.
    """
    torch.manual_seed(seed)
    net = QNet(norm=True) if which == "q" else JudgeNet()
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    rng = rng_of(seed, "batches")
    n, versions, size = pool.shape[:3]
    losses = []
    net.train()
    bar = tqdm(range(steps), "train", unit="step", disable=None)
    for _ in bar:
        crops, targets = [], []
        for i in rng.integers(n, size=GROUPS):
            top, left = rng.integers(0, size - CROP + 1, 2)
            chosen = rng.choice(versions, VERSIONS, replace=False)
            crop = pool[i, chosen, top : top + CROP, left : left + CROP]
            crops.append(crop[:, :, ::-1] if rng.integers(2) else crop)
            targets.append(qualities[i, chosen])
        quality = torch.from_numpy(np.concatenate(targets))
        score = net(to_tensor(np.concatenate(crops))) / 100
        loss = F.smooth_l1_loss(score, quality, beta=0.1) + ranking_loss(score, quality, VERSIONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    if which == "q":
        net.fold()
    return net.eval(), losses


@torch.no_grad()
def pair_accuracy(net: nn.Module, pool: np.ndarray, qualities: np.ndarray) -> float:
    """Share of an image's pairs over 0.1 apart in quality that the net orders correctly."""
    score = np.stack([net(to_tensor(x)).numpy() for x in pool])
    d = score[:, :, None] - score[:, None]
    t = qualities[:, :, None] - qualities[:, None]
    return float((d[t > 0.1] > 0).mean())


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # a net so small gains little from more
    seed = 2 * args.seed + (args.which == "judge")  # the two start and degrade differently
    pool, qualities = make_pool(read_pristine(args.data, "train"), POOL, seed, "degrade train")
    val_pool, val_qualities = make_pool(read_pristine(args.data, "val"), 16, 0, "degrade val")
    net, _ = train(args.which, pool, qualities, STEPS[args.which], seed)
    save_atomic(net.state_dict(), args.out)
    accuracy = pair_accuracy(net, val_pool, val_qualities)
    print(f"{args.which}: held-out pair accuracy {accuracy:.3f}; wrote {args.out}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.split("\n")[0], "python -m demo.quality")
    parser.add_argument("--data", type=Path, required=True, help="folder that demo.data wrote")
    parser.add_argument("--which", choices=list(NETS), required=True, help="the net to train")
    parser.add_argument("--out", type=Path, required=True, help="weight file to write (.pt)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the training")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("demo.quality"):
        main(parse_args())
