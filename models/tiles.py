"""An image through a network whole or, where memory does not suffice, in overlapping tiles.

    sr = upscale(net, lq)                # whole, in tiles only where that runs out of memory
    sr = upscale(net, lq, tile=256)      # tiles of 256 x 256 LQ pixels

Tiles start at multiples of the step STEP, a multiple of SwinIR's window, so that the windows
of every tile are windows of the whole image, and the last tile is padded as the whole image is. In
an overlap the MARGIN pixels next to a tile's border are not used, and between these two strips one
tile fades linearly into the next. So whatever lies within MARGIN pixels of what the network looks
at is the whole image's result everywhere; for a network that looks further, up to OVERLAP pixels,
outside the overlaps; and for one that looks at everything (SwinIR's 36 blocks in the strict sense)
the difference is what the pixels beyond the overlap still contribute.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

STEP = 8  # LQ pixels; the window of the paper's SwinIR
OVERLAP = 32  # LQ pixels that neighbouring tiles share
MARGIN = 8  # LQ pixels along a tile's inner border whose result is thrown away
SMALLEST_TILE = 64


@torch.no_grad()
def upscale(
    net: nn.Module, lq: Tensor, tile: int | None = None, scale: int = 4, quiet: bool = False
) -> tuple[Tensor, int | None]:
    """A network's output for one image, and the size of the tiles that it was made in.

    lq: (1, 3, H, W) float, on the network's device.
    tile: LQ pixels per side; 0: the whole image whatever it takes; None: the whole image, and where
    memory runs out tiles of half the longer side, a quarter and so on. A Linux CPU refuses no
    memory, but kills the process that uses it: `limit_memory` first.
    quiet: no progress bar over the tiles.
    Returns ((1, 3, scale * H, scale * W) float32, not clamped, on the device if whole and on the
    CPU if tiled; 0 or the tiles' side).
    Raises ValueError for a tile that is no multiple of 8 or smaller than 64, and MemoryError where
    not even the smallest tiles fit.
    """
    if tile is not None:
        tile_size(str(tile))
    h, w = lq.shape[2:]
    sizes = [tile or 0] if tile is not None else [0, *halves(max(h, w))]
    for size in sizes:
        try:
            if not size or size >= max(h, w):
                return net(lq).float(), 0
            return _tiled(net, lq, size, scale, quiet), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if lq.is_cuda:  # after the except clause, whose traceback holds the failed run's tensors
            torch.cuda.empty_cache()
    advice = "" if tile is None else "; give --tile auto or a smaller one"
    how = f"in tiles of {sizes[-1]}" if sizes[-1] else "whole"
    raise MemoryError(f"out of memory with {w}x{h} pixels {how}{advice}")


def tile_size(text: str) -> int | None:
    """A --tile as `upscale` takes it: "auto" is None. Raises ValueError for one that it refuses."""
    if text == "auto":
        return None
    if not text.isdecimal() or (int(text) and (int(text) % STEP or int(text) < SMALLEST_TILE)):
        raise ValueError(f"--tile {text}: give auto, 0 or a multiple of {STEP}, {SMALLEST_TILE} "
                         "or more")
    return int(text)


def halves(side: int) -> Iterator[int]:
    """Tile sizes to try one after the other: half of `side` rounded up to a step, down to 64."""
    while side > SMALLEST_TILE:
        side = max(-(-side // (2 * STEP)) * STEP, SMALLEST_TILE)
        yield side


def free_memory(root: str | Path = "/") -> int | None:
    """Bytes that the machine, and the process's cgroup (version 2), have left; None if unknown."""
    def number(file: str, key: str | None = None) -> int | None:
        try:
            words = Path(root, file).read_text().split()
            return int(words[words.index(key) + 1 if key else 0])
        except (OSError, ValueError):  # no such file or key; a limit may be "max"
            return None

    left = []
    if (free := number("proc/meminfo", "MemAvailable:")) is not None:
        left.append(1024 * free)
    limit, used = (number(f"sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:  # what files fill is given back where it is needed
        left.append(limit - used + (number("sys/fs/cgroup/memory.stat", "inactive_file") or 0))
    return max(0, min(left)) if left else None


def limit_memory(share: float = 0.9) -> None:
    """On Linux, let allocations fail that would take more than this share of the free memory; else
    the system lets them be and kills the process."""
    free, status = free_memory(), Path("/proc/self/status")
    if free is None or not status.exists():
        return
    import resource  # not on Windows

    held = 1024 * int(status.read_text().split("VmData:")[1].split()[0])
    data, hard = held + int(share * free), resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or data < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (data, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused memory, told by torch's words (only CUDA's has a class), or a
    CUDA kernel more than 2^31 values."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED",
             "INT_MAX", "numeric_limits<int",
             "unable to find an engine",  # cuDNN, whose workspace does not fit
             "could not create a")  # oneDNN, whose scratchpad does not
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or any(word in str(error) for word in words)


def spans(side: int, tile: int) -> list[tuple[int, int]]:
    """Where the tiles of one axis start and end, in LQ pixels: neighbours share OVERLAP pixels."""
    starts = range(0, max(side - OVERLAP, 1), tile - OVERLAP)
    return [(start, min(start + tile, side)) for start in starts]


def ramp(start: int, end: int, side: int, scale: int) -> Tensor:
    """Weight of a tile along one axis, (scale * (end - start),); all tiles' add up to 1."""
    centre = (torch.arange(scale * (end - start)) + 0.5) / scale  # in LQ pixels
    weight = torch.ones_like(centre)
    for distance, at_border in ((centre, start == 0), (end - start - centre, end == side)):
        if not at_border:
            weight = weight * ((distance - MARGIN) / (OVERLAP - 2 * MARGIN)).clamp(0, 1)
    return weight


def _tiled(net: nn.Module, lq: Tensor, tile: int, scale: int, quiet: bool) -> Tensor:
    h, w = lq.shape[2:]
    boxes = [(y, x) for y in spans(h, tile) for x in spans(w, tile)]
    total = torch.zeros(1, lq.shape[1], scale * h, scale * w)
    progress = tqdm(boxes, desc="tiles", unit="tile", leave=False, disable=quiet or None)
    for (top, bottom), (left, right) in progress:
        sr = net(lq[..., top:bottom, left:right]).float().cpu()
        weight = ramp(top, bottom, h, scale)[:, None] * ramp(left, right, w, scale)
        total[..., scale * top : scale * bottom, scale * left : scale * right] += sr * weight
    return total
