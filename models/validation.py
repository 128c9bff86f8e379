"""Validation while training: scores on a few fixed pairs, and the guard that stops a fine-tuning.

The quality model Q is what a reward raises, so it cannot be the judge. The guard is fidelity: PSNR,
and LPIPS where its weights are available.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.checkpoint import read_csv
from models.flags import refuse
from models.images import read_rgb
from models.metrics import as_tensor, load_metrics, to_8bit
from models.testset import find_hggt_test

FIDELITY = {"psnr": "psnr", "ssim": "ssim", "lpips": "lpips"}  # columns of val.csv
LPIPS_SLACK = 1.02  # by which LPIPS may rise


class Validation:
    """Mean scores of a network on a folder of LQ images and one of ground truths.

    quality: (N, 3, H, W) in [0, 1] -> (N,), scored as column q; None: no such column
    columns: of the scores: psnr in dB, ssim, lpips where it is available, q
    Every rank builds it; rank 0 alone calls it. Raises ValueError with a line for each bad file.
    """

    def __init__(self, lq: str, gt: str, quality: nn.Module | None, device: torch.device):
        sets, lq_files, problems = find_hggt_test(gt, lq)
        refuse(problems)
        self.pairs, self.device, self.quality = [], device, quality
        for lq_file, (original, *_) in zip(lq_files, sets.paths, strict=True):
            self.pairs.append((read_rgb(lq_file), read_rgb(original)))
        self.metrics, _, problems = load_metrics(FIDELITY, device)
        refuse(problems)
        self.columns = [*self.metrics, *["q"] * (quality is not None)]

    @torch.no_grad()
    def __call__(self, net: nn.Module) -> list[float]:
        """The mean of each column."""
        rows = []
        for lq, gt in self.pairs:
            sr = to_8bit(net(as_tensor(lq, self.device)).float()).float() / 255
            target = as_tensor(gt, self.device)
            row = [metric(sr, target).item() for _, metric in self.metrics.values()]
            rows.append(row + ([] if self.quality is None else [self.quality(sr).item()]))
        return np.mean(rows, 0).tolist()

    def passes(self, scores: list[float], base: list[float], guard: float) -> bool:
        """Whether fidelity has not fallen: PSNR by `guard` dB at most, LPIPS risen by 2 % at most.
        """
        now, before = (dict(zip(self.columns, row, strict=True)) for row in (scores, base))
        lpips = now.get("lpips", 0) <= LPIPS_SLACK * before.get("lpips", 0)
        return now["psnr"] >= before["psnr"] - guard and lpips


def kept_step(out: Path, last: int) -> int:
    """The step of a run's last validation that passed, by its val.csv: its result's; `last` if it
    has validated nothing."""
    if not (out / "val.csv").is_file():
        return last
    rows, _ = read_csv(out / "val.csv", ["step", "passed"])
    return max(int(row["step"]) for row in rows if row["passed"] == "1")
