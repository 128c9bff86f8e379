"""The data of tools/tune.py: photos split by content, crops of them, and their degradations."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from models.checkpoint import one_line, replacing, sha256
from models.degradations import apply_degradation, degrade_patch, draw_degradation
from models.flags import refuse
from models.images import LUMA, PHOTOS, by_stem, describe_folder, list_images, write_png
from models.photos import photo_size, read_shrunk
from models.progress import progress

CROP = 256  # pixels of the crops of test and validation
WHOLE = 768  # pixels per side, at most, of the two test photos that the page shows whole, at 100 %


def split_photos(files: Iterable[Path]) -> dict[str, list[Path]]:
    """{"test", "val", "train": files}, by the hash of their content; equal files count once.

    A fifth each, four at least, to test and to validate. Raises ValueError for fewer than twelve.
    """
    by_hash = dict(sorted((sha256(file), file) for file in files))
    ordered, n = list(by_hash.values()), max(4, len(by_hash) // 5)
    if len(ordered) < 12:
        raise ValueError(f"{len(ordered)} different photos that can be used; at least 12 are "
                         "needed: 4 to test, 4 to validate, 4 to train")
    return {"test": ordered[:n], "val": ordered[n : 2 * n], "train": ordered[2 * n :]}


def usable_photos(folder: Path, patch_size: int, shrink: int = 1) -> list[Path]:
    """The photos that are large enough; lines tell of the others.

    shrink: photos are used at 1 / shrink of their sides
    Raises ValueError for files that are no photos by their headers, and for two of one name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of photos")
    files, others = list_images(folder, PHOTOS)
    sizes = {file: photo_size(file) for file in files}
    side = max(CROP, patch_size) * shrink
    large = [file for file in files if min(sizes[file]) >= side]
    small = len(files) - len(large)
    print(describe_folder(folder, files, others)
          + (f"; {small} smaller than {side} pixels, left out" if small else ""), flush=True)
    refuse(by_stem(large)[1])  # crops and tables go by the name without suffix
    return large


def read_all(files: Iterable[Path]) -> None:
    """Decode photos once. Raises ValueError with a line for each broken one."""
    problems = []
    for file in progress(list(files), "reading", unit="photo"):
        try:
            read_shrunk(file, 1)
        except (OSError, ValueError) as error:
            problems.append(one_line(error))
    refuse(problems)


def detailed_corners(image: np.ndarray, count: int = 2) -> list[tuple[int, int]]:
    """(top, left) of the `count` crops with most detail that do not overlap, multiples of 4."""
    from paper.noise import window_sums

    luma = image.astype(np.float64) @ LUMA
    edges = np.abs(np.diff(luma, axis=0, append=luma[-1:])) + np.abs(
        np.diff(luma, axis=1, append=luma[:, -1:]))
    step = 32  # pixels
    found = [(value, y * step, x * step)
             for (y, x), value in np.ndenumerate(window_sums(edges, CROP, step))]
    corners: list[tuple[int, int]] = []
    for _, top, left in sorted(found, reverse=True):
        if len(corners) < count and all(abs(top - t) >= CROP or abs(left - x) >= CROP
                                        for t, x in corners):
            corners.append((top, left))
    return corners


def write_crops(files: list[Path], folder: Path, degradation: str, shrink: int) -> None:
    """gt/NAME.png and lq/NAME.png of each photo's crops; what is there is kept."""
    for k, file in enumerate(progress(files, folder.name, unit="photo")):
        names = [(folder / "gt" / f"{file.stem}_{i}.png", folder / "lq" / f"{file.stem}_{i}.png")
                 for i in range(2)]
        if all(name.is_file() for pair in names for name in pair):
            continue
        image = read_shrunk(file, shrink)
        for i, (top, left) in enumerate(detailed_corners(image)):
            gt_file, lq_file = names[i]
            write_png(gt_file, image[top : top + CROP, left : left + CROP])
            rng = np.random.default_rng((k, i))
            write_png(lq_file, degrade_patch(image, top, left, CROP, rng, degradation))


def write_whole(files: list[Path], folder: Path, degradation: str, shrink: int) -> None:
    """gt/NAME_whole.png and lq/NAME_whole.png of each photo, reduced if it is larger than WHOLE."""
    for k, file in enumerate(files):
        gt_file, lq_file = (folder / kind / f"{file.stem}_whole.png" for kind in ("gt", "lq"))
        if gt_file.is_file() and lq_file.is_file():
            continue
        image = Image.fromarray(read_shrunk(file, shrink))
        image.thumbnail((WHOLE, WHOLE), Image.Resampling.LANCZOS)  # never enlarges
        gt = np.asarray(image)[: image.height // 4 * 4, : image.width // 4 * 4]
        rng = np.random.default_rng((k, 2))  # the crops have 0 and 1
        write_png(gt_file, gt)
        write_png(lq_file, apply_degradation(gt, draw_degradation(rng, degradation), rng))


def make_data(parts: dict[str, list[Path]], work: Path, degradation: str, shrink: int = 1) -> None:
    """work/train with the photos, work/val and work/test with crops at 1 / shrink of their sides.

    work/split.json, written first, tells what belongs there. Raises ValueError for a folder of
    other photos or settings, for one that this did not make, and for broken photos.
    """
    listing = {name: [f"{file.name} {sha256(file)}" for file in part]
               for name, part in parts.items()} | {"degradation": degradation}
    if shrink > 1:
        listing["shrink"] = shrink
    record = work / "split.json"
    if record.is_file():
        check_record(record, listing)
    else:
        if taken := [part for part in parts if (work / part).exists()]:
            raise ValueError(f"{work}: has a folder {taken[0]} of other origin; give another "
                             "--work")
        read_all(file for part in parts.values() for file in part)
        work.mkdir(parents=True, exist_ok=True)
        with replacing(record) as temporary:
            temporary.write_text(json.dumps(listing, indent=1))
    (work / "train").mkdir(exist_ok=True)
    for file in parts["train"]:
        if not (work / "train" / file.name).is_file():
            with replacing(work / "train" / file.name) as temporary:
                shutil.copyfile(file, temporary)
    for part in ("val", "test"):
        write_crops(parts[part], work / part, degradation, shrink)
    write_whole(parts["test"][:2], work / "test", degradation, shrink)


def check_record(record: Path, listing: dict) -> None:
    """ValueError if a work folder's split.json tells of other photos or settings than `listing`."""
    work = record.parent
    try:
        made = json.loads(record.read_text())
    except ValueError as error:
        raise ValueError(f"{record}: damaged; delete {work}, or give another --work") from error
    if made != listing:
        why = "of other photos"
        if made.get("shrink") != listing.get("shrink"):
            why = "with another --shrink"
        if made.get("degradation") != listing["degradation"]:
            why = "for another kind of network"
        raise ValueError(f"{work}: made {why}; give another --work and --out, or delete it")


def list_crops(work: Path, part: str = "test") -> list[Path]:
    """LQ files of the crops of "test" or "val", without the whole photos."""
    return sorted((work / part / "lq").glob("*_[01].png"))
