"""Photographs as a network's input and output: what a file holds besides RGB is kept.

    photo = read_photo("in.png")                    # photo.rgb: (1, 3, H, W) in [0, 1]
    write_photo(photo, net(photo.rgb), "out.png")   # the same format, mode and profile
    image = read_srgb("in.jpg")                     # as training data: uint8 (H, W, 3)

PNG, JPEG, WebP and TIFF; black and white, grey, palette and RGB, with alpha or without; 8 bits per
channel, or 16 in PNG and TIFF. Palettes become RGB. Grey is read as three equal channels and
written as the luma of the output. Alpha is enlarged bicubically; where it is 0, the nearest visible
colour takes the place of the hidden one, which would leak into the edges. An EXIF orientation is
applied before the network, which has learnt upright pictures, and undone after it, so that file and
tag agree as before. ICC profile, resolution, EXIF and a PNG's colour chunks are kept; no EXIF of a
TIFF (reading turns it upright, and its EXIF shares a table with the pixel layout). JPEG and WebP
are written with quality 95, JPEG without chroma subsampling.

Pillow decodes every file, and so finds broken ones, but it holds colours in 8 bits and garbles grey
TIFFs of 16 bits when it turns them, so OpenCV reads pixels of 16 bits. Refused: CMYK, Lab and float
images, 9 to 15 bits; with 16 bits more than 2^30 pixels, and TIFFs of grey with alpha or with a
plane per channel, which OpenCV mixes up.
"""

import contextlib
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    ICCPROFILE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
)
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from models.checkpoint import one_line, replacing
from models.images import LUMA, is_plain_png, open_image, png_chunks, read_rgb

GREY_MODES = ("1", "L", "LA", "I;16", "I;16B")  # Pillow's
MODES = (*GREY_MODES, "P", "PA", "RGB", "RGBX", "RGBA", "YCbCr")
SAVE = {  # options of Pillow, for 8 bits
    "PNG": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"quality": 95},
    "JPEG": {"quality": 95, "subsampling": 0},
}  # fmt: skip
LARGEST_SIDE = {"JPEG": 65535, "WEBP": 16383}  # pixels, of the formats
PNG_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"pHYs")  # kept as they are
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
    dpi: tuple[float, float] | None  # of JPEG and TIFF
    png_chunks: bytes  # those of PNG_CHUNKS
    note: str  # what reading lost, or ""


# ---------------------------------------------------------------------------------- reading


def read_photo(path: str | Path) -> Photo:
    """Decode an image file. Raises ValueError naming the file if it cannot be read or is refused,
    FileNotFoundError if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image")
    with _opened(path) as image:
        image.load()
        return _decode(image, Path(path))


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Pillow's image; ValueError naming the file for all that goes wrong with it."""
    try:
        with open_image(path) as image:
            yield image
    except Exception as error:  # a broken file makes Pillow raise almost anything
        reason = one_line(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not a readable photo ({reason})") from error


def _decode(image: Image.Image, path: Path) -> Photo:
    file_format = "JPEG" if image.format == "MPO" else image.format
    frames = getattr(image, "n_frames", 1) if file_format != "JPEG" else 1
    mode, bits = _mode_and_bits(image, path)
    is_grey = mode in GREY_MODES
    has_alpha = mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    exif, orientation = _exif_and_orientation(image)
    if bits == 16:
        pixels = _pixels_of_16_bits(image, path, is_grey, has_alpha)
    else:
        pixels = np.asarray(image.convert(("L" if is_grey else "RGB") + "A" * has_alpha))
    pixels = UPRIGHT[orientation](np.atleast_3d(pixels))  # (H, W, C)
    x = torch.from_numpy(pixels.astype(np.float32) / (2**bits - 1)).permute(2, 0, 1)[None]
    colour, alpha = (x[:, :-1], x[:, -1:]) if has_alpha else (x, None)
    if bits == 16 and _tiff_tag(image, EXTRASAMPLES) == (1,):  # colours multiplied by their alpha
        colour = (colour / alpha.clamp(min=1e-5)).clamp(max=1)
    if has_alpha:
        colour = _visible_colour(colour, alpha)
    return Photo(
        rgb=colour.expand(-1, 3, -1, -1),
        alpha=alpha,
        is_grey=is_grey,
        bits=bits,
        format=file_format,
        orientation=orientation,
        icc_profile=image.info.get("icc_profile"),
        exif=exif,
        dpi=_dpi(image) if file_format in ("JPEG", "TIFF") else None,
        png_chunks=_png_chunks(path) if file_format == "PNG" else b"",
        note=f"only the first of its {frames} pictures is read" if frames > 1 else "",
    )


def _exif_and_orientation(image: Image.Image) -> tuple[Image.Exif | None, int]:
    """The EXIF, None of a TIFF, and its orientation, 1 where it has none or a wrong one."""
    exif = image.getexif() if image.format != "TIFF" else None
    orientation = exif.get(ExifTags.Base.Orientation, 1) if exif else 1
    return exif, orientation if orientation in UPRIGHT else 1


def _visible_colour(colour: Tensor, alpha: Tensor) -> Tensor:
    """The colour (1, C, H, W) with the nearest visible one where alpha (1, 1, H, W) is 0."""
    hidden = (alpha[0, 0] == 0).numpy()
    if hidden.all() or not hidden.any():
        return colour
    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return colour[:, :, torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    """Pixels per inch, horizontally and vertically; None where the file tells none."""
    with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
        x, y = map(float, image.info.get("dpi", ()))
        if 0 < x < math.inf and 0 < y < math.inf:
            return x, y
    return None


def _png_chunks(path: Path) -> bytes:
    """The chunks of PNG_CHUNKS before the pixels, as they stand in the file."""
    chunks = b""
    with open(path, "rb") as file:
        for kind, length in png_chunks(file):
            if kind == b"IDAT":
                break
            if kind in PNG_CHUNKS:
                file.seek(-8, os.SEEK_CUR)  # its length and kind
                chunks += file.read(length + 12)
    return chunks


def _mode_and_bits(image: Image.Image, path: Path) -> tuple[str, int]:
    """Pillow's mode for the pixels as they are stored, and 8 or 16 bits per channel."""
    mode, depth = image.mode, max(_tiff_tag(image, BITSPERSAMPLE) or (8,))
    if image.format == "PNG":
        with open(path, "rb") as file:
            depth, colour_type = file.read(26)[24:]
        if depth == 16 and colour_type in (0, 4):  # Pillow: I;16, before version 11 I; and RGBA
            mode = {0: "I;16", 4: "LA"}[colour_type]
    if mode not in MODES:
        raise ValueError(f"mode {mode}; convert it to RGB or to grey, of 8 or 16 bits")
    if depth not in (1, 2, 4, 8, 16):
        raise ValueError(f"{depth} bits per channel; convert it to 8 or 16")
    return mode, 16 if depth == 16 else 8


def _tiff_tag(image: Image.Image, tag: int) -> object:
    return image.tag_v2.get(tag) if image.format == "TIFF" else None


def _pixels_of_16_bits(
    image: Image.Image, path: Path, is_grey: bool, has_alpha: bool
) -> np.ndarray:
    """(H, W, C) uint16 of the file that Pillow has decoded as `image`, turned as Pillow turns it.

    Raises ValueError where OpenCV cannot read it, or reads another size.
    """
    import cv2  # slow to import, and most photos do not need it

    if _tiff_tag(image, PLANAR_CONFIGURATION) == 2 and not is_grey:
        raise ValueError("16 bits in one plane per channel; save it with interleaved channels")
    with contextlib.suppress(AttributeError):  # OpenCV 4 does not warn of unknown tags
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    x = np.atleast_3d(cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED))
    if is_grey and has_alpha and x.shape[2] == 1:  # OpenCV ignores a grey PNG's transparent value
        opaque = np.where(x == image.info["transparency"], 0, 65535).astype(np.uint16)
        x = np.dstack([x, opaque])
    order = [0] if is_grey else [2, 1, 0]  # from BGR(A), whose grey channels are equal
    order += [-1 if is_grey else 3] * has_alpha
    *size, stored = x.shape  # image.size may be that before turning
    if x.dtype != np.uint16 or sorted(size) != sorted(image.size) or stored < len(order):
        raise ValueError("OpenCV does not read its 16 bits; convert it to 8")
    x = x[..., order]
    return 65535 - x if _tiff_tag(image, PHOTOMETRIC_INTERPRETATION) == 0 else x  # 0: 0 is white


# ---------------------------------------------------------------------------------- as data


def photo_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a photo once it is upright, without decoding the pixels of most.

    Raises ValueError naming the file unless `read_srgb` accepts its header.
    """
    with _opened(path) as image:
        mode, _ = _mode_and_bits(image, Path(path))
        if image.format == "TIFF":
            image.load()  # turns it
        _, orientation = _exif_and_orientation(image)
        if profile := image.info.get("icc_profile"):
            _to_srgb(Image.new("L" if mode in GREY_MODES else "RGB", (1, 1)), profile)
        return image.size if orientation > 4 else image.size[::-1]


def read_srgb(path: str | Path) -> np.ndarray:
    """A photo as uint8 (H, W, 3): upright, sRGB by its colour profile, over white.

    Raises ValueError naming the file.
    """
    if is_plain_png(path):
        return read_rgb(path)
    photo = read_photo(path)
    x = photo.rgb if photo.alpha is None else photo.rgb * photo.alpha + 1 - photo.alpha
    x = x[0, :1] if photo.is_grey else x[0]
    pixels = x.permute(1, 2, 0).mul(255).round().byte().numpy()  # (H, W, 1 or 3)
    image = Image.fromarray(pixels[..., 0] if photo.is_grey else pixels)
    try:
        image = _to_srgb(image, photo.icc_profile) if photo.icc_profile else image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return np.asarray(image)


def read_shrunk(path: str | Path, shrink: int) -> np.ndarray:
    """`read_srgb` at 1 / shrink of its sides: means of whole shrink x shrink squares."""
    image = read_srgb(path)
    if shrink == 1:
        return image
    height, width = (side // shrink * shrink for side in image.shape[:2])
    return np.asarray(Image.fromarray(image[:height, :width]).reduce(shrink))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A grey or RGB image in the colours of an ICC profile, in those of sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB":  # also of some grey images
            image = image.convert("RGB")
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"),
                                         outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"its colour profile cannot be used ({one_line(error, 100)}); convert it "
                         "to sRGB, or remove the profile") from error


# ---------------------------------------------------------------------------------- writing


def write_photo(photo: Photo, sr: Tensor, path: str | Path) -> None:
    """Write an enlarged photo in the format of `photo`, so that `path` is never half a file.

    sr: (1, 3, sH, sW) float, clipped to [0, 1] here.
    Raises OSError naming the file, or ValueError if its EXIF cannot be written.
    """
    pixels = _stored_pixels(photo, sr)
    try:
        exif = _exif_of_size(photo.exif, *pixels.shape[:2]) if photo.exif else None
    except Exception as error:  # Pillow: struct.error, TypeError of a tag with an odd value
        raise ValueError(f"{path}: its EXIF cannot be written ({error}); remove it") from error
    try:
        with replacing(path) as temporary:
            if photo.bits == 8:
                extras = {"icc_profile": photo.icc_profile, "exif": exif, "dpi": photo.dpi}
                extras = {key: value for key, value in extras.items() if value}
                options = SAVE[photo.format] | extras
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, photo.format, **options)
                data = buffer.getvalue()  # a PNG's header takes 33 bytes
                temporary.write_bytes(data[:33] + photo.png_chunks + data[33:])
            elif photo.format == "PNG":
                with open(temporary, "wb") as file:
                    file.writelines(_png_of_16_bits(pixels, photo, exif))
            else:
                _write_tiff_of_16_bits(photo, pixels, temporary)
    except (ValueError, RuntimeError) as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def _stored_pixels(photo: Photo, sr: Tensor) -> np.ndarray:
    """(H, W) or (H, W, C) uint8 or uint16 of the output, in the channels and the orientation of
    the file."""
    x = sr.float().cpu().clamp(0, 1)
    if photo.is_grey:
        x = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if photo.alpha is not None:
        alpha = F.interpolate(photo.alpha, size=sr.shape[2:], mode="bicubic", align_corners=False)
        x = torch.cat([x, alpha.clamp(0, 1)], 1)
    x = x[0].permute(1, 2, 0).mul_(2**photo.bits - 1).round_().numpy()  # (H, W, C)
    x = x.astype(np.uint16 if photo.bits == 16 else np.uint8)
    x = UPRIGHT[INVERSE.get(photo.orientation, photo.orientation)](x)
    return np.ascontiguousarray(x[..., 0] if x.shape[2] == 1 else x)


def _exif_of_size(exif: Image.Exif, height: int, width: int) -> bytes:
    """The file's EXIF, with the new size where it tells one."""
    table = exif.get_ifd(ExifTags.IFD.Exif)
    for tag, side in ((ExifTags.Base.ExifImageWidth, width),
                      (ExifTags.Base.ExifImageHeight, height)):
        if tag in table:
            table[tag] = side
    return exif.tobytes()


def _write_tiff_of_16_bits(photo: Photo, pixels: np.ndarray, path: Path) -> None:
    import tifffile

    profile = photo.icc_profile
    tifffile.imwrite(
        path, pixels, photometric="minisblack" if photo.is_grey else "rgb",
        extrasamples=None if photo.alpha is None else ("unassalpha",), compression="zlib",
        predictor=True, metadata=None, software=False, resolution=photo.dpi,
        resolutionunit="INCH" if photo.dpi else None,
        extratags=[(ICCPROFILE, 7, len(profile), profile, True)] if profile else [],
    )


def _png_of_16_bits(x: np.ndarray, photo: Photo, exif: bytes | None) -> Iterator[bytes]:
    """The parts of a PNG file of (H, W) or (H, W, 2 to 4) uint16 (https://www.w3.org/TR/png-3).

    No library of requirements.txt writes it: Pillow has 16 bits for grey alone, OpenCV not for grey
    with alpha. imagecodecs (130 MB) and pypng keep neither ICC profile nor EXIF.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    height, width = x.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[x[0, 0].size]
    yield b"\x89PNG\r\n\x1a\n"
    yield chunk(b"IHDR", struct.pack(">2I5B", width, height, 16, colour_type, 0, 0, 0))
    yield photo.png_chunks
    if photo.icc_profile:
        yield chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(photo.icc_profile))
    if exif:
        yield chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    rows = x.astype(">u2").view(np.uint8).reshape(height, -1)
    rows[1:] -= rows[:-1]  # filter 2: differences from the row above, modulo 256
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0)), constant_values=2), 1)  # 6: 1 % smaller
    for start in range(0, len(data), 2**24):
        yield chunk(b"IDAT", data[start : start + 2**24])
    yield chunk(b"IEND", b"")
