"""Training samples of a multi-GT set, each a function of the seed and its draw number alone."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np

from models.cache import PixelCache
from models.hggt import MultiGT


def check_patch_size(sets: MultiGT, patch_size: int, scale: int = 4) -> None:
    """ValueError if a GT is smaller than the patch, or the patch is no multiple of scale."""
    if patch_size % scale:
        raise ValueError(f"--patch-size {patch_size}: must be a multiple of {scale}")
    too_small = np.flatnonzero((sets.sizes < patch_size).any(1))
    if len(too_small):
        height, width = sets.sizes[too_small[0]]
        raise ValueError(f"{sets.paths[too_small[0]][0]}: {width}x{height} is smaller than "
                         f"--patch-size {patch_size} ({len(too_small)} such sets)")


class Place(NamedTuple):
    """Where a draw cuts its patch; its generator then draws the degradation."""

    index: int  # of the set
    top: int  # GT pixels
    left: int
    flip: bool  # horizontally: the image is mirrored first, then cut and degraded
    pick: float  # uniform in [0, 1), decides which ground truth
    rng: np.random.Generator


class MultiGTDataset:
    """Training samples addressed by their draw number: sample = f(seed, draw), and nothing else.

    A map-style dataset for torch's DataLoader, which makes tensors of the arrays.

    weights:    (n, K) sampling weights over the GTs of each set; a set with a row of zeros is
                skipped. None returns the patches of all K GTs (amo chooses on the device)
    patch_size: GT patch side in pixels, a multiple of `scale`
    degrade:    (original uint8 (H, W, 3), top, left, patch_size, rng) -> LQ patch uint8 (h, w, 3);
                the LQ comes from the original whatever the GT
    prepare:    optional uint8 (H, W, 3) -> the same, applied to a decoded image (stage one's USM)
    cache:      optional, the decoded images

    A sample is {"lq": uint8 (3, h, w), "gts": uint8 (K or 1, 3, H, W), "choice": int, "draw": int};
    choice is the member of the set that was drawn, -1 where all are returned.
    """

    def __init__(
        self,
        sets: MultiGT,
        weights: np.ndarray | None,
        patch_size: int,
        seed: int,
        degrade: Callable[..., np.ndarray],
        scale: int = 4,
        prepare: Callable[[np.ndarray], np.ndarray] | None = None,
        cache: PixelCache | None = None,
    ):
        check_patch_size(sets, patch_size, scale)
        self.sets, self.weights = sets, weights
        self.patch_size, self.seed, self.scale = patch_size, seed, scale
        self.degrade, self.prepare, self.cache = degrade, prepare, cache
        self.eligible = np.arange(len(sets.names))
        if weights is not None:
            self.eligible = np.flatnonzero(weights.sum(1) > 0)
        if not len(self.eligible):
            raise ValueError(f"{sets.root}: none of the {len(sets.names)} image sets has a ground "
                             "truth that this --sampler may choose")
        self._order = (-1, self.eligible)  # epoch and its permutation

    def set_of(self, draw: int) -> int:
        """Which set a draw uses: every eligible set once per epoch, in a fresh random order."""
        epoch, position = divmod(draw, len(self.eligible))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, 1))
            self._order = (epoch, rng.permutation(self.eligible))
        return int(self._order[1][position])

    def place(self, draw: int) -> Place:
        """The patch of a draw, the same for every sampler."""
        index, size, scale = self.set_of(draw), self.patch_size, self.scale
        rng = np.random.default_rng((self.seed, draw))
        height, width = self.sets.sizes[index]
        top = int(rng.integers((height - size) // scale + 1)) * scale
        left = int(rng.integers((width - size) // scale + 1)) * scale
        # PAPER: "the same training settings as HGGT", which flips horizontally, before all else
        return Place(index, top, left, bool(rng.random() < 0.5), rng.random(), rng)

    def __getitem__(self, draw: int) -> dict[str, np.ndarray | int]:
        place = self.place(draw)
        choice, members = -1, range(len(self.sets.paths[place.index]))
        if self.weights is not None:
            cumulative = np.cumsum(self.weights[place.index])
            choice = int(np.searchsorted(cumulative / cumulative[-1], place.pick, side="right"))
            members = [choice]
        original = self.image(place.index, 0)
        mirrored = cv2.flip(original, 1) if place.flip else original
        lq = self.degrade(mirrored, place.top, place.left, self.patch_size, place.rng)
        gts = self.gt_patches(place, members, original)
        return {"lq": np.stack(cv2.split(lq)), "gts": gts, "choice": choice, "draw": draw}

    def gt_patches(
        self, place: Place, members: list[int] | range, original: np.ndarray | None = None
    ) -> np.ndarray:
        """(len(members), 3, H, W) uint8: the same patch of these members of a set.

        original: the decoded member 0, where the caller has it.
        """
        size = self.patch_size
        patches = np.empty((len(members), 3, size, size), np.uint8)
        for patch, k in zip(patches, members, strict=True):
            image = self.image(place.index, k) if k or original is None else original
            left = image.shape[1] - size - place.left if place.flip else place.left
            gt = image[place.top : place.top + size, left : left + size]
            gt = cv2.flip(gt, 1) if place.flip else gt
            for plane, channel in zip(patch, cv2.split(gt), strict=True):  # twice numpy's speed
                plane[:] = channel
        return patches

    def image(self, index: int, member: int) -> np.ndarray:
        """The whole decoded image, uint8 (H, W, 3)."""
        if self.cache is not None:
            image = self.cache[index, member]
        else:
            image = self.sets.read(self.sets.paths[index][member])
        return image if self.prepare is None else self.prepare(image)


class StepBatchSampler:
    """Batch sampler: the draw numbers of one rank for the steps first..last (1-based)."""

    def __init__(self, first: int, last: int, batch_size: int, rank: int, world: int):
        self.first, self.last, self.batch_size = first, last, batch_size
        self.share, self.rank = batch_size // world, rank

    def __len__(self) -> int:
        return max(0, self.last - self.first + 1)

    def __iter__(self) -> Iterator[range]:
        return map(self.of_step, range(self.first, self.last + 1))

    def of_step(self, step: int) -> range:
        start = (step - 1) * self.batch_size + self.rank * self.share
        return range(start, start + self.share)
