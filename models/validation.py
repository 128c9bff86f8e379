"""Validation while training: scores on a few fixed pairs, and the guard that stops a fine-tuning.

The quality model Q is what a reward raises, so it cannot be the judge. The guard is fidelity: PSNR,
and LPIPS where its weights are available.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from models.checkpoint import read_csv
from models.flags import refuse
from models.hggt import MultiGT
from models.images import read_rgb
from models.iqa import precision
from models.metrics import as_tensor, load_metrics, rounded, score_pair
from models.quality import score_folder
from models.scores import file_hashes
from models.testset import find_hggt_test

FIDELITY = {"psnr": "psnr", "ssim": "ssim", "lpips": "lpips"}  # val_... in log.csv
SECOND = {"topiq_nr": "topiq_nr"}  # a quality model that has no part in training
LPIPS_SLACK = 1.02  # by which LPIPS may rise

Pair = tuple[np.ndarray, np.ndarray]  # LQ and ground truth, uint8 (h, w, 3), (4h, 4w, 3)


class Validation:
    """Mean scores of a network on pairs of an LQ image and its ground truth.

    quality: (N, 3, H, W) in [0, 1] -> (N,), the run's own, scored as column q; None: `name`, where
    it is available
    columns: of the scores: psnr in dB, ssim, lpips and topiq_nr where they are available, q
    digest: of the pairs
    Every rank builds it; rank 0 alone calls it. Raises ValueError with a line for each problem.
    """

    def __init__(self, pairs: Sequence[Pair], quality: nn.Module | None, name: str,
                 device: torch.device):
        self.pairs, self.device, self.quality = pairs, device, quality
        specs = FIDELITY | SECOND | ({} if quality else {"q": name})
        self.metrics, _, problems = load_metrics(specs, device)
        refuse(problems)
        self.columns = [*self.metrics, *["q"] * (quality is not None)]
        self.digest = hashlib.sha256(b"".join(
            b"%d %d " % image.shape[:2] + image.tobytes() for pair in pairs for image in pair)
        ).hexdigest()

    @torch.no_grad()
    def __call__(self, net: nn.Module) -> list[float]:
        """The mean of each column, the network in float32 as in the tables."""
        rows = []
        with precision(tf32=False):
            for lq, gt in self.pairs:
                sr = rounded(net(as_tensor(lq, self.device)))
                row = score_pair(self.metrics, sr, as_tensor(gt, self.device))
                rows.append(row + ([] if self.quality is None else [self.quality(sr).item()]))
        return np.mean(rows, 0).tolist()


def passes(scores: dict[str, float], base: dict[str, float], guard: float) -> bool:
    """Whether fidelity has not fallen: PSNR by `guard` dB at most, LPIPS risen by 2 % at most.

    scores, base: by the columns of `Validation`; guard: 0 passes all
    """
    lpips = scores.get("lpips", 0) <= LPIPS_SLACK * base.get("lpips", 0)
    return not guard or (scores["psnr"] >= base["psnr"] - guard and lpips)


def fidelity(scores: dict[str, float]) -> float:
    """What tells the best network: the lowest LPIPS where it is available, else PSNR."""
    return -scores["lpips"] if "lpips" in scores else scores["psnr"]


def read_pairs(lq: str, gt: str) -> list[Pair]:
    """The pairs of two folders of PNGs. Raises ValueError with a line for each bad file."""
    sets, lq_files, problems = find_hggt_test(gt, lq)
    refuse(problems)
    return [(read_rgb(lq_file), read_rgb(original))
            for lq_file, (original, *_) in zip(lq_files, sets.paths, strict=True)]


def hold_out(sets: MultiGT, count: int, out: str) -> tuple[MultiGT, MultiGT]:
    """(the rest, `count` images for validation), which their content's hash chooses.

    Of equal files one is held out, and none stays in the rest.
    out: the run folder, for hashes where the data are read-only
    Raises ValueError where fewer images are left.
    """
    files = [row[0] for row in sets.paths]
    if not sets.is_flat:
        raise ValueError(f"--val {count}: {sets.root} is no flat folder; give --val LQ GT")
    hashes = file_hashes(files, score_folder(sets, out))
    first = {}  # image of each content
    for i, file in enumerate(files):
        first.setdefault(str(hashes[file]), i)
    held = sorted(first)[:count]
    if count >= len(first):
        raise ValueError(f"--val {count}: {sets.root} has {len(first)} different images; hold out "
                         "fewer")
    rest = [i for i, file in enumerate(files) if str(hashes[file]) not in held]
    return sets.subset(np.array(rest)), sets.subset(np.sort([first[name] for name in held]))


def make_pairs(sets: MultiGT, size: int, degrade: Callable[..., np.ndarray]) -> list[Pair]:
    """The centre of each image, size x size pixels, and its degradation, equal in every run."""
    pairs = []
    for i, (path, *_) in enumerate(sets.paths):
        image = sets.read(path)
        top, left = ((side - size) // 8 * 4 for side in image.shape[:2])
        lq = degrade(image, top, left, size, np.random.default_rng((i, 3)))
        pairs.append((lq, image[top : top + size, left : left + size]))
    return pairs


# ------------------------------------------------------------------------- sample images


def centres(pairs: Sequence[Pair], size: int, count: int = 4) -> tuple[Tensor, Tensor]:
    """The centres of the first pairs: LQ (n, 3, size / 4, size / 4) and ground truth
    (n, 3, size, size), uint8; smaller where an image is."""
    pairs = pairs[:count]
    side = min([size // 4, *(min(lq.shape[:2]) for lq, _ in pairs)])
    cut = []
    for lq, gt in pairs:
        top, left = ((n - side) // 2 for n in lq.shape[:2])
        cut.append((lq[top : top + side, left : left + side],
                    gt[4 * top : 4 * (top + side), 4 * left : 4 * (left + side)]))
    return tuple(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
                 for images in zip(*cut, strict=True))


def sample_image(lq: Tensor, sr: Tensor, gt: Tensor, title: str) -> np.ndarray:
    """One image, uint8 (H, W, 3): a row per sample, LQ (nearest x4), SR, ground truth; captions.

    lq, gt: uint8 (n, 3, ., .); sr: float (n, 3, H, W), nominally in [0, 1]
    """
    big = lq.repeat_interleave(4, 2).repeat_interleave(4, 3)
    columns = [big, sr.float().clamp(0, 1).mul(255).round().byte().cpu(), gt]
    rows = torch.cat(columns, -1).permute(0, 2, 3, 1).flatten(0, 1).numpy()
    width = gt.shape[-1]
    strip = np.full((24, rows.shape[1], 3), 255, np.uint8)
    for i, text in enumerate(("LQ", title, "ground truth")):
        scale = min(0.45, 0.45 * width / (8 * len(text) + 8))  # 8 pixels a letter at 0.45
        cv2.putText(strip, text, (i * width + 4, 17), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1,
                    cv2.LINE_AA)
    return np.concatenate([strip, rows])


# ------------------------------------------------------------------------- the kept step


def validations(out: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv that have a validation."""
    rows, _ = read_csv(out / "log.csv", ["step"])
    return [row for row in rows if row.get("val_passed")]


def kept_step(out: Path, last: int) -> int:
    """The step whose network is a run's result: the last validated one that passed.

    last: the run's last step, which is it where that was not validated
    """
    rows, _ = read_csv(out / "log.csv", ["step"])
    if not rows[-1].get("val_passed"):
        return last
    return max(int(row["step"]) for row in rows if row["val_passed"] == "1")
