"""The terms of the training loss (paper Eq. 1) beside L1: perceptual and adversarial.

Images are float (N, 3, H, W), RGB, nominally in [0, 1] (a network's output may leave that range).
Every loss is a scalar tensor, a mean over batch, channels and pixels.
"""

import hashlib
import os
import pickle
import re
import urllib.request
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"  # torchvision IMAGENET1K_V1
NAMED_HASH = re.compile(r"-(?!\d{8}\.)([0-9a-f]{8})\.\w+$")  # eight digits alone are a date
# 3 x 3 convolutions of that width, each followed by a ReLU; P = 2 x 2 max pooling
VGG19_LAYERS = [64, 64, "P", 128, 128, "P", *[256] * 4, "P", *[512] * 4, "P", *[512] * 4]
# conv1_2, conv2_2, conv3_4, conv4_4, conv5_4 by their index in torchvision's vgg19().features.
# Source of the weights: perceptual_opt of the public HGGT configs.
VGG19_WEIGHTS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class VGG19Loss(nn.Module):
    """d_P of Eq. 1: weighted L1 between VGG19 features, taken before the ReLU.

    weights: a state dict with the names of torchvision's vgg19 or the path of one, of which only
    features.0 to features.34 are used; None for torchvision's ImageNet weights, from the torch hub
    cache or else downloaded into it, unless HF_HUB_OFFLINE=1. A file whose name ends in the start
    of a SHA-256, as torchvision's does, must have it. The network is frozen and in eval mode.
    forward(sr, gt): (N, 3, H, W) each, sides at least 16; no gradient goes to gt. Returns a scalar.
    Raises FileNotFoundError where there are no weights, ValueError where they don't fit.
    """

    # PAPER: Eq. 1, d_P.
    # ASSUMED: the paper names no features; layers, weights and L1 are those of the HGGT configs.
    def __init__(self, weights: str | os.PathLike | dict[str, torch.Tensor] | None = None):
        super().__init__()
        if isinstance(weights, dict):
            name, state = "the VGG19 state dict", weights
        else:
            name = _cached_vgg19() if weights is None else weights
            state = _read_state(name)

        layers, width_in = [], 3
        with torch.device("meta"):  # shapes only: the weights are assigned below
            for width in VGG19_LAYERS:
                if width == "P":
                    layers.append(nn.MaxPool2d(2))
                else:
                    # ReLU not in place: that would overwrite the features taken before it
                    layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
                    width_in = width
        self.features = nn.Sequential(*layers[: max(VGG19_WEIGHTS) + 1])

        needed = {f"features.{key}": v.shape for key, v in self.features.state_dict().items()}
        given = {key: v.shape for key, v in state.items() if key.startswith("features.")}
        if given != needed:
            key = min(set(given.items()) ^ set(needed.items()))[0]
            raise ValueError(f"{name}: not torchvision's VGG19, see {key}; get {VGG19_URL}")
        state = {key.removeprefix("features."): state[key].float() for key in needed}
        self.features.load_state_dict(state, assign=True)
        self.features.requires_grad_(False).eval()
        for buffer, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(buffer, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def taps(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The features of one batch at the layers of VGG19_WEIGHTS, in that order."""
        features, taken = (image - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            features = layer(features)
            if index in VGG19_WEIGHTS:
                taken.append(features)
        return taken

    def forward(self, sr: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            taps_gt = self.taps(gt)
        taps = zip(VGG19_WEIGHTS.values(), self.taps(sr), taps_gt, strict=True)
        return sum(weight * F.l1_loss(of_sr, of_gt) for weight, of_sr, of_gt in taps)


def _cached_vgg19() -> str:
    """The path of torchvision's VGG19 file in the torch hub cache; fetches it if need be."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(VGG19_URL))
    if not os.path.exists(path):
        try:
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
                raise OSError("HF_HUB_OFFLINE is set")
            # torch.hub knows no time limit, and an offline cluster may drop packets: ask first
            request = urllib.request.Request(VGG19_URL, method="HEAD")
            urllib.request.urlopen(request, timeout=1.5).close()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(VGG19_URL, path, hash_prefix="dcbb9e9d")
        except (OSError, RuntimeError) as error:  # URLError is an OSError, a bad hash the other
            raise FileNotFoundError(
                f"no VGG19 weights: {path} is missing and can't be downloaded ({error}); "
                "where there is a network, run: python -m models.iqa prefetch vgg19 (it fetches "
                f"{VGG19_URL})"
            ) from error
    return path


def _read_state(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; VGG19 weights are at {VGG19_URL}")
    named = NAMED_HASH.search(str(path))
    if named:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if not digest.hexdigest().startswith(named[1]):
            raise ValueError(f"{path}: truncated or not the public file, as its SHA-256 is not the "
                             f"{named[1]}... of its name; delete it and prefetch it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(f"{path}: not a PyTorch file, or damaged; get {VGG19_URL}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds no state dict; get {VGG19_URL}")
    return state


def laplacian_loss(sr: torch.Tensor, gt: torch.Tensor, levels: int = 3) -> torch.Tensor:
    """Stand-in for VGG19Loss that needs no weights: mean L1 between band-pass residuals.

    At each level what a 5 x 5 binomial filter (Burt and Adelson, 1983; borders reflected) removes
    of sr and of gt is compared, then both are halved by 2 x 2 means; the levels are averaged. It
    looks at detail only: a constant shift between sr and gt costs nothing.
    sr, gt: (N, C, H, W), sides at least 3 x 2^(levels - 1). Returns a scalar.
    """
    # ASSUMED: not in the paper; for machines that can't have VGG19's weights, as in the demo.
    taps = sr.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    channels = sr.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, 5, 5)
    difference, loss = sr - gt, 0.0  # all steps are linear: filter the difference instead of both
    for _ in range(levels):
        padded = F.pad(difference, (2, 2, 2, 2), mode="reflect")
        smooth = F.conv2d(padded, kernel, groups=channels)
        loss = loss + (difference - smooth).abs().mean()
        difference = F.avg_pool2d(difference, 2)
    return loss / levels


def gan_loss_g(pred_fake: torch.Tensor) -> torch.Tensor:
    """The generator's adversarial term: cross-entropy of D's logits on sr against "real".

    pred_fake: logits of any shape. Vanilla GAN (the public HGGT configs), mean.
    """
    return F.binary_cross_entropy_with_logits(pred_fake, torch.ones_like(pred_fake))


def gan_loss_d(pred_real: torch.Tensor, pred_fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss: cross-entropy on gt against "real" plus on sr against "fake".

    pred_real, pred_fake: logits of any shape; compute the latter on sr.detach(). A sum of two
    means, not halved (the public HGGT code).
    """
    real = F.binary_cross_entropy_with_logits(pred_real, torch.ones_like(pred_real))
    return real + F.binary_cross_entropy_with_logits(pred_fake, torch.zeros_like(pred_fake))


class LossWatch:
    """Finds a step whose losses are not finite, one step late so that a GPU need not wait."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names, self.cuda, self.waiting = names, device.type == "cuda", None

    def __call__(
        self, step: int = 0, losses: torch.Tensor | None = None
    ) -> tuple[int, str] | None:
        """(step, its losses) of the step before if they are not finite; None where all is well.

        losses: (names,) of this step; without arguments no further step is queued.
        """
        before, self.waiting = self.waiting, None
        if losses is not None:
            host = torch.empty(losses.shape, pin_memory=self.cuda)
            host.copy_(losses, non_blocking=True)
            event = torch.cuda.Event() if self.cuda else None
            if event:
                event.record()
            self.waiting = step, host, event
        if before is None:
            return None
        step, host, event = before
        if event:
            event.synchronize()
        if host.isfinite().all():
            return None
        parts = zip(self.names, host.tolist(), strict=True)
        return step, ", ".join(f"{name} {value:.4g}" for name, value in parts)
