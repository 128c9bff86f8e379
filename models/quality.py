"""The quality model of training: one NR-IQA, or several that behave like one (`--iqa a b`).

Several metrics count as the mean of their standardised scores, on the scale of the first, so that a
temperature or a weight meant for the first alone keeps its meaning.
"""

import argparse
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from models.dataset import MultiGTDataset
from models.distributed import gather, rank_zero_first
from models.flags import refuse
from models.hggt import MultiGT
from models.iqa import FrozenMetric, load_iqa, min_side
from models.scores import file_hashes, score_images

CALIBRATION_DRAWS = 128  # whose ground-truth patches give the scale of several metrics

Array = TypeVar("Array", np.ndarray, Tensor)


def load_quality(
    args: argparse.Namespace, sets: MultiGT, saved: dict, differentiable: bool = False
) -> nn.Module:
    """args.iqa for patches of args.patch_size: (N, 3, H, W) in [0, 1] -> (N,), up = better.

    args:  iqa, patch_size, seed, device, rank. Every rank calls this.
    saved: of the run; holds the scale of several metrics as "iqa_scale" once it is known
    Raises ValueError for an unknown metric or patches too small, OSError where weights are missing.
    """
    for name in args.iqa:
        check_side(name, args.patch_size)
    metrics = rank_zero_first(lambda: [load_iqa(name, args.device, differentiable=differentiable)
                                       for name in args.iqa])  # rank 0 may download weights
    if len(metrics) == 1:
        return metrics[0]
    mean = MeanOfMetrics(metrics)
    if saved.get("iqa_scale") is None:
        scale = gather(patch_scale(args, sets, mean) if args.rank == 0 else None)[0]
        saved["iqa_scale"] = torch.tensor(scale, dtype=torch.float32)
    mean.scale = saved["iqa_scale"].to(args.device)
    return mean


def in_tf32(quality: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same quality model, (N, 3, H, W) -> (N,), with TF32 where the GPU has it."""
    metrics = [m for m in quality.modules() if isinstance(m, FrozenMetric)]

    def score(images: Tensor) -> Tensor:
        for metric in metrics:
            metric.tf32 = True
        try:
            return quality(images)
        finally:
            for metric in metrics:
                metric.tf32 = False

    return score


def image_quality(args: argparse.Namespace, sets: MultiGT) -> np.ndarray:
    """Quality of every whole ground truth, (n, K), for sma and smp (paper Sec. 4.2).

    Scored once, shared among the ranks, and kept in `score_folder`.
    """
    folder = score_folder(sets, args.out)
    paths, scores = np.array(sets.paths, object), []
    for name in args.iqa:
        check_side(name, int(sets.sizes.min()))
        build = functools.partial(load_iqa, name, args.device)
        found = score_images(name, build, {p: p for p in paths.flat}, folder, args.device)
        scores.append(found.of(paths) if found else np.full(paths.shape, np.nan))
        if np.isnan(scores[-1]).any():
            raise ValueError(f"--iqa {name}: could not score every image of {sets.root}, see above")
    if len(scores) == 1:
        return scores[0]
    scores = np.stack(scores, -1)  # (n, K, M)
    return mean_standardised(scores, scale_of(scores, args.iqa))


def check_side(name: str, side: int) -> None:
    """ValueError if images of that smaller side in pixels are too small for a metric."""
    if side < min_side(name):
        raise ValueError(f"--iqa {name}: needs images of {min_side(name)} px, these are {side}")


# ------------------------------------------------------------------------- several as one


class MeanOfMetrics(nn.Module):
    """Several NR-IQA as one: (N, 3, H, W) -> (N,), `mean_standardised` by `scale`."""

    def __init__(self, metrics: Sequence[nn.Module]):
        super().__init__()
        self.metrics = nn.ModuleList(metrics)
        self.scale: Tensor | None = None  # (2, M): set it before the first forward pass

    def each(self, images: Tensor) -> Tensor:
        """(N, M)"""
        return torch.stack([metric(images) for metric in self.metrics], -1)

    def forward(self, images: Tensor) -> Tensor:
        return mean_standardised(self.each(images), self.scale)


def mean_standardised(scores: Array, scale: Array) -> Array:
    """(..., M) scores, up = better, and their (2, M) scale -> (...), on the scale of the first."""
    mean, deviation = scale
    return ((scores - mean) / deviation).mean(-1) * deviation[0] + mean[0]


def scale_of(scores: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Mean and standard deviation, (2, M), of (..., M) scores of the M metrics named.

    Raises ValueError for a metric whose scores are all equal or not all finite.
    """
    scores = scores.reshape(-1, len(names)).astype(np.float64)
    for name, column in zip(names, scores.T, strict=True):
        if not np.isfinite(column).all():
            raise ValueError(f"--iqa {name}: has no finite score of some ground truth; leave it "
                             "out")
        if column.std() <= 1e-6 * np.abs(column).max():  # equal but for rounding
            raise ValueError(f"--iqa {name}: gives all ground truths the same score; leave it out")
    return np.stack([scores.mean(0), scores.std(0)])


@torch.no_grad()
def patch_scale(args: argparse.Namespace, sets: MultiGT, metrics: MeanOfMetrics) -> np.ndarray:
    """`scale_of` the ground-truth patches of the first draws, (2, M)."""
    dataset = MultiGTDataset(sets, None, args.patch_size, args.seed, degrade=None)
    scores = []
    for place in map(dataset.place, range(CALIBRATION_DRAWS)):
        patches = torch.from_numpy(dataset.gt_patches(place, range(len(sets.paths[0]))))
        scores.append(metrics.each(patches.to(args.device).float() / 255).cpu().numpy())
    scale = scale_of(np.concatenate(scores), args.iqa)
    for name, mean, deviation in zip(args.iqa, *scale, strict=True):
        print(f"--iqa {name}: {mean:.4g} ± {deviation:.4g} over the patches of "
              f"{CALIBRATION_DRAWS} draws")
    return scale


# ------------------------------------------------------------------------- the data


def score_folder(sets: MultiGT, out: str | Path) -> Path:
    """Where a data set's scores and hashes are kept: <data>/.scores, or out/.scores where the data
    is read-only."""
    folder = Path(sets.root, ".scores")
    writable = os.access(folder if folder.exists() else sets.root, os.W_OK)
    return folder if writable else Path(out, ".scores")


def image_digest(sets: MultiGT, folder: Path) -> str:
    """Hex digits of the content of a data set's images, wherever they are.

    folder: remembers their hashes
    """
    files = [path for row in sets.paths for path in row]
    hashes = file_hashes(files, folder)
    refuse([f"{path}: {e.strerror}" for path, e in hashes.items() if isinstance(e, OSError)])
    content = [sets.shrink, *(hashes[path] for path in files)]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def data_digest(sets: MultiGT, images: str) -> str:
    """Hex digits of a data set's names, labels and `image_digest`."""
    digest = hashlib.sha256(repr((sets.names, images)).encode())
    if sets.labels is not None:
        digest.update(sets.labels.tobytes())
    return digest.hexdigest()[:16]
