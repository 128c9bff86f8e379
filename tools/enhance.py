"""Make a multi-GT training set without labels from plain images, by restoration networks.

    python -m tools.enhance HR_FOLDER OUT --with a.pth b.pth [--crop 512]
    python train_sr.py --data OUT --sampler amo ...

In:  8-bit RGB images (PNG, JPEG, WebP, TIFF); checkpoints that spandrel reads, of networks from RGB
     to RGB, whatever their scale.
Out: OUT/original/NAME.png, upright, without colour profiles, and OUT/STEM/NAME.png per checkpoint
     STEM.pth, in the size of the original; OUT/enhance.json records the checkpoints and the crop.

Everything is checked before any work. Rerun the same command to resume; images and checkpoints may
be added. Until it has finished, models/hggt.py reports what is missing.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from models.checkpoint import one_line, read_text, replacing, sha256
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.hggt import MultiGT, load_sets
from models.images import is_system_file, open_image, read_rgb, write_png
from models.progress import progress

RECORD_FILE = "enhance.json"
TIFF_BITS_PER_SAMPLE = 258
LARGEST_DIFFERENCE = 4  # levels; another version of a JPEG decoder rounds differently


def enhance(
    folder: str | Path, out: str | Path, checkpoints: Sequence[str | Path], crop: int | None = None
) -> MultiGT:
    """Write the set of a folder of images into `out` and return its index.

    crop: side in pixels of the patches that the images are cut into; None: whole images.
    Images that exist in `out` are kept. Raises ValueError or OSError, before any work if an image's
    header, a checkpoint or `out` does not fit.
    """
    if not importlib.util.find_spec("spandrel"):
        raise ValueError("reading restoration checkpoints needs: pip install spandrel")
    folder, out = Path(folder), Path(out)
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out}: lies in the folder of HR images; give another OUT")
    files = name_folders(checkpoints)
    images = find_images(folder, crop)
    record = updated_record(out, files, crop)
    nets = {name: load_network(path) for name, path in files.items()}

    # The record and all folders come before the first image, so that gaps are noticed
    with replacing(out / RECORD_FILE) as temporary:
        temporary.write_text(json.dumps(record, indent=1))
    for name in ("original", *nets):
        (out / name).mkdir(exist_ok=True)
    for path in progress(images, desc="original", unit="image"):
        for name, image in patches(path, crop):
            save_original(path, image, out / "original" / f"{name}.png")
    enhance_originals(out, nets, files, crop)
    return load_sets(out)


# ------------------------------------------------------------------------- checks


def name_folders(checkpoints: Sequence[str | Path]) -> dict[str, Path]:
    """{folder in OUT: checkpoint}: a file's name without its suffix names its folder."""
    files: dict[str, Path] = {}
    for path in map(Path, checkpoints):
        if path.stem.lower() in ("original", "labels") or path.stem.startswith("."):
            raise ValueError(f"--with {path}: no name for a folder of enhanced GTs; rename it")
        if files.setdefault(path.stem, path) is not path:
            raise ValueError(f"--with {files[path.stem]} {path}: the same name; rename one")
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"--with {path}: no such file")
    return files


def find_images(folder: Path, crop: int | None) -> list[Path]:
    """All files of a folder. Raises ValueError with a line for each that cannot be used."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of HR images")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not is_system_file(p.name))
    problems = [] if paths else [f"{folder}: no images in it"]
    stems: dict[str, Path] = {}
    for path in paths:
        if problem := image_problem(path, crop):
            problems.append(f"{path}: {problem}")
        if stems.setdefault(path.stem, path) is not path:
            problems.append(f"{path}: would be {path.stem}.png as {stems[path.stem]}; rename one")
    if problems:
        raise ValueError("\n".join(problems))
    return paths


def image_problem(path: Path, crop: int | None) -> str | None:
    """Why an image cannot be used, by its header alone; None if it can."""
    try:
        with open_image(path) as image:
            mode, shorter_side, bits = image.mode, min(image.size), 8
            if image.format == "TIFF":
                bits = max(image.tag_v2.get(TIFF_BITS_PER_SAMPLE, (8,)))
            elif image.format == "PNG":
                with open(path, "rb") as file:
                    bits = file.read(25)[24]
    except Exception as error:  # a broken file makes Pillow raise almost anything
        return f"no readable PNG, JPEG, WebP or TIFF; remove it ({one_line(error, 160)})"
    if mode != "RGB" or bits > 8:
        kind = f"{bits}-bit RGB" if mode == "RGB" else mode
        return f"mode {kind}; convert it to 8-bit RGB"
    if crop and shorter_side < crop:
        return f"is smaller than --crop {crop}; remove it"
    return None


def updated_record(out: Path, files: dict[str, Path], crop: int | None) -> dict:
    """The record of `out`, {"crop": ..., "checkpoints": {name: SHA-256}}, with `files` added.

    Raises ValueError if `out` holds anything that the same record did not make.
    """
    record = {"crop": crop, "checkpoints": {}}
    if (out / RECORD_FILE).exists():
        try:
            record = json.loads(read_text(out / RECORD_FILE))
            record["crop"], dict(record["checkpoints"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{out / RECORD_FILE}: is damaged; give another OUT") from error
    elif out.exists() and not all(is_system_file(p.name) for p in out.iterdir()):
        raise ValueError(f"{out}: holds files of another origin; give a new or empty folder")
    if record["crop"] != crop:
        before = f"--crop {record['crop']}" if record["crop"] else "no --crop"
        raise ValueError(f"{out}: was made with {before}; give the same, or another OUT")
    for name, path in files.items():
        digest = sha256(path)
        if (out / name).exists() and record["checkpoints"].get(name) != digest:
            raise ValueError(f"{out / name}: is of another checkpoint than {path}; rename this "
                             "one, or delete that folder")
        record["checkpoints"][name] = digest
    return record


# ------------------------------------------------------------------------- images


def patches(path: Path, crop: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """(NAME, upright image uint8 (H, W, 3)), or with crop (NAME_top_left, patch) for each patch."""
    try:
        with open_image(path) as file:
            image = np.asarray(ImageOps.exif_transpose(file))
    except Exception as error:
        raise ValueError(f"{path}: unreadable ({one_line(error, 160)}); copy it again") from error
    if crop is None:
        yield path.stem, image
        return
    for top in starts(image.shape[0], crop):
        for left in starts(image.shape[1], crop):
            yield f"{path.stem}_{top}_{left}", image[top : top + crop, left : left + crop]


def starts(side: int, crop: int) -> list[int]:
    """Where the patches that cover a side begin: as few as possible, evenly spaced."""
    count = -(-side // crop)
    return [i * (side - crop) // max(count - 1, 1) for i in range(count)]


def save_original(path: Path, image: np.ndarray, target: Path) -> None:
    """Write a patch of the image at `path`. An existing file stays, if it is of the same image."""
    if not target.exists():
        write_png(target, image)
        return
    before = read_rgb(target).astype(np.int16)
    if before.shape != image.shape or np.abs(before - image).max() > LARGEST_DIFFERENCE:
        raise ValueError(f"{path}: {target} is of another image; rename this one, or give another "
                         "OUT")


# ------------------------------------------------------------------------- networks


def load_network(path: Path) -> Any:
    """spandrel's descriptor of a network from RGB to RGB, after a run on a small image."""
    import torch
    from spandrel import ModelLoader

    try:
        loader = ModelLoader("cuda" if torch.cuda.is_available() else "cpu")
        if path.suffix == ".safetensors":
            state = loader.load_state_dict_from_file(path)
        else:  # spandrel itself would first try a .pt as a TorchScript program
            state = torch.load(path, map_location="cpu", weights_only=True)
        net = loader.load_from_state_dict(state)
        restore(net, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    except Exception as error:  # a foreign file makes them raise almost anything
        raise ValueError(f"{path}: not a network from RGB to RGB that spandrel reads "
                         f"({one_line(error, 160)}); of SwinIR and RRDBNet it reads the public "
                         "widths, not this project's tiny presets") from error
    return net


def restore(net: Any, image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) through a network of any scale, resized to (H, W)."""
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


def enhance_originals(
    out: Path, nets: dict[str, Any], files: dict[str, Path], crop: int | None
) -> None:
    """Write every enhanced GT that `out` lacks."""
    originals = sorted(p for p in (out / "original").glob("*.png") if p.name[0] != ".")
    pairs = [(name, path) for name in nets for path in originals]
    todo = [(name, path) for name, path in pairs if not (out / name / path.name).exists()]
    done = len(pairs) - len(todo)
    for name, path in progress(todo, "enhance", len(pairs), unit="image", initial=done):
        image = read_rgb(path)
        try:
            write_png(out / name / path.name, restore(nets[name], image))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"{path}: {files[name]} failed at {image.shape[1]}x{image.shape[0]} pixels "
                f"({one_line(error, 160)}); if memory is short, give --crop "
                f"{crop // 2 if crop else 512} and another OUT") from error


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    sets = enhance(args.folder, args.out, args.checkpoints, args.crop)
    print(f"{sets.root}: {len(sets.names)} sets of {len(sets.paths[0])} images")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="HR_FOLDER", help="8-bit RGB PNG, JPEG, WebP, TIFF")
    add("out", metavar="OUT", help="folder of the set: new, or one to resume or to add to")
    add("--with", nargs="+", required=True, metavar="FILE", dest="checkpoints",
        help="checkpoints that spandrel reads; each folder bears its file's name")
    add("--crop", type=integer(1), metavar="N",
        help="cut the images into N x N pixels, for memory and fast decoding (HGGT's sets: 512; "
        "default: whole images)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("enhance.py"):
        main(parse_args())
