"""Test sets of Tables 5 and 8: ground truths with their low-quality images (paper Sec. 5)."""

import os
from pathlib import Path

import numpy as np

from models.hggt import MultiGT, index_sets, png_size, read_rgb

SCALE = 4

TestSet = tuple[MultiGT, list[str], list[str]]  # sets, the LQ file of each, a line per problem


def find_hggt_test(gt: str, lq: str) -> TestSet:
    """HGGT's Test-100, or any multi-GT folder, and a folder of LQ images NAME.png."""
    sets, problems = index_sets(gt)
    lq_files = [os.path.join(lq, f"{name}.png") for name in sets.names]
    return sets, lq_files, problems + _check_pairs(sets, lq_files)


def find_realsr(root: str) -> TestSet:
    """RealSR v3's x4 pairs below a folder, the HR images as sets of one GT.

    Only folders that hold *_LR4.png count; below a whole RealSR, with Train/ and Test/, only Test/.
    An image is named by its path below the folder. Raises FileNotFoundError if there is none.
    """
    # ASSUMED: whole images under Test-100's protocol, the HR image as the one GT, both cameras in
    # one mean. The paper names the set and its 100 images, not the border, tiles or the mean.
    folders = {f.parent for f in Path(root).rglob("*_LR4.png")}
    folders = [f for f in folders if "Test" in f.relative_to(root).parts] or folders
    gts = sorted(gt for folder in folders for gt in folder.glob("*_HR.png"))
    if not gts:
        raise FileNotFoundError(f"{root}: no *_HR.png with *_LR4.png found; give the folder of "
                                "RealSR(V3) (--realsr)")
    stems = [str(gt).removesuffix("_HR.png") for gt in gts]
    names = [os.path.relpath(stem, root) for stem in stems]
    sizes = np.array([png_size(gt) for gt in gts])
    sets = MultiGT(root, names, [[str(gt)] for gt in gts], None, sizes)
    lq_files = [f"{stem}_LR4.png" for stem in stems]
    return sets, lq_files, _check_pairs(sets, lq_files, same_size="as in RealSR V1 and V2; get V3")


def _check_pairs(sets: MultiGT, lq_files: list[str], same_size: str = "") -> list[str]:
    """A line for each LQ image that is missing, unreadable or not a quarter of its GT.

    same_size: why an LQ image may be as large as its GT
    """
    problems = []
    for (height, width), file in zip(sets.sizes.tolist(), lq_files, strict=True):
        try:
            h, w = read_rgb(file).shape[:2]
        except (ValueError, OSError) as error:
            missing = isinstance(error, FileNotFoundError)
            problems.append(f"{file}: no such LQ image" if missing else str(error))
            continue
        if (h, w) == (height, width) and same_size:
            problems.append(f"{file}: as large as its HR image, {same_size}")
        elif (h * SCALE, w * SCALE) != (height, width):
            problems.append(f"{file}: {w}x{h}, but its GT is {width}x{height}; the GT must be "
                            f"{SCALE} times as large")
    return problems
