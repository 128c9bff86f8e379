"""Photographs as a network's input and output: what a file holds besides RGB comes out again.

    photo = read_photo("in.png")                    # photo.rgb: (1, 3, H, W) in [0, 1]
    write_photo(photo, net(photo.rgb), "out.png")   # the same format, mode and profile

PNG, JPEG, WebP and TIFF; black and white, grey, palette and RGB, with alpha or without; 8 bits per
channel, or 16 in PNG and TIFF. Palettes become RGB. Grey goes in as three equal channels and comes
out as their luma. Alpha is enlarged bicubically. An EXIF orientation is applied before the network,
which has learnt upright pictures, and undone after it, so that file and tag agree as before. ICC
profile and EXIF are kept; of a TIFF the profile alone (it is turned upright when read, and its EXIF
shares a table with the pixel layout). JPEG and WebP are written with quality 95, JPEG without
chroma subsampling.

Pillow decodes every file and so finds broken ones, but it has 8 bits for colour, and garbles grey
TIFFs of 16 bits in turning them; pixels of 16 bits come from OpenCV. Refused: CMYK, Lab and float
images, 9 to 15 bits; with 16 bits more than 2^30 pixels, and TIFFs of grey with alpha or with a
plane per channel, which OpenCV mixes up.
"""

import contextlib
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "YCbCr", "I;16", "I;16B")  # Pillow's
SAVE = {  # options of Pillow, for 8 bits
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
    mode, tags = image.mode, image.tag_v2 if kind == "TIFF" else {}
    depth = max(tags.get(258, (8,)))  # BitsPerSample
    if kind == "PNG":
        with open(path, "rb") as file:
            depth, colour_type = file.read(26)[24:]
        if depth == 16 and colour_type in (0, 4):  # Pillow: I;16, before 11 I; and RGBA
            mode = {0: "I;16", 4: "LA"}[colour_type]
    if mode not in MODES:
        raise ValueError(f"mode {mode}; convert it to RGB or to grey, of 8 or 16 bits")
    if depth not in (1, 2, 4, 8, 16):
        raise ValueError(f"{depth} bits per channel; convert it to 8 or 16")
    bits = 16 if depth == 16 else 8

    has_alpha = mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    is_grey = mode in ("1", "L", "LA", "I;16", "I;16B")
    exif = image.getexif() if kind != "TIFF" else None
    orientation = exif.get(274, 1) if exif else 1
    orientation = orientation if orientation in UPRIGHT else 1
    profile = image.info.get("icc_profile")
    if bits == 16:
        if tags.get(284) == 2 and not is_grey:  # PlanarConfiguration
            raise ValueError("16 bits in one plane per channel; save it with interleaved channels")
        pixels = _pixels_of_16_bits(image, path, (1 if is_grey else 3) + has_alpha)
        if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white
            pixels = 65535 - pixels
    else:
        pixels = np.asarray(image.convert(("L" if is_grey else "RGB") + "A" * has_alpha))
    pixels = UPRIGHT[orientation](np.atleast_3d(pixels))
    x = torch.from_numpy(pixels.astype(np.float32) / (2**bits - 1)).permute(2, 0, 1)[None]
    colour = x[:, :-1] if has_alpha else x
    if bits == 16 and tags.get(338) == (1,):  # ExtraSamples: colours multiplied by their alpha
        colour = (colour / x[:, -1:].clamp(min=1e-5)).clamp(max=1)
    return Photo(
        colour.expand(-1, 3, -1, -1), x[:, -1:] if has_alpha else None, is_grey, bits, kind,
        orientation, profile, exif, "; ".join(notes),
    )


def _pixels_of_16_bits(image: Image.Image, path: Path, channels: int) -> np.ndarray:
    """(H, W, channels) uint16 of the file that Pillow has decoded as `image`, turned as there.

    channels: grey, grey and alpha, RGB, or RGBA. Raises ValueError where OpenCV reads another size.
    """
    import cv2  # not needed, nor waited for, elsewhere

    with contextlib.suppress(AttributeError):  # OpenCV 4 says nothing of unknown tags
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    x = np.atleast_3d(cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED))
    if channels == 2 and x.shape[2] == 1:  # a transparent grey, which OpenCV passes over
        x = np.dstack([x, np.where(x == image.info["transparency"], 0, 65535).astype(np.uint16)])
    *size, stored = x.shape  # Pillow's may be that before turning
    if x.dtype != np.uint16 or sorted(size) != sorted(image.size) or stored < channels:  # or None
        raise ValueError("OpenCV does not read its 16 bits; convert it to 8")
    return x[..., {1: [0], 2: [0, -1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]]  # from BGR(A)


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
    x = np.ascontiguousarray(x[..., 0] if x.shape[2] == 1 else x)
    try:
        if photo.bits == 8:
            Image.fromarray(x).save(temporary, photo.format, **options)
        elif photo.format == "PNG":
            with open(temporary, "wb") as file:
                file.writelines(_png_of_16_bits(x, photo.icc_profile, options.get("exif")))
        else:
            import tifffile

            icc = photo.icc_profile
            tifffile.imwrite(
                temporary, x, photometric="minisblack" if photo.is_grey else "rgb",
                extrasamples=None if photo.alpha is None else ("unassalpha",), compression="zlib",
                predictor=True, extratags=[(34675, 7, len(icc), icc, True)] if icc else [],
                metadata=None, software=False,
            )
        os.replace(temporary, path)
    except (OSError, ValueError, RuntimeError) as error:  # Pillow's do not name the file
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _png_of_16_bits(x: np.ndarray, profile: bytes | None, exif: bytes | None) -> Iterator[bytes]:
    """The parts of a PNG file of (H, W) or (H, W, 2 to 4) uint16, which Pillow writes of grey alone
    (https://www.w3.org/TR/png-3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    height, width = x.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[x[0, 0].size]
    yield b"\x89PNG\r\n\x1a\n"
    yield chunk(b"IHDR", struct.pack(">2I5B", width, height, 16, colour_type, 0, 0, 0))
    if profile:
        yield chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile))
    if exif:
        yield chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    rows = x.astype(">u2").view(np.uint8).reshape(height, -1)
    rows[1:] -= rows[:-1]  # filter 2: differences from the row above, modulo 256
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0)), constant_values=2), 1)  # 6: 1 % smaller
    for start in range(0, len(data), 2**24):
        yield chunk(b"IDAT", data[start : start + 2**24])
    yield chunk(b"IEND", b"")


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
    if not lq.exists():
        raise FileNotFoundError(f"{lq}: no such photo or folder (--lq)")
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                   and not p.name.startswith("."))
    if not found:
        raise FileNotFoundError(f"{lq}: no {' '.join(SUFFIXES)} files there (--lq)")
    return found


def first_line(error: BaseException) -> str:
    """Of its message; its kind where it has none, as Python's own MemoryError."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def upscale_photos(
    files: list[Path],
    out: Path,
    upscale: Callable[[Tensor], tuple[Tensor, int]],
    metrics: dict[str, Callable[[Tensor], Tensor]],
    overwrite: bool = False,
    scale: int = 4,
    quiet: bool = False,
) -> tuple[list[str], list[list[str]]]:
    """Enlarge photos into a folder under their own names, and score both sides.

    upscale: (1, 3, H, W) in [0, 1] -> (output, side of its tiles or 0); metrics: {name: function of
    (1, 3, H, W) in [0, 1] -> (1,)}. What exists in `out` is kept, and scored, unless overwrite.
    What goes wrong with a photo is said in a line on stderr; the others go on. quiet: no progress.
    Returns a table (header, rows) with a row per photo: status made, kept or failed; tile in LQ
    pixels, 0: whole; scores of both files (_lq, _sr).
    """
    Image.MAX_IMAGE_PIXELS = None  # these are the user's own; a large result is no attack
    out.mkdir(parents=True, exist_ok=True)
    sides = [(name, side) for name in metrics for side in ("lq", "sr")]
    rows = []

    def say(path: Path, text: str) -> None:
        tqdm.write(text if text.startswith(str(path)) else f"{path}: {text}", file=sys.stderr)

    def score(path: Path, photo: Photo, side: str) -> dict[tuple[str, str], str]:
        scores = {}
        for name, metric in metrics.items():
            try:
                scores[name, side] = f"{metric(photo.rgb).item():.6f}"
            except (ValueError, RuntimeError, MemoryError) as error:  # too small, or too large
                say(path, f"no score ({first_line(error)})")
        return scores

    for path in tqdm(files, desc=out.name, unit="photo", disable=quiet):
        target, tile, status, scores, size = out / path.name, "", "made", {}, ["", ""]
        try:
            photo = read_photo(path)
            h, w = photo.rgb.shape[2:]
            size = [str(w), str(h)]
            if photo.note:
                say(path, photo.note)
            if target.exists() and not overwrite:
                status = "kept"
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
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch's, of this size
            status = "failed"
            say(path, first_line(error))
        rows.append([path.name, status, *size, str(tile), *(scores.get(s, "") for s in sides)])
    return ["file", "status", "width", "height", "tile", *(f"{n}_{s}" for n, s in sides)], rows
