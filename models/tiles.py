"""An image through a network: the whole image, or overlapping tiles where memory is short.

    sr = upscale(net, lq)                # whole; falls back to tiles on out-of-memory
    sr = upscale(net, lq, tile=256)      # tiles of 256 x 256 LQ pixels

Tiles start at multiples of GRID, SwinIR's window, so every window of a tile is a window of the
whole image, and the last tile is padded like the whole image. Neighbours share OVERLAP pixels. The
MARGIN pixels next to a tile's inner border are thrown away, and between the two margins one tile
fades linearly into the next. The result equals that of the whole image

- everywhere, for a network whose receptive field reaches up to MARGIN pixels;
- outside the overlaps, for one that reaches up to OVERLAP pixels.

Strictly, SwinIR's 36 blocks see the whole image: the difference is what the pixels beyond the
overlap contribute.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from models.progress import progress

GRID = 8  # LQ pixels; the window of the paper's SwinIR
OVERLAP = 32  # LQ pixels that neighbouring tiles share
MARGIN = 8  # LQ pixels along a tile's inner border whose output is thrown away
SMALLEST_TILE = 64


@torch.no_grad()
def upscale(
    net: nn.Module, lq: Tensor, tile: int | None = None, scale: int = 4, quiet: bool = False
) -> tuple[Tensor, int]:
    """A network's output for one image, and the side of the tiles used.

    lq:   (1, 3, H, W) float, on the network's device
    tile: side in LQ pixels; 0: the whole image in any case; None: the whole image, and on
          out-of-memory tiles of half the longer side, a quarter and so on. Linux kills a process
          that uses too much CPU memory instead of refusing it: call `limit_memory` first.
    quiet: no progress bar over the tiles
    Returns (output, side): (1, 3, scale * H, scale * W) float32, not clamped, on the device if
    whole and on the CPU if tiled; 0 if whole.
    Raises ValueError for a tile that is no multiple of 8 or smaller than 64, and MemoryError if
    even the smallest tiles do not fit.
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
    """The `tile` argument of `upscale` for a --tile; "auto" is None. ValueError for a wrong one."""
    if text == "auto":
        return None
    if not text.isdecimal() or (int(text) and (int(text) % GRID or int(text) < SMALLEST_TILE)):
        raise ValueError(f"--tile {text}: give auto, 0 or a multiple of {GRID}, {SMALLEST_TILE} "
                         "or more")
    return int(text)


def halves(side: int) -> Iterator[int]:
    """Tile sides to try in turn: half of `side`, rounded up to a multiple of GRID, down to 64."""
    while side > SMALLEST_TILE:
        side = max(-(-side // (2 * GRID)) * GRID, SMALLEST_TILE)
        yield side


def free_memory(root: str | Path = "/") -> int | None:
    """Free bytes of the machine or, if fewer, of the process's cgroup (version 2); None if unknown.

    root: where proc/ and sys/ are
    """
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
    if limit is not None and used is not None:  # inactive page cache counts as free
        left.append(limit - used + (number("sys/fs/cgroup/memory.stat", "inactive_file") or 0))
    return max(0, min(left)) if left else None


def limit_memory(share: float = 0.9) -> None:
    """On Linux, make allocations beyond this share of the free memory fail.

    Without a limit they succeed, and the system kills the process when it uses the memory.
    """
    free, status = free_memory(), Path("/proc/self/status")
    if free is None or not status.exists():
        return
    import resource  # not on Windows

    held = 1024 * int(status.read_text().split("VmData:")[1].split()[0])
    data, hard = held + int(share * free), resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or data < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (data, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, or a CUDA kernel refused more than 2^31 values.

    Only CUDA's out-of-memory error has a class; the others are told by their text.
    """
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED",
             "INT_MAX", "numeric_limits<int",
             "unable to find an engine",  # cuDNN, whose workspace does not fit
             "could not create a")  # oneDNN, whose scratchpad does not
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or any(word in str(error) for word in words)


def spans(side: int, tile: int) -> list[tuple[int, int]]:
    """(start, end) of the tiles along one axis, in LQ pixels; neighbours share OVERLAP pixels."""
    starts = range(0, max(side - OVERLAP, 1), tile - OVERLAP)
    return [(start, min(start + tile, side)) for start in starts]


def ramp(start: int, end: int, side: int, scale: int) -> Tensor:
    """Weight of a tile along one axis, (scale * (end - start),); the weights of all tiles sum to 1.

    start, end, side: of the tile and of the image, in LQ pixels
    """
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
    for (top, bottom), (left, right) in progress(boxes, "tiles", unit="tile", leave=False,
                                                 disable=quiet):
        sr = net(lq[..., top:bottom, left:right]).float().cpu()
        weight = ramp(top, bottom, h, scale)[:, None] * ramp(left, right, w, scale)
        total[..., scale * top : scale * bottom, scale * left : scale * right] += sr * weight
    return total
