"""Multi-GT training and test sets: layout, label vote (HGGT, CVPR 2023; paper Sec. 3.2, 4).

A set is one original ground truth and its enhanced versions. Four layouts are read:

    ROOT/Train/images/<range>/{original,01,02,03,04}/  HGGT train; Train/labels/<range>/{A,B,C}/
    ROOT/images/{original,01,02,03,04}/                HGGT Test-100; ROOT/labels/{A,B,C}/
    ROOT/{original,ANY,...}/                           your own multi-GT set, no labels
    ROOT/*                                             a flat folder: every photo is its own set

Files are NAME.png in `original` (or `Original`), all NAME_01.png or all NAME.png in folder 01, and
so on; labels are one NAME.json per annotator. Images are 8-bit RGB PNG; those of a flat folder may
be any photo that models/photos.py reads. tools/enhance.py makes the third layout from plain images.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.checkpoint import file_stamp, is_settled, read_text, replacing
from models.distributed import rank_and_world
from models.images import (
    PHOTOS,
    by_stem,
    count_kinds,
    describe_folder,
    is_plain_png,
    is_system_file,
    list_images,
    png_size,
    read_rgb,
)
from models.progress import progress

ANNOTATORS = ("A", "B", "C")
LABEL_VALUES = {"positive": 1, "similar": 0, "negative": -1}
INDEX_FILE = ".multi_gt_index.json"
LAYOUT_HELP = "expected Train/images/<range>/original, images/original, original, photos in it"


@dataclass
class MultiGT:
    """An indexed multi-GT set of n sets with K images each."""

    root: str
    names: list[str]  # n
    paths: list[list[str]]  # n x K, the original first
    labels: np.ndarray | None  # (n, K) int8: +1 positive, 0 similar, -1 negative; original 0
    sizes: np.ndarray  # (n, 2) height, width in pixels, as `read` gives them
    shrink: int = 1  # photos of a flat folder are read at 1 / shrink of their sides

    @property
    def is_flat(self) -> bool:
        """Whether it is a flat folder, whose images may be photos of any kind."""
        return bool(self.paths) and len(self.paths[0]) == 1

    def read(self, path: str) -> np.ndarray:
        """Decode one of the images to uint8 (H, W, 3). Raises ValueError naming it."""
        if not self.is_flat:
            return read_rgb(path)
        from models.photos import read_shrunk  # and torch, which paper/ does without

        return read_shrunk(path, self.shrink)

    def subset(self, rows: np.ndarray, shrink: int | None = None) -> "MultiGT":
        """The sets of these rows; of a flat folder also smaller images, at 1 / shrink."""
        shrink = shrink or self.shrink
        return MultiGT(self.root, [self.names[i] for i in rows], [self.paths[i] for i in rows],
                       None if self.labels is None else self.labels[rows],
                       self.sizes[rows] // (shrink // self.shrink), shrink)


def vote(labels: list[str]) -> str:
    """Final label of one enhanced GT from its three annotators (HGGT; paper Sec. 3.2).

    labels: three of "positive", "similar", "negative", any order.
    Returns the majority label; "similar" when all three differ.
    Raises ValueError naming the first unknown label, or the count if it is not three.
    """
    if len(labels) != 3:
        raise ValueError(f"{len(labels)} labels, not three")
    for label in labels:
        if label not in LABEL_VALUES:
            raise ValueError(f"unknown label {label!r}; use {', '.join(LABEL_VALUES)}")
    winner = max(LABEL_VALUES, key=labels.count)
    return winner if labels.count(winner) >= 2 else "similar"


# ---------------------------------------------------------------------------------- labels


def read_votes(path: str | Path, folders: list[str]) -> list[str]:
    """One annotator's labels for the enhanced GTs of one set, in the order of `folders`.

    Raises ValueError naming the file for malformed JSON, an absent member or an unknown label.
    """
    try:
        pictures = json.loads(read_text(path))
        by_folder = {
            str(p["File"]): p["Label"]
            for key, p in pictures.items()
            if key.startswith("Picture_") and p["Label"] is not None
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"malformed label JSON ({error}); see docs/data.md"
        raise ValueError(f"{path}: {reason}") from error
    labels = []
    for folder in folders:
        if folder not in by_folder:
            raise ValueError(f"{path}: no label for member {folder}")
        label = str(by_folder[folder]).lower()
        if label not in LABEL_VALUES:
            raise ValueError(
                f"{path}: unknown label {by_folder[folder]!r} for member {folder}; "
                "use Positive, Similar or Negative"
            )
        labels.append(label)
    return labels


# ---------------------------------------------------------------------------------- layouts


def is_flat_folder(root: str | Path) -> bool:
    """Whether a data folder is a flat one, of photos. Raises as `index_sets`."""
    folders = _image_folders(Path(root))
    return folders == [Path(root)] and _original_folder(folders[0]) is None


def _original_folder(folder: Path) -> Path | None:
    for name in ("original", "Original"):  # HGGT's own configs spell it both ways
        if (folder / name).is_dir():
            return folder / name
    return None


def _image_folders(root: Path) -> list[Path]:
    """The folders that hold `original`, or [root] for a flat folder."""
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; {LAYOUT_HELP}")
    if not root.is_dir():
        raise ValueError(f"{root}: is a file, not a data folder; {LAYOUT_HELP}")
    for top in (root / "Train" / "images", root / "images", root):
        if not top.is_dir():
            continue
        if _original_folder(top):
            return [top]
        ranges = sorted(d for d in top.iterdir() if d.is_dir() and _original_folder(d))
        if ranges:
            return ranges
    photos, others = list_images(root, PHOTOS)
    if photos:
        return [root]
    if others:
        raise ValueError(f"{root}: {count_kinds(others)}; convert them to PNG, JPEG, WebP or TIFF")
    raise ValueError(f"{root}: no images found; {LAYOUT_HELP}")


def _label_folder(images: Path) -> Path | None:
    """Train/images/<range> -> Train/labels/<range>; None where no labels folder exists."""
    parts = list(images.parts)
    if "images" not in parts:
        return None
    last = len(parts) - 1 - parts[::-1].index("images")
    if not Path(*parts[:last], "labels").is_dir():
        return None
    return Path(*parts[:last], "labels", *parts[last + 1 :])


def _member_folders(images: Path, labels: Path | None, problems: list[str]) -> list[Path]:
    """The folders of a set's images, the original's first; [images] for a flat folder."""
    original = _original_folder(images)
    if original is None:
        return [images]
    if labels is not None:  # HGGT: exactly these members are labelled
        enhanced = [images / name for name in ("01", "02", "03", "04")]
        problems += [f"{folder}: folder of enhanced GTs is missing"
                     for folder in enhanced if not folder.is_dir()]
        return [original, *(folder for folder in enhanced if folder.is_dir())]
    enhanced = sorted(d for d in images.iterdir() if d.is_dir() and d != original
                      and d.name != "labels" and not is_system_file(d.name))
    if not enhanced:
        problems.append(f"{images}: only {original.name}/, no folder of enhanced GTs beside it")
    return [original, *enhanced]


def _ending(folder: Path, files: dict[str, Path], names: list[str]) -> str:
    """What follows a set's name in the files of a folder of enhanced GTs: "_01" or nothing.

    Most files decide: in a folder "a", x_a.png alone may be the enhanced x or the enhanced x_a.
    """
    long, short = (sum(name + end in files for name in names) for end in (f"_{folder.name}", ""))
    return f"_{folder.name}" if long > short else ""


# ---------------------------------------------------------------------------------- index


class _Set(NamedTuple):
    name: str
    paths: list[str]  # the original first
    size: tuple[int, int]  # height, width
    votes: list[list[str]] | None  # each annotator's labels of the enhanced GTs


def _scan(images: Path, problems: list[str]) -> Iterator[_Set]:
    """Yield the complete sets of one image folder; append what is wrong to `problems`."""
    labels = _label_folder(images) if _original_folder(images) else None
    original, *enhanced = _member_folders(images, labels, problems)
    files = {folder: _files_of(folder, not enhanced, problems) for folder in (original, *enhanced)}
    names = sorted(files[original])
    if not names:
        problems.append(f"{original}: no PNG images")
    endings = {original: ""}
    for folder in enhanced:
        endings[folder] = _ending(folder, files[folder], names)
        unpaired = files[folder].keys() - {name + endings[folder] for name in names}
        problems += [f"{files[folder][name]}: has no original in {original}"
                     for name in sorted(unpaired)]
    for name in progress(names, desc=f"index {images.name}", unit="set", delay=2, leave=False):
        problems_before = len(problems)
        paths, votes = [], None
        for folder, ending in endings.items():
            if name + ending in files[folder]:
                paths.append(str(files[folder][name + ending]))
            else:
                problems.append(f"{folder / (name + ending)}.png: missing member of set {name}")
        size = _common_size(paths, problems)
        if labels is not None:
            votes = _votes_of_set(labels, name, [folder.name for folder in enhanced], problems)
        if len(problems) == problems_before:
            yield _Set(name, paths, size, votes)


def _files_of(folder: Path, is_flat: bool, problems: list[str]) -> dict[str, Path]:
    """{name without suffix: file} of a folder's PNGs or, if flat, photos."""
    chosen, others = list_images(folder, PHOTOS) if is_flat else list_images(folder)
    files, taken = by_stem(chosen)
    problems += taken
    if not is_flat:  # what a flat folder leaves out, load_sets names
        problems += [f"{file}: not a PNG; convert it to 8-bit RGB PNG" for file in others]
    return files


def _common_size(paths: list[str], problems: list[str]) -> tuple[int, int] | None:
    """(height, width) of a set's images by their headers; None where one is unreadable."""
    size_of, sizes = _photo_size if len(paths) == 1 else png_size, []
    for path in paths:
        try:
            sizes.append(size_of(path))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if len(sizes) < len(paths) or not paths:
        return None
    height, width = sizes[0]
    problems += [f"{path}: {w}x{h}, its original is {width}x{height}"
                 for path, (h, w) in zip(paths, sizes, strict=True) if (h, w) != (height, width)]
    return height, width


def _photo_size(path: str) -> tuple[int, int]:
    """(height, width) of an image of a flat folder, once it is upright."""
    if is_plain_png(path):
        return png_size(path)
    from models.photos import photo_size  # and torch, which paper/ does without

    return photo_size(path)


def _votes_of_set(
    labels: Path, name: str, folders: list[str], problems: list[str]
) -> list[list[str]]:
    votes = []
    for annotator in ANNOTATORS:
        file = labels / annotator / f"{name}.json"
        if not file.is_file():
            problems.append(f"{file}: annotator {annotator} is missing for set {name}")
            continue
        try:
            votes.append(read_votes(file, folders))
        except ValueError as error:
            problems.append(str(error))
    return votes


def _disagreements(root: Path, found: list[_Set]) -> list[str]:
    """A line for each way in which the range folders do not fit together."""
    problems = []
    counts = {len(s.paths) for s in found}
    if len(counts) > 1:
        problems.append(f"{root}: range folders differ in their number of GTs ({sorted(counts)})")
    if len({s.votes is None for s in found}) > 1:
        problems.append(f"{root}: some range folders have labels and some have not")
    return problems


def _final_labels(found: list[_Set]) -> np.ndarray | None:
    """(n, K) int8 by the annotators' vote, the original 0; None without labels."""
    if not found or any(s.votes is None for s in found) or len({len(s.paths) for s in found}) > 1:
        return None
    voted = [[vote(list(member)) for member in zip(*s.votes, strict=True)] for s in found]
    return np.array([[0] + [LABEL_VALUES[label] for label in row] for row in voted], np.int8)


def _listing(root: Path, folders: list[Path]) -> str | None:
    """Checksum of path and stamp of every file under the data folders, as the index needs them.

    None if a file changed so lately that the next change may get the same stamp.
    """
    digest, pending, settled, now = hashlib.sha256(), [*map(str, folders)], True, time.time_ns()
    while pending:
        folder = pending.pop()
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.is_dir() and not is_system_file(entry.name):
                pending.append(entry.path)
            elif not is_system_file(entry.name):
                try:
                    stamp = file_stamp(entry.stat())
                except OSError:  # a broken link, which the index names
                    return None
                settled &= is_settled(stamp, now)
                digest.update(os.fsencode(f"{os.path.relpath(entry.path, root)}\0{stamp}\n"))
    return digest.hexdigest() if settled else None


def _read_index(root: Path, listing: str | None) -> MultiGT | None:
    """The stored index, if there is an intact one of exactly these files."""
    try:
        checksum, _, text = (root / INDEX_FILE).read_text(encoding="ascii").partition("\n")
        stored = json.loads(text) if checksum == _checksum(text) else {"listing": None}
        if listing is None or stored["listing"] != listing:
            return None
        paths = [[os.path.join(root, path) for path in row] for row in stored["paths"]]
        labels = None if stored["labels"] is None else np.array(stored["labels"], np.int8)
        return MultiGT(str(root), stored["names"], paths, labels, np.array(stored["sizes"]))
    except Exception:  # none, or not one of ours: it is made anew
        return None


def _write_index(sets: MultiGT, listing: str) -> None:
    """Write the index: a line with the checksum of what follows, which is JSON."""
    text = json.dumps({
        "listing": listing,
        "names": sets.names,
        "paths": [[os.path.relpath(path, sets.root) for path in row] for row in sets.paths],
        "labels": None if sets.labels is None else sets.labels.tolist(),
        "sizes": sets.sizes.tolist(),
    })
    with replacing(Path(sets.root, INDEX_FILE)) as temporary:
        temporary.write_text(f"{_checksum(text)}\n{text}", encoding="ascii", newline="\n")


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode('ascii')):08x}"


def index_sets(root: str | Path) -> tuple[MultiGT, list[str]]:
    """The complete sets of a data folder, and a line for each problem.

    The index of a folder without problems is kept in ROOT/.multi_gt_index.json under a checksum of
    all files' names, sizes, times and inodes, because opening HGGT's 60,000 label files again is
    slow. Raises FileNotFoundError or ValueError if the folder has none of the layouts.
    """
    root = Path(root)
    folders = _image_folders(root)
    label_folders = [f for f in map(_label_folder, folders) if f and f.is_dir()]
    listing = _listing(root, folders + label_folders)
    stored = _read_index(root, listing)
    if stored is not None:
        return stored, []
    problems: list[str] = []
    found = [s for folder in folders for s in _scan(folder, problems)]
    problems += _disagreements(root, found)
    sets = MultiGT(
        root=str(root),
        names=[s.name for s in found],
        paths=[s.paths for s in found],
        labels=_final_labels(found),
        sizes=np.array([s.size for s in found]).reshape(-1, 2),
    )
    if not problems and listing:
        with contextlib.suppress(OSError):  # every run indexes a read-only data folder again
            _write_index(sets, listing)
    return sets, problems


def load_sets(root: str | Path) -> MultiGT:
    """The index of a data folder without problems; a line tells what a flat folder holds.

    Raises ValueError with the first problem and the count of the others.
    """
    sets, problems = index_sets(root)
    if sets.is_flat and rank_and_world()[0] == 0:
        print(describe_folder(root, *list_images(root, PHOTOS)))
    if problems:
        others = f" (and {len(problems) - 1} more; see python -m tools.check --data {root})"
        raise ValueError(problems[0] + others * (len(problems) > 1))
    return sets


def check_data(root: str | Path) -> list[str]:
    """Index, decode every image, print counts, sizes and the label histogram; return problems."""
    sets, problems = index_sets(root)
    if sets.is_flat:
        print(describe_folder(root, *list_images(root, PHOTOS)))
    for path in progress([p for row in sets.paths for p in row], desc="decode", unit="image",
                         delay=2):
        try:
            sets.read(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    print(f"{root}: {len(sets.names)} sets of {len(sets.paths[0]) if sets.paths else 0} images")
    shapes, counts = np.unique(sets.sizes, axis=0, return_counts=True)
    for (height, width), count in zip(shapes, counts, strict=True):
        print(f"  {width}x{height}: {count} sets")
    if sets.labels is None:
        print("  no labels (samplers upos and smp need them)")
    else:
        enhanced = sets.labels[:, 1:]
        for label, value in LABEL_VALUES.items():
            per_member = " ".join(str(int(c)) for c in (enhanced == value).sum(0))
            print(f"  {label}: {int((enhanced == value).sum())} (by member: {per_member})")
        print(f"  sets without a positive: {int((enhanced != 1).all(1).sum())}, "
              f"with a negative: {int((enhanced == -1).any(1).sum())}")
    for problem in problems:
        print(f"  WRONG: {problem}")
    print(f"  {len(problems)} problems")
    return problems
