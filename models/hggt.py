"""Multi-GT training and test sets: layout, label vote (HGGT, CVPR 2023; paper Sec. 3.2, 4).

A set is one original ground truth and its enhanced versions. Four layouts are understood:

    ROOT/Train/images/<range>/{original,01,02,03,04}/  HGGT train; Train/labels/<range>/{A,B,C}/
    ROOT/images/{original,01,02,03,04}/                HGGT Test-100; ROOT/labels/{A,B,C}/
    ROOT/{original,ANY,...}/                           one's own multi-GT set, no labels
    ROOT/*.png                                         a flat folder: every image is its own set

Files are NAME.png in `original` (or `Original`), all NAME_01.png or all NAME.png in folder 01, and
so on; labels are one NAME.json per annotator. Images are 8-bit RGB PNG. The third layout is made of
plain images and restoration networks by

    python models/hggt.py enhance HR_FOLDER OUT --with a.pth b.pth [--crop 512]
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kornia_rs.io import decode_image_png_u8
from PIL import Image, ImageOps
from tqdm import tqdm

ANNOTATORS = ("A", "B", "C")
LABEL_VALUES = {"positive": 1, "similar": 0, "negative": -1}
INDEX_FILE = ".multi_gt_index.json"
LAYOUT_HELP = "expected Train/images/<range>/original, images/original, original, *.png in it"
RECORD_FILE = "enhance.json"  # which checkpoints a made set is of
PHOTO_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")  # Pillow's names


@dataclass
class MultiGT:
    """An indexed multi-GT set of n sets with K images each."""

    root: str
    names: list[str]  # n
    paths: list[list[str]]  # n x K, the original first
    labels: np.ndarray | None  # (n, K) int8: +1 positive, 0 similar, -1 negative; original 0
    sizes: np.ndarray  # (n, 2) height, width in pixels


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


# ---------------------------------------------------------------------------------- files


def png_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an 8-bit RGB PNG from its header and trailer alone, without decoding.

    Raises ValueError naming the file if it is no PNG, truncated, or not 8-bit RGB.
    """
    with open(path, "rb") as file:
        head = file.read(33)
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 12))
        tail = file.read(12)
    size = _size_in_header(path, head)
    if tail[4:8] != b"IEND":
        raise ValueError(f"{path}: truncated PNG; copy it again")
    return size


def _size_in_header(path: str | Path, head: bytes) -> tuple[int, int]:
    if head[:8] != b"\x89PNG\r\n\x1a\n" or zlib.crc32(head[12:29]).to_bytes(4, "big") != head[29:]:
        raise ValueError(f"{path}: not a PNG file; convert it to 8-bit RGB PNG")
    width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
    if (bits, colour) != (8, 2):
        kind = {0: "grey", 2: "RGB", 3: "palette", 4: "grey+alpha", 6: "RGBA"}.get(colour, "?")
        raise ValueError(f"{path}: {bits}-bit {kind} PNG; convert it to 8-bit RGB")
    return height, width


def read_rgb(path: str | Path, rows: int | None = None) -> np.ndarray:
    """Decode one 8-bit RGB PNG to uint8 (H, W, 3). Raises ValueError naming the file.

    rows: decode only that many from the top, if it has more; takes as much less time
    """
    data = Path(path).read_bytes()
    height, width = _size_in_header(path, data[:33])
    if rows is not None and rows < height and data[28] == 0:  # 0: not interlaced
        height = rows  # cut short by a header of fewer rows
        head = data[12:20] + rows.to_bytes(4, "big") + data[24:29]
        data = data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]
    try:  # a third of Pillow's time
        return decode_image_png_u8(data, (height, width), "rgb")
    except Exception as error:  # it has no type of its own
        raise ValueError(f"{path}: unreadable image ({error}); copy it again") from error


def _write(path: Path, data: bytes) -> None:
    """Write a file so that `path` is at every moment the old file or the complete new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not name the file
        raise OSError(f"{path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_votes(path: str | Path, folders: list[str]) -> list[str]:
    """One annotator's labels for the enhanced GTs of one set, in the order of `folders`.

    Raises ValueError naming the file for malformed JSON, an absent member or an unknown label.
    """
    try:
        with open(path, encoding="utf-8") as file:
            pictures = json.load(file)
        by_folder = {
            str(p["File"]): p["Label"]
            for key, p in pictures.items()
            if key.startswith("Picture_") and p["Label"] is not None
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"malformed label JSON ({error}); see Data in README.md"
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


# ---------------------------------------------------------------------------------- index


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
    if any(root.glob("*.png")):
        return [root]
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


def _listing(root: Path, folders: list[Path]) -> str:
    """Checksum of every file's path relative to root, size and time under the data folders."""
    digest = hashlib.sha256()
    pending = [str(f) for f in folders]
    while pending:
        folder = pending.pop()
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.is_dir():
                pending.append(entry.path)
            elif entry.name.endswith((".png", ".json")) and not entry.name.startswith("."):
                stat = entry.stat()
                name = os.path.relpath(entry.path, root)
                digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _scan(images: Path, problems: list[str]) -> Iterator[tuple[str, list[str], tuple, list | None]]:
    """Yield (name, paths, size, votes) per set of one image folder; note what is wrong."""
    original = _original_folder(images)
    labels = _label_folder(images) if original else None
    if original is None:  # a flat folder
        original, others = images, []
    elif labels is not None:  # HGGT: exactly these members are labelled
        others = [images / name for name in ("01", "02", "03", "04")]
    else:
        others = sorted(
            d for d in images.iterdir()
            if d.is_dir() and d != original and d.name != "labels" and not d.name.startswith(".")
        )
        if not others:
            problems.append(f"{images}: only {original.name}/, no folder of enhanced GTs beside it")
    for folder in others:
        if not folder.is_dir():
            problems.append(f"{folder}: folder of enhanced GTs is missing")
    others = [folder for folder in others if folder.is_dir()]
    files = {folder: {e.name for e in os.scandir(folder)} for folder in [original, *others]}
    names = sorted(f[:-4] for f in files[original] if f.endswith(".png") and f[0] != ".")
    if not names:
        problems.append(f"{original}: no PNG images")
    suffix = {}
    for folder in others:
        # By what most files are: in a folder "a", x_a.png alone may be x's or x_a's
        end = f"_{folder.name}.png"
        cut = sum(f"{name}{end}" in files[folder] for name in names)
        suffix[folder] = end if cut > sum(f"{n}.png" in files[folder] for n in names) else ".png"
        for file in sorted(files[folder] - {name + suffix[folder] for name in names}):
            if file.endswith(".png") and file[0] != ".":
                problems.append(f"{folder / file}: has no original in {original}")
    for name in tqdm(names, desc=f"index {images.name}", unit="set", delay=2, leave=False):
        found = len(problems)
        paths = [str(original / f"{name}.png")]
        for folder in others:
            paths.append(str(folder / f"{name}{suffix[folder]}"))
            if os.path.basename(paths[-1]) not in files[folder]:
                problems.append(f"{paths.pop()}: missing member of set {name}")
        sizes = []
        for path in paths:
            try:
                sizes.append(png_size(path))
            except (ValueError, OSError) as error:
                problems.append(str(error))
        for path, size in zip(paths, sizes, strict=False):
            if len(sizes) == len(paths) and size != sizes[0]:
                problems.append(f"{path}: {size[1]}x{size[0]}, its original is "
                                f"{sizes[0][1]}x{sizes[0][0]}")
        votes = None
        if labels is not None:
            votes = []
            for annotator in ANNOTATORS:
                file = labels / annotator / f"{name}.json"
                if not file.is_file():
                    problems.append(f"{file}: annotator {annotator} is missing for set {name}")
                    continue
                try:
                    votes.append(read_votes(file, [folder.name for folder in others]))
                except ValueError as error:
                    problems.append(str(error))
        if len(problems) == found:
            yield name, paths, sizes[0], votes


def index_sets(root: str | Path) -> tuple[MultiGT, list[str]]:
    """One pass over a data folder: every set that is whole, and a line for all that is wrong.

    The index of a sound folder is kept in ROOT/.multi_gt_index.json under a checksum of all file
    names, sizes and times, because opening HGGT's 60,000 label files again is slow.
    Raises FileNotFoundError or ValueError if the folder has none of the layouts.
    """
    root = Path(root)
    folders = _image_folders(root)
    labelled = [f for f in map(_label_folder, folders) if f and f.is_dir()]
    checksum = _listing(root, folders + labelled)
    cache = root / INDEX_FILE
    try:
        stored = json.loads(cache.read_text())
        if stored["listing"] == checksum:
            labels = None if stored["labels"] is None else np.array(stored["labels"], np.int8)
            paths = [[os.path.join(root, p) for p in row] for row in stored["paths"]]
            return MultiGT(str(root), stored["names"], paths, labels, np.array(stored["sizes"])), []
    except (OSError, ValueError, KeyError):
        pass  # no cache yet, or an unreadable one: index again
    problems: list[str] = []
    rows = [row for folder in folders for row in _scan(folder, problems)]
    counts = {len(row[1]) for row in rows}
    if len(counts) > 1:
        problems.append(f"{root}: range folders differ in their number of GTs ({sorted(counts)})")
    unlabelled = [row[0] for row in rows if row[3] is None]
    if unlabelled and len(unlabelled) < len(rows):
        problems.append(f"{root}: some range folders have labels and some have not")
    labels = None
    if rows and not unlabelled:
        members = [[vote(list(v)) for v in zip(*row[3], strict=True)] for row in rows]
        labels = np.array([[0] + [LABEL_VALUES[m] for m in row] for row in members], np.int8)
    sets = MultiGT(
        root=str(root),
        names=[row[0] for row in rows],
        paths=[row[1] for row in rows],
        labels=labels,
        sizes=np.array([row[2] for row in rows]).reshape(-1, 2),
    )
    if not problems:
        stored = {
            "listing": checksum,
            "names": sets.names,
            "paths": [[os.path.relpath(p, root) for p in row] for row in sets.paths],
            "labels": None if labels is None else labels.tolist(),
            "sizes": sets.sizes.tolist(),
        }
        with contextlib.suppress(OSError):  # a read-only data folder is indexed anew by every run
            _write(cache, json.dumps(stored).encode())
    return sets, problems


def load_sets(root: str | Path) -> MultiGT:
    """The index of a sound data folder.

    Raises ValueError with the first problem and the count of the others.
    """
    sets, problems = index_sets(root)
    if problems:
        more = f" (and {len(problems) - 1} more; see --check-data)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return sets


def check_data(root: str | Path) -> list[str]:
    """Index, decode every image, print counts, sizes and the label histogram; return problems."""
    sets, problems = index_sets(root)
    for path in tqdm([p for row in sets.paths for p in row], desc="decode", unit="image", delay=2):
        try:
            read_rgb(path)
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


# ---------------------------------------------------------------------------------- one's own


def enhance(
    folder: str | Path, out: str | Path, checkpoints: Sequence[str | Path], crop: int | None = None
) -> MultiGT:
    """Make a set without labels of plain images: OUT/original/, and OUT/STEM/ per checkpoint.

    folder: 8-bit RGB images (PNG, JPEG, WebP, TIFF); written upright, without colour profiles.
    checkpoints: files that spandrel reads, of networks from RGB to RGB, whatever their scale.
    crop: side in pixels of the patches to cut the images into; None: whole images.
    What exists in `out` is kept: the same call goes on after an interruption, and further images or
    checkpoints may be given; until it ends, index_sets reports what is missing.
    Raises ValueError or OSError, before any work if a header or a checkpoint is bad.
    """
    if not importlib.util.find_spec("spandrel"):
        raise ValueError("reading restoration checkpoints needs: pip install spandrel")
    folder, out, files = Path(folder), Path(out), {}
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out}: lies in the folder of HR images; give another OUT")
    for path in map(Path, checkpoints):
        if path.stem.lower() in ("original", "labels") or path.stem.startswith("."):
            raise ValueError(f"--with {path}: no name for a folder of enhanced GTs; rename it")
        if files.setdefault(path.stem, path) is not path:
            raise ValueError(f"--with {files[path.stem]} {path}: the same name; rename one")
    if absent := [path for path in files.values() if not path.is_file()]:
        raise FileNotFoundError(f"--with {absent[0]}: no such file")
    photos = _find_photos(folder, crop)
    digests = {n: hashlib.sha256(path.read_bytes()).hexdigest() for n, path in files.items()}
    record = {"crop": crop, "checkpoints": {}}
    if (out / RECORD_FILE).exists():
        try:
            record = json.loads((out / RECORD_FILE).read_text())
            record["crop"], dict(record["checkpoints"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{out / RECORD_FILE}: is damaged; give another OUT") from error
    elif out.exists() and any(p.name[0] != "." for p in out.iterdir()):
        raise ValueError(f"{out}: holds files of another origin; give a new or empty folder")
    if record["crop"] != crop:
        before = f"--crop {record['crop']}" if record["crop"] else "no --crop"
        raise ValueError(f"{out}: was made with {before}; give the same, or another OUT")
    for name in files:
        if (out / name).exists() and record["checkpoints"].get(name) != digests[name]:
            raise ValueError(f"{out / name}: is of another checkpoint than {files[name]}; rename "
                             "this one, or delete that folder")
    nets = {name: _load_network(path) for name, path in files.items()}

    out.mkdir(parents=True, exist_ok=True)
    record["checkpoints"] |= digests
    _write(out / RECORD_FILE, json.dumps(record, indent=1).encode())
    for name in ("original", *nets):  # all before the first image: what is missing gets noticed
        (out / name).mkdir(exist_ok=True)
    for path in tqdm(photos, desc="original", unit="image"):
        for name, image in _patches(path, crop):
            target = out / "original" / f"{name}.png"
            if not target.exists():
                _write_png(target, image)
                continue
            before = read_rgb(target).astype(np.int16)  # 4: another JPEG decoder rounds differently
            if before.shape != image.shape or np.abs(before - image).max() > 4:
                raise ValueError(f"{path}: {target} is of another image; rename this one, or give "
                                 "another OUT")
    originals = sorted(p for p in (out / "original").glob("*.png") if p.name[0] != ".")
    todo = [(n, p) for n in nets for p in originals if not (out / n / p.name).exists()]
    total = len(nets) * len(originals)
    for name, path in tqdm(todo, "enhance", total, unit="image", initial=total - len(todo)):
        image = read_rgb(path)
        try:
            _write_png(out / name / path.name, _enhanced(nets[name], image))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"{path}: {files[name]} failed at {image.shape[1]}x{image.shape[0]} pixels "
                f"({_short(error)}); if memory is short, give --crop "
                f"{crop // 2 if crop else 512} and another OUT") from error
    return load_sets(out)


def _find_photos(folder: Path, crop: int | None) -> list[Path]:
    """All files of a folder; by their headers RGB images, no smaller than `crop`, or ValueError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of HR images")
    if crop:
        Image.MAX_IMAGE_PIXELS = None  # the user's own; a large one is no attack
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != ".")
    problems, stems = [] if paths else [f"{folder}: no images in it"], {}
    for path in paths:
        try:
            with Image.open(path, formats=PHOTO_FORMATS) as image:
                bits = max(getattr(image, "tag_v2", {}).get(258, (8,)))  # of a TIFF
                if image.format == "PNG":
                    with open(path, "rb") as file:
                        bits = file.read(25)[24]
                if image.mode != "RGB" or bits > 8:
                    mode = f"{bits}-bit RGB" if image.mode == "RGB" else image.mode
                    problems.append(f"{path}: mode {mode}; convert it to 8-bit RGB")
                elif crop and min(image.size) < crop:
                    problems.append(f"{path}: is smaller than --crop {crop}; remove it")
        except Exception as error:  # a broken file makes Pillow raise almost anything
            problems.append(f"{path}: no readable PNG, JPEG, WebP or TIFF; remove it "
                            f"({_short(error)})")
        if stems.setdefault(path.stem, path) is not path:
            problems.append(f"{path}: would be {path.stem}.png as {stems[path.stem]}; rename one")
    if problems:
        raise ValueError("\n".join(problems))
    return paths


def _load_network(path: Path) -> Any:
    """spandrel's descriptor of a network from RGB to RGB, which has been run on a small image."""
    import torch
    from spandrel import ModelLoader

    try:
        loader = ModelLoader("cuda" if torch.cuda.is_available() else "cpu")
        if path.suffix == ".safetensors":
            state = loader.load_state_dict_from_file(path)
        else:  # spandrel itself would first try a .pt as a TorchScript program
            state = torch.load(path, map_location="cpu", weights_only=True)
        net = loader.load_from_state_dict(state)
        _enhanced(net, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    except Exception as error:  # a foreign file makes them raise almost anything
        raise ValueError(f"{path}: not a network from RGB to RGB that spandrel reads "
                         f"({_short(error)}); tiny ones of this project take the way through "
                         "evaluate.py --export x.pth") from error
    return net


def _enhanced(net: Any, image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) through a network of any scale, and back to its size."""
    import torch

    height, width = image.shape[:2]
    x = torch.tensor(image, device=net.device).permute(2, 0, 1)[None].float() / 255
    sr = net(x)[0]  # (3, sH, sW), clipped to [0, 1] by spandrel, in eval mode, without gradients
    if sr.shape != (3, net.scale * height, net.scale * width) or not sr.isfinite().all():
        raise RuntimeError("the output is not of its scale, or has NaN in it")
    sr = Image.fromarray(sr.mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
    # ASSUMED: Pillow's bicubic, whose filter widens with the scale; HGGT's own networks (RCAN, ELAN
    # without upsampling) leave nothing to resize.
    return np.asarray(sr.resize((width, height), Image.Resampling.BICUBIC))


def _patches(path: Path, crop: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """(NAME, upright image uint8 (H, W, 3)); with crop all (NAME_top_left, patch), evenly spaced
    and overlapping where a side is no multiple of it."""
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as file:
            image = np.asarray(ImageOps.exif_transpose(file))
    except Exception as error:
        raise ValueError(f"{path}: unreadable ({_short(error)}); copy it again") from error
    if crop is None:
        yield path.stem, image
        return
    counts = [-(-side // crop) for side in image.shape[:2]]
    for i, j in np.ndindex(*counts):
        top, left = (k * (side - crop) // max(n - 1, 1)
                     for k, n, side in zip((i, j), counts, image.shape[:2], strict=True))
        yield f"{path.stem}_{top}_{left}", image[top : top + crop, left : left + crop]


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _write_png(path: Path, image: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
    _write(path, buffer.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    """Make a set of one's own images: `enhance` as a command."""
    parser = argparse.ArgumentParser("python models/hggt.py", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="enhance")
    command = commands.add_parser(
        "enhance", help="make a multi-GT set of plain HR images, by restoration networks",
        allow_abbrev=False, description="Make a multi-GT set of plain HR images: OUT/original/ and "
        "a folder of enhanced GTs per checkpoint, for train_sr.py --data OUT --sampler amo. The "
        "same command goes on where it was interrupted; images and checkpoints may be added.")
    command.add_argument("folder", metavar="HR_FOLDER", help="8-bit RGB PNG, JPEG, WebP, TIFF")
    command.add_argument("out", metavar="OUT", help="folder of the set: new, or one to go on with")
    command.add_argument("--with", nargs="+", required=True, metavar="FILE", dest="checkpoints",
                         help="checkpoints that spandrel reads; each folder bears its file's name")
    command.add_argument("--crop", type=int, metavar="N", help="cut the images into N x N pixels, "
                         "for memory and fast decoding (HGGT's sets: 512; default: whole)")
    args = parser.parse_args(argv)
    if args.crop is not None and args.crop < 1:
        parser.error("--crop: give the patches' side in pixels, such as 512")
    sets = enhance(args.folder, args.out, args.checkpoints, args.crop)
    print(f"{sets.root}: {len(sets.names)} sets of {len(sets.paths[0])} images")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        if os.environ.get("DEBUG"):
            raise
        for line in str(problem).splitlines():
            print(f"models/hggt.py: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("models/hggt.py: stopped by a signal; the same command goes on", file=sys.stderr)
