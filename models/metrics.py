"""The tables' metrics: PSNR and SSIM as HGGT computes them, and pyiqa's under their column names.

A full-reference metric ("fr") is f(sr, gts) -> (N,), both (N, 3, H, W) in [0, 1]; the border is
cropped here. A no-reference metric ("nr") is f(images) -> (N,), up = better.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.distributed import gather, rank_zero_first
from models.iqa import MetricUnavailable, load_fr, load_iqa, min_side

METRICS = ["psnr", "ssim", "lpips", "lpips_st", "dists", "musiq", "nima", "qalign", "topiq"]
FULL_REFERENCE = {"lpips": "lpips", "lpips_st": "stlpips", "dists": "dists"}  # pyiqa's names
NO_REFERENCE = {"topiq": "topiq_nr"}  # all others have pyiqa's name
CROP_BORDER = 4  # pixels per side, for full-reference metrics (HGGT)


# ------------------------------------------------------------------------- PSNR and SSIM


def to_8bit(x: Tensor) -> Tensor:
    """(..., H, W) in [0, 1] -> float64 whole numbers 0..255; values outside are clipped.

    On the CPU where x lies on Apple's GPU, which has no float64.
    """
    x = x.cpu() if x.device.type == "mps" else x
    return x.double().clamp(0, 1).mul(255).round()


def rounded(x: Tensor) -> Tensor:
    """(..., H, W) as a saved picture has it: float32, 8 bit, in [0, 1], where x is."""
    return (to_8bit(x.float()).float() / 255).to(x.device)


def as_tensor(image: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (H, W, 3) -> (1, 3, H, W) float in [0, 1]."""
    x = torch.from_numpy(image.copy()).to(device)
    return x.permute(2, 0, 1)[None].float() / 255


def as_image(x: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] -> uint8 (H, W, 3)."""
    return to_8bit(x[0]).byte().permute(1, 2, 0).cpu().numpy()


def crop(x: Tensor, border: int) -> Tensor:
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]


def psnr(sr: Tensor, gt: Tensor, crop_border: int) -> Tensor:
    """Peak signal-to-noise ratio in dB over RGB, as HGGT's script computes it.

    sr, gt: (N, 3, H, W) float in [0, 1], rounded to 8 bit here; crop_border: pixels per side.
    Returns (N,) float64; inf for images that are equal at 8 bit.
    """
    error = crop(to_8bit(sr) - to_8bit(gt), crop_border)
    return 10 * torch.log10(255**2 / error.square().mean((1, 2, 3)))


def ssim(sr: Tensor, gt: Tensor, crop_border: int) -> Tensor:
    """Structural similarity, mean of the RGB channels, as HGGT's script computes it.

    11x11 Gaussian window of sigma 1.5, whole windows only, float64 (pyiqa's clamps negative
    structure and differs). sr, gt: (N, 3, H, W) float in [0, 1], rounded to 8 bit here, at least
    11 pixels a side once cropped. Returns (N,) float64.
    """
    x, y = (crop(to_8bit(image), crop_border) for image in (sr, gt))
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"ssim: {x.shape[-1]}x{x.shape[-2]} pixels are left, it needs 11x11")
    window = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]

    def blur(image: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 3, H - 10, W - 10)
        for dim in (-1, -2):  # sums of shifts: float64 convolutions take ten times as long
            size = image.shape[dim] - 10
            shifts = [image.narrow(dim, i, size) for i in range(11)]
            image = shifts[0] * (window[0] / sum(window))
            for shift, weight in zip(shifts[1:], window[1:], strict=True):
                image.add_(shift, alpha=weight / sum(window))
        return image

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2
    cov = blur(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    return (luminance * (2 * cov + c2) / (var_x + var_y + c2)).mean((1, 2, 3))


# ------------------------------------------------------------------------- columns of a table


def split_pairs(pairs: list[str], flag: str) -> dict[str, str]:
    """["NAME=VALUE", ...] of a flag -> {NAME: VALUE}."""
    names = [pair.partition("=")[0] for pair in pairs]
    for pair, name in zip(pairs, names, strict=True):
        if (name in ("", ".", "..") or "=" not in pair or names.count(name) > 1
                or set(name) & set("/\\\n")):
            raise ValueError(f"{flag} {pair}: write NAME=VALUE, each NAME once, without a slash")
    return dict(pair.split("=", 1) for pair in pairs)


def pyiqa_name(metric: str) -> str:
    """A column's metric as models/iqa.py and the score cache call it: topiq@F -> topiq_nr@F."""
    name, at, file = metric.partition("@")
    return (FULL_REFERENCE | NO_REFERENCE).get(name, name) + at + file


def smallest_side(metric: str) -> int:
    """Smallest GT side in pixels that a metric can score, its cropped border included."""
    name = metric.partition("@")[0]
    if name in ("psnr", "ssim"):
        return 2 * CROP_BORDER + {"psnr": 1, "ssim": 11}[name]
    return min_side(pyiqa_name(metric)) + 2 * CROP_BORDER * (name in FULL_REFERENCE)


def load_metric(metric: str, device: torch.device) -> tuple[str, Callable]:
    """("fr", f(sr, gts) -> (N,)) or ("nr", f(images) -> (N,)) of NAME or NAME@FILE.

    f.weights, where there is one, tells the weight files for the head of a table.
    """
    name = metric.partition("@")[0]
    if name in ("psnr", "ssim"):
        function = {"psnr": psnr, "ssim": ssim}[name]
        return "fr", lambda sr, gt: function(sr, gt, CROP_BORDER)
    if name not in FULL_REFERENCE:
        return "nr", load_iqa(pyiqa_name(metric), device)
    net = load_fr(pyiqa_name(metric), device)

    def compare(sr: Tensor, gt: Tensor) -> Tensor:
        return net(crop(sr, CROP_BORDER), crop(gt, CROP_BORDER))

    compare.weights = net.weights
    return "fr", compare


def score_pair(metrics: dict[str, tuple[str, Callable]], sr: Tensor, gt: Tensor) -> list[float]:
    """Scores of one SR image by the metrics of `load_metrics`; sr, gt: (1, 3, H, W) in [0, 1]."""
    return [(metric(sr, gt) if kind == "fr" else metric(sr)).item()
            for kind, metric in metrics.values()]


def load_metrics(
    specs: dict[str, str], device: torch.device
) -> tuple[dict[str, tuple[str, Callable]], dict[str, str], list[str]]:
    """Metrics of a table's columns, {column: NAME or NAME@FILE}.

    Returns {column: (kind, function)}, {column: why its metric is unavailable on some rank}, and
    what is wrong with the others.
    """
    metrics, unavailable, problems = {}, {}, []

    def load() -> None:
        for column, metric in specs.items():
            try:
                metrics[column] = load_metric(metric, device)
            except MetricUnavailable as error:
                unavailable[column] = str(error)
            except (ValueError, OSError) as error:
                problems.append(str(error))

    rank_zero_first(load)  # rank 0 may download the weights
    for absent in gather(dict(unavailable)):
        unavailable |= absent
    return {c: m for c, m in metrics.items() if c not in unavailable}, unavailable, problems
