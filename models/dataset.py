"""Training samples of a multi-GT set, each a function of the seed and its draw number alone."""

from collections.abc import Callable, Mapping

import cv2
import numpy as np


def check_patch_size(
    paths: list[list[str]], sizes: np.ndarray, patch_size: int, scale: int = 4
) -> None:
    """ValueError if a GT is smaller than the patch, or the patch no multiple of scale."""
    if patch_size % scale:
        raise ValueError(f"--patch-size {patch_size}: must be a multiple of {scale}")
    too_small = np.flatnonzero((sizes < patch_size).any(1))
    if len(too_small):
        height, width = sizes[too_small[0]]
        raise ValueError(f"{paths[too_small[0]][0]}: {width}x{height} is smaller than "
                         f"--patch-size {patch_size} ({len(too_small)} such sets)")


class MultiGTDataset:
    """Training samples addressed by their draw number: sample = f(seed, draw), and nothing else.

    A map-style dataset for torch's DataLoader, which makes tensors of the arrays.

    paths:      n x K images, the original first; sizes: (n, 2) their height and width in pixels
    weights:    (n, K) sampling weights over the GTs of each set, rows of zeros are dropped; or None
                to return the patches of all K GTs (amo chooses later, on the training device)
    patch_size: GT patch side in pixels, a multiple of `scale`
    read:       (path, rows) -> at least its first rows, uint8 (H, W, 3); all where rows is None
    degrade:    (read, top, left, patch_size, rng) -> LQ patch uint8 (h, w, 3); read(rows) returns
                the first rows, or more, of the original (the LQ comes from it whatever the GT),
                uint8 (rows, W, 3), and read() all; at least the patch's are to be read
    prepare:    optional uint8 (H, W, 3) -> the same, applied to a decoded image (stage one's USM)
    cache:      optional; cache[index, member] is the decoded image, which is then read from there

    A sample is {"lq": uint8 (3, h, w), "gts": uint8 (K or 1, 3, H, W), "choice": int, "draw": int};
    choice is the member of the set that was drawn, -1 where all are returned.
    """

    def __init__(
        self,
        paths: list[list[str]],
        sizes: np.ndarray,
        weights: np.ndarray | None,
        patch_size: int,
        seed: int,
        read: Callable[[str, int | None], np.ndarray],
        degrade: Callable[..., np.ndarray],
        scale: int = 4,
        prepare: Callable[[np.ndarray], np.ndarray] | None = None,
        cache: Mapping[tuple[int, int], np.ndarray] | None = None,
    ):
        check_patch_size(paths, sizes, patch_size, scale)
        self.paths, self.sizes, self.weights = paths, sizes, weights
        self.patch_size, self.seed, self.scale = patch_size, seed, scale
        self.read, self.degrade, self.prepare, self.cache = read, degrade, prepare, cache
        self.eligible = np.arange(len(paths))
        if weights is not None:
            self.eligible = np.flatnonzero(weights.sum(1) > 0)
        if not len(self.eligible):
            raise ValueError(f"{paths[0][0]} and all others: no set has a GT that this --sampler "
                             "may choose")
        self._order = (-1, self.eligible)  # epoch and its permutation

    def set_of(self, draw: int) -> int:
        """Which set a draw uses: every eligible set once per epoch, in a fresh random order."""
        epoch, position = divmod(draw, len(self.eligible))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, 1))
            self._order = (epoch, rng.permutation(self.eligible))
        return int(self._order[1][position])

    def __getitem__(self, draw: int) -> dict[str, np.ndarray | int]:
        index, size, scale = self.set_of(draw), self.patch_size, self.scale
        # One order of random numbers for all samplers, so that they see the same LQ patches.
        rng = np.random.default_rng((self.seed, draw))
        height, width = self.sizes[index]
        top = int(rng.integers((height - size) // scale + 1)) * scale
        left = int(rng.integers((width - size) // scale + 1)) * scale
        flip, pick = rng.random() < 0.5, rng.random()  # horizontal flip only (RECIPE: augment)
        if self.weights is None:
            choice, members = -1, range(len(self.paths[index]))
        else:
            cumulative = np.cumsum(self.weights[index])
            choice = int(np.searchsorted(cumulative / cumulative[-1], pick, side="right"))
            members = [choice]
        images = {}

        def original(rows: int | None = None) -> np.ndarray:
            images[0] = self._read(index, 0, rows)
            return images[0]

        lq, gts = self.degrade(original, top, left, size, rng), []
        for k in members:
            if k not in images:
                images[k] = self._read(index, k, rows=top + size)
            gts.append(images[k][top : top + size, left : left + size])
        if flip:
            lq, gts = cv2.flip(lq, 1), [cv2.flip(gt, 1) for gt in gts]
        patches = np.empty((len(gts), 3, size, size), np.uint8)
        for patch, gt in zip(patches, gts, strict=True):
            for plane, channel in zip(patch, cv2.split(gt), strict=True):  # twice numpy's speed
                plane[:] = channel
        return {
            "lq": np.stack(cv2.split(lq)),
            "gts": patches,
            "choice": choice,
            "draw": draw,
        }

    def _read(self, index: int, member: int, rows: int | None = None) -> np.ndarray:
        """The image, or at least its first rows."""
        if self.cache is not None:
            image = self.cache[index, member]
        else:
            image = self.read(self.paths[index][member], None if self.prepare else rows)
        # The whole image: the products of a part's sharpening round differently.
        return image if self.prepare is None else self.prepare(image)


class StepBatchSampler:
    """Batch sampler: the draw numbers of one rank for the steps first..last (1-based)."""

    def __init__(self, first: int, last: int, batch_size: int, rank: int, world: int):
        self.first, self.last, self.batch_size = first, last, batch_size
        self.share, self.rank = batch_size // world, rank

    def __len__(self) -> int:
        return max(0, self.last - self.first + 1)

    def __iter__(self):
        return map(self.of_step, range(self.first, self.last + 1))

    def of_step(self, step: int) -> range:
        start = (step - 1) * self.batch_size + self.rank * self.share
        return range(start, start + self.share)
