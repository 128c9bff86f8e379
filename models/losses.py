"""Perceptual and adversarial terms of the training loss (paper Eq. 1).

Images are float (N, 3, H, W), RGB, nominally in [0, 1] (a network's output may leave that range).
Every loss is a scalar tensor: a mean over batch, channels and pixels.
"""

import os

import torch
import torch.nn as nn
import torch.nn.functional as F

VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"  # torchvision IMAGENET1K_V1
# 3 x 3 convolutions of that width, each followed by a ReLU; P = 2 x 2 max pooling
VGG19_LAYERS = [64, 64, "P", 128, 128, "P", *[256] * 4, "P", *[512] * 4, "P", *[512] * 4]
# conv1_2, conv2_2, conv3_4, conv4_4, conv5_4 by their index in torchvision's vgg19().features.
# Source of the weights: perceptual_opt of the public HGGT configs.
VGG19_WEIGHTS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class VGG19Loss(nn.Module):
    """d_P of Eq. 1: weighted L1 between VGG19 features, taken before the ReLU.

    weights: a state dict with the names of torchvision's vgg19, or the path of one; only features.0
    to features.34 are used. None: torchvision's ImageNet weights, from the torch hub cache or
    downloaded into it. The network is frozen and in eval mode.
    forward(sr, gt): (N, 3, H, W) each, sides at least 16; no gradient goes to gt. Returns a scalar.
    """

    # PAPER: Eq. 1, d_P.
    # ASSUMED: the paper names no features; layers, weights and L1 are those of the HGGT configs.
    def __init__(self, weights: str | os.PathLike | dict[str, torch.Tensor] | None = None):
        super().__init__()
        if weights is None:
            weights = torch.hub.load_state_dict_from_url(
                VGG19_URL, map_location="cpu", weights_only=True, check_hash=True)
        elif not isinstance(weights, dict):
            weights = torch.load(weights, map_location="cpu", weights_only=True)

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

        state = {key.removeprefix("features."): value.float() for key, value in weights.items()
                 if key.startswith("features.")}
        self.features.load_state_dict(state, assign=True)
        self.features.requires_grad_(False).eval()
        for buffer, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(buffer, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def taps(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Features of one batch at the layers of VGG19_WEIGHTS, in that order."""
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


def laplacian_loss(sr: torch.Tensor, gt: torch.Tensor, levels: int = 3) -> torch.Tensor:
    """Stand-in for VGG19Loss that needs no weights: mean L1 between band-pass residuals.

    Each level compares what a 5 x 5 binomial filter (Burt and Adelson, 1983; borders reflected)
    removes from sr and from gt, then halves both by 2 x 2 means; the loss is the mean of the
    levels. It sees detail only: a constant shift between sr and gt costs nothing.
    sr, gt: (N, C, H, W), sides at least 3 x 2^(levels - 1). Returns a scalar.
    """
    # ASSUMED: not in the paper; for machines without VGG19's weights, as in the demo.
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

    pred_real, pred_fake: logits of any shape; pred_fake is D's output on sr.detach(). The two means
    are added, not halved (the public HGGT code).
    """
    real = F.binary_cross_entropy_with_logits(pred_real, torch.ones_like(pred_real))
    return real + F.binary_cross_entropy_with_logits(pred_fake, torch.zeros_like(pred_fake))
