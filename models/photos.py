"""Photographs as a network's input and output: what a file holds besides RGB comes out again.

    photo = read_photo("in.png")                    # photo.rgb: (1, 3, H, W) in [0, 1]
    write_photo(photo, net(photo.rgb), "out.png")   # the same format, mode and profile

PNG, JPEG, WebP and TIFF; black and white, grey, palette and RGB, with alpha or without; 16-bit grey
in PNG and TIFF. Palettes become RGB. Grey goes in as three equal channels and comes out as their
luma. Alpha is enlarged bicubically. An EXIF orientation is applied before the network, which has
learnt upright pictures, and undone after it, so that file and tag agree as before. ICC profile and
EXIF are kept; of a TIFF the profile alone (Pillow turns it upright, and its EXIF shares a table
with the pixel layout). JPEG and WebP are written with quality 95, JPEG without chroma subsampling.

What Pillow cannot: colour with 16 bits per channel, and 16-bit grey with alpha, arrive as 8 bits
(read_photo says so in `note`); float, CMYK and Lab images are refused.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr", "I;16", "I;16B")  # Pillow's
SAVE = {  # options of Pillow
    "PNG": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"quality": 95},
    "JPEG": {"quality": 95, "subsampling": 0},
}  # fmt: skip
FORMATS = tuple(SAVE)  # read and written; MPO, of some cameras, is read as a JPEG
LARGEST_SIDE = {"JPEG": 65535, "WEBP": 16383}  # pixels, of the formats
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's
# How an array (H, W, ...) stored with an EXIF orientation is turned upright.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}
INVERSE = {6: 8, 8: 6}  # the orientation that undoes one; all others undo themselves


@dataclass
class Photo:
    """One image file, decoded and upright."""

    rgb: Tensor  # (1, 3, H, W) float32 in [0, 1]
    alpha: Tensor | None  # (1, 1, H, W) float32 in [0, 1]
    is_grey: bool
    bits: int  # 8 or 16 per channel
    format: str  # "PNG", "JPEG", "WEBP" or "TIFF", whatever the file is called
    orientation: int  # EXIF's, 1..8; applied to rgb and alpha
    icc_profile: bytes | None
    exif: Image.Exif | None
    note: str  # what was lost in reading, or ""


def read_photo(path: str | Path) -> Photo:
    """Decode an image file. Raises ValueError naming the file if it cannot be read or is refused,
    FileNotFoundError if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return _decode(image, Path(path))
    except Exception as error:  # a broken file makes Pillow raise almost anything
        reason = str(error).removeprefix(f"{path}: ").splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a readable photo ({reason[0]})") from error


def _decode(image: Image.Image, path: Path) -> Photo:
    kind = "JPEG" if image.format == "MPO" else image.format
    notes = []
    if kind != "JPEG" and getattr(image, "n_frames", 1) > 1:
        notes.append(f"the first of {image.n_frames} pictures")
    if kind == "PNG":
        with open(path, "rb") as file:
            depth, colour = file.read(26)[24:]
        if colour == 4 and depth == 16:  # grey with alpha, which Pillow hands out as RGBA
            image = image.convert("LA")
    else:
        depth = max(image.tag_v2.get(258, (8,))) if kind == "TIFF" else 8
    mode = image.mode
    if mode == "I" and kind == "PNG":  # 16-bit grey, before Pillow 11
        mode = "I;16"
    if mode not in MODES:
        raise ValueError(f"mode {mode}; convert it to 8-bit RGB or to grey")
    bits = 16 if mode.startswith("I;16") else 8
    if depth > bits:
        notes.append(f"{depth} bits per channel, of which Pillow reads 8")

    has_alpha = bits == 8 and (mode in ("LA", "PA", "RGBA") or "transparency" in image.info)
    is_grey = bits == 16 or mode in ("1", "L", "LA")
    exif = image.getexif() if kind != "TIFF" else None
    orientation = exif.get(274, 1) if exif else 1
    orientation = orientation if orientation in UPRIGHT else 1
    profile = image.info.get("icc_profile")
    if bits == 8:
        image = image.convert(("L" if is_grey else "RGB") + "A" * has_alpha)
    pixels = UPRIGHT[orientation](np.asarray(image).reshape(image.height, image.width, -1))
    x = torch.from_numpy(pixels.astype(np.float32) / (2**bits - 1)).permute(2, 0, 1)[None]
    colour = x[:, :-1] if has_alpha else x
    return Photo(
        colour.expand(-1, 3, -1, -1), x[:, -1:] if has_alpha else None, is_grey, bits, kind,
        orientation, profile, exif, "; ".join(notes),
    )


def write_photo(photo: Photo, sr: Tensor, path: str | Path) -> None:
    """Write an enlarged photo as `photo` was stored; the path holds the old file or the whole new.

    sr: (1, 3, sH, sW) float, clipped to [0, 1] here. Raises OSError naming the file.
    """
    path, (h, w) = Path(path), sr.shape[2:]
    x = sr.float().cpu().clamp(0, 1)
    if photo.is_grey:
        x = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if photo.alpha is not None:
        alpha = F.interpolate(photo.alpha, size=(h, w), mode="bicubic", align_corners=False)
        x = torch.cat([x, alpha.clamp(0, 1)], 1)
    x = x[0].permute(1, 2, 0).mul_(2**photo.bits - 1).round_().numpy()
    x = x.astype(np.uint16 if photo.bits == 16 else np.uint8)
    x = UPRIGHT[INVERSE.get(photo.orientation, photo.orientation)](x)
    options = dict(SAVE[photo.format])
    if photo.icc_profile:
        options["icc_profile"] = photo.icc_profile
    if photo.exif:
        sizes = photo.exif.get_ifd(0x8769)  # Exif's own table
        for tag, side in ((0xA002, x.shape[1]), (0xA003, x.shape[0])):  # width, height
            if tag in sizes:
                sizes[tag] = side
        try:
            options["exif"] = photo.exif.tobytes()
        except Exception as error:  # Pillow: struct.error, TypeError of a tag with an odd value
            raise ValueError(f"{path}: its EXIF cannot be written ({error}); remove it") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image = Image.fromarray(np.ascontiguousarray(x[..., 0] if x.shape[2] == 1 else x))
        image.save(temporary, photo.format, **options)
        os.replace(temporary, path)
    except (OSError, ValueError, RuntimeError) as error:  # Pillow's do not name the file
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def find_photos(lq: str | Path, out: str | Path) -> list[Path]:
    """The image files of a folder (not of folders in it), or the one file.

    Raises ValueError where `out` would mix results with photos, FileNotFoundError where none are.
    """
    lq, out = Path(lq), Path(out)
    folder = lq if lq.is_dir() else lq.parent
    if out.is_file() or out.suffix.lower() in SUFFIXES:
        raise ValueError(f"--out {out}: give a folder; the photos keep their names in it")
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out}: holds the photos themselves; give another folder")
    if lq.is_file():
        return [lq]
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                   and not p.name.startswith("."))
    if not lq.is_dir() or not found:
        raise FileNotFoundError(f"{lq}: no {' '.join(SUFFIXES)} files there (--lq)")
    return found


def upscale_photos(
    files: list[Path],
    out: Path,
    upscale: Callable[[Tensor], tuple[Tensor, int]],
    metrics: dict[str, Callable[[Tensor], Tensor]],
    overwrite: bool = False,
    scale: int = 4,
) -> tuple[int, tuple[list[str], list[list[str]]]]:
    """Enlarge photos into a folder under their own names, and score both sides.

    upscale: (1, 3, H, W) in [0, 1] -> (output, side of its tiles or 0); metrics: {name: function of
    (1, 3, H, W) in [0, 1] -> (1,)}. What exists in `out` is kept, and scored, unless overwrite.
    What goes wrong with a photo is said in a line on stderr; the others go on.
    Returns the number of photos that failed, and a table (header, rows) with a row per photo:
    status made, kept or failed; tile in LQ pixels, 0: whole; scores of both files (_lq, _sr).
    """
    Image.MAX_IMAGE_PIXELS = None  # these are the user's own; a large result is no attack
    out.mkdir(parents=True, exist_ok=True)
    sides = [(name, side) for name in metrics for side in ("lq", "sr")]
    rows, failed, kept = [], 0, 0

    def say(path: Path, text: str) -> None:
        tqdm.write(text if text.startswith(str(path)) else f"{path}: {text}", file=sys.stderr)

    def score(path: Path, photo: Photo, side: str) -> dict[tuple[str, str], str]:
        scores = {}
        for name, metric in metrics.items():
            try:
                scores[name, side] = f"{metric(photo.rgb).item():.6f}"
            except (ValueError, RuntimeError, MemoryError) as error:  # too small, or too large
                say(path, f"no score ({str(error).splitlines()[0]})")
        return scores

    for path in tqdm(files, desc=out.name, unit="photo"):
        target, tile, status, scores, size = out / path.name, "", "made", {}, ["", ""]
        try:
            photo = read_photo(path)
            h, w = photo.rgb.shape[2:]
            size = [str(w), str(h)]
            if photo.note:
                say(path, photo.note)
            if target.exists() and not overwrite:
                status, kept = "kept", kept + 1
            else:
                if scale * max(h, w) > LARGEST_SIDE.get(photo.format, 2**31):
                    raise ValueError(f"{path}: too large for {photo.format} once enlarged; "
                                     "convert it to PNG")
                sr, tile = upscale(photo.rgb)
                write_photo(photo, sr, target)
                del sr
            if metrics:
                scores |= score(path, photo, "lq")
                scores |= score(target, read_photo(target), "sr")
        except (ValueError, OSError, MemoryError) as error:
            status, failed = "failed", failed + 1
            say(path, str(error))
        rows.append([path.name, status, *size, str(tile), *(scores.get(s, "") for s in sides)])
    if kept:
        print(f"{out}: {kept} existing files kept, whichever network made them (--overwrite makes "
              "them anew)", file=sys.stderr)
    header = ["file", "status", "width", "height", "tile", *(f"{n}_{s}" for n, s in sides)]
    if failed:
        print(f"{out}: {failed} of {len(files)} photos failed", file=sys.stderr)
    return failed, (header, rows)
