"""Test sets of Tables 5 and 8: ground truths with their low-quality images (paper Sec. 5)."""

import glob
import os
from pathlib import Path

import numpy as np

from models.hggt import MultiGT, index_sets
from models.images import find_png, is_system_file, list_images, png_size, read_rgb

SCALE = 4

TestSet = tuple[MultiGT, list[str], list[str]]  # sets, the LQ file of each, a line per problem


def find_hggt_test(gt: str, lq: str) -> TestSet:
    """HGGT's Test-100, or any multi-GT folder, and a folder of LQ images NAME.png."""
    sets, problems = index_sets(gt)
    lq_files = [str(find_png(lq, name)) for name in sets.names]
    return sets, lq_files, problems + _check_pairs(sets, lq_files)


def find_realsr(root: str) -> TestSet:
    """RealSR v3's x4 pairs below a folder, the HR images as sets of one GT.

    Only folders that hold *_LR4.png count; below a whole RealSR, with Train/ and Test/, only Test/.
    An image is named by its path below the folder. Raises FileNotFoundError if there is none.
    """
    # ASSUMED: whole images under Test-100's protocol, the HR image as the one GT, both cameras in
    # one mean. The paper names the set and its 100 images, not the border, tiles or the mean.
    inside = [folder for folder in (Path(root), *Path(root).rglob("*")) if folder.is_dir()]
    images = [file for folder in inside
              if not any(map(is_system_file, folder.relative_to(root).parts))
              for file in list_images(folder)[0]]
    lq_of = {file.parent / file.stem.removesuffix("_LR4"): str(file)
             for file in images if file.stem.endswith("_LR4")}
    folders = {stem.parent for stem in lq_of}
    folders = {f for f in folders if "Test" in f.relative_to(root).parts} or folders
    gt_of = {file.parent / file.stem.removesuffix("_HR"): str(file)
             for file in images if file.stem.endswith("_HR") and file.parent in folders}
    if not gt_of:
        raise FileNotFoundError(f"{root}: no *_HR.png with *_LR4.png found; give the folder of "
                                "RealSR(V3) (--realsr)")
    stems = sorted(gt_of, key=lambda stem: gt_of[stem])
    sizes = np.array([png_size(gt_of[stem]) for stem in stems])
    sets = MultiGT(root, [os.path.relpath(stem, root) for stem in stems],
                   [[gt_of[stem]] for stem in stems], None, sizes)
    lq_files = [lq_of.get(stem, f"{stem}_LR4.png") for stem in stems]
    return sets, lq_files, _check_pairs(sets, lq_files, same_size="as in RealSR V1 and V2; get V3")


def _check_pairs(sets: MultiGT, lq_files: list[str], same_size: str = "") -> list[str]:
    """A line for each LQ image that is missing, unreadable or not a quarter of its GT.

    same_size: why an LQ image may be as large as its GT
    """
    problems = []
    for i, ((height, width), file) in enumerate(zip(sets.sizes.tolist(), lq_files, strict=True)):
        try:
            png_size(sets.paths[i][0])  # a flat folder may hold photos of other kinds
            h, w = read_rgb(file).shape[:2]
        except FileNotFoundError:
            others = glob.glob(f"{glob.escape(file.removesuffix('.png'))}.*")
            hint = f" ({others[0]} is no PNG; convert it to 8-bit RGB PNG)" if others else ""
            problems.append(f"{file}: no such LQ image{hint}")
            continue
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if (h, w) == (height, width) and same_size:
            problems.append(f"{file}: as large as its HR image, {same_size}")
        elif (h * SCALE, w * SCALE) != (height, width):
            problems.append(f"{file}: {w}x{h}, but its GT is {width}x{height}; the GT must be "
                            f"{SCALE} times as large")
    return problems
