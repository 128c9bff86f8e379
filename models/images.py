"""Image files: which files of a folder count, how large they are, and 8-bit RGB PNG.

Multi-GT and test sets hold 8-bit RGB PNG alone (`png_size`, `read_rgb`). Photos of other kinds are
read by models/photos.py. Suffixes count in upper and lower case. System files count nowhere.
"""

import contextlib
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from models.checkpoint import printable, replacing

try:
    from kornia_rs.io import decode_image_png_u8  # takes a third of OpenCV's and Pillow's time
except ImportError:  # no wheel for this machine
    decode_image_png_u8 = None

PNG = (".png",)
PHOTOS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")  # Pillow's names; it reads some cameras' MPO as JPEG
OTHER_IMAGES = (
    ".arw", ".avif", ".bmp", ".cr2", ".cr3", ".dds", ".dng", ".exr", ".gif", ".hdr", ".heic",
    ".heif", ".hif", ".ico", ".j2k", ".jp2", ".jpx", ".jxl", ".nef", ".orf", ".pbm", ".pcx",
    ".pgm", ".pnm", ".ppm", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga",
)  # fmt: skip
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")  # besides names with a dot first
# Deflate, with one bit per pixel, packs 8,256 pixels into a byte; photos never come near that.
PIXELS_PER_BYTE, PIXELS_IN_ANY_FILE = 10_000, 2**24
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's


# ---------------------------------------------------------------------------------- folders


def is_system_file(name: str) -> bool:
    """Whether a file or folder belongs to the system (._*, .DS_Store, Thumbs.db, @eaDir...)."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def list_images(
    folder: str | Path, suffixes: Sequence[str] = PNG
) -> tuple[list[Path], list[Path]]:
    """Files of a folder with these suffixes, and all others that look like images; by name."""
    # A broken link counts: whatever opens it names it
    files = sorted(Path(folder, entry.name) for entry in os.scandir(folder)
                   if not is_system_file(entry.name) and not entry.is_dir())
    chosen = [file for file in files if file.suffix.lower() in suffixes]
    others = [file for file in files if file.suffix.lower() in {*PHOTOS, *OTHER_IMAGES}
              and file.suffix.lower() not in suffixes]
    return chosen, others


def by_stem(files: Iterable[Path]) -> tuple[dict[str, Path], list[str]]:
    """{name without suffix: file}, and a line for each file whose name is taken."""
    files_of: dict[str, Path] = {}
    return files_of, [f"{file}: the same name as {files_of[file.stem].name}; rename one"
                      for file in files if files_of.setdefault(file.stem, file) is not file]


def find_png(folder: str | Path, name: str) -> Path:
    """NAME.png in a folder, its suffix in upper or lower case; NAME.png if there is none."""
    path = Path(folder, f"{name}.png")
    if not path.is_file() and path.parent.is_dir():
        return by_stem(list_images(path.parent)[0])[0].get(path.stem, path)
    return path


def count_kinds(files: Iterable[Path]) -> str:
    """For example "12 PNG, 3 JPEG", the most frequent first."""
    kinds = {".jpg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".tif": "TIFF", ".webp": "WebP"}
    counts = Counter(kinds.get(file.suffix.lower(), file.suffix[1:].upper()) for file in files)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def describe_folder(folder: str | Path, photos: list[Path], others: list[Path]) -> str:
    """One line: the photos by kind, and the images that are not used."""
    names = ", ".join(file.name for file in others[:5]) + ", ..." * (len(others) > 5)
    unused = f"; not used: {count_kinds(others)} ({names})" if others else ""
    return printable(f"{folder}: {count_kinds(photos) or 'no photos'}{unused}")


# ---------------------------------------------------------------------------------- one file


@contextlib.contextmanager
def open_image(
    path: str | Path, formats: Sequence[str] = FORMATS
) -> Iterator[Image.Image]:
    """Pillow's image of a file in one of these formats; only its header is read so far.

    Raises ValueError for a file that is too small for the pixels that its header tells, and
    whatever Pillow raises for a broken one.
    """
    Image.MAX_IMAGE_PIXELS = None  # Pillow's bound refuses large photos, too
    with Image.open(path, formats=formats) as image:
        check_pixels(path, image.height, image.width)
        yield image


def check_pixels(path: str | Path, height: int, width: int) -> None:
    """ValueError for a file too small for its pixels: decoding it would ask for much memory."""
    if height * width > max(PIXELS_IN_ANY_FILE, PIXELS_PER_BYTE * os.path.getsize(path)):
        raise ValueError(f"{path}: damaged, its {os.path.getsize(path)} bytes cannot hold "
                         f"{width}x{height} pixels; copy it again")


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(kind, length of its data) of each chunk of a PNG; the file stands at the data."""
    file.seek(8)
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        data = file.tell()
        yield kind, length
        file.seek(data + length + 4)


def is_plain_png(path: str | Path) -> bool:
    """Whether a file is 8-bit RGB PNG without alpha, colour profile or orientation.

    An orientation may stand in an eXIf chunk or in two kinds of text, before the pixels or after.
    """
    with open(path, "rb") as file:
        try:
            size_in_header(path, file.read(33))
        except ValueError:
            return False
        for kind, _ in png_chunks(file):
            if kind in (b"iCCP", b"tRNS", b"eXIf"):
                return False
            if kind in (b"tEXt", b"zTXt", b"iTXt") and file.read(17) in (
                    b"XML:com.adobe.xmp", b"Raw profile type "):
                return False
    return True


def png_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an 8-bit RGB PNG from its header and trailer alone, without decoding.

    Raises ValueError naming the file if it is no PNG, truncated, or not 8-bit RGB.
    """
    with open(path, "rb") as file:
        head = file.read(33)
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 12))
        tail = file.read(12)
    size = size_in_header(path, head)
    if tail[4:8] != b"IEND":
        raise ValueError(f"{path}: truncated PNG; copy it again")
    check_pixels(path, *size)
    return size


def size_in_header(path: str | Path, head: bytes) -> tuple[int, int]:
    """(height, width) of an 8-bit RGB PNG from its first 33 bytes; ValueError for another file."""
    if head[:8] != b"\x89PNG\r\n\x1a\n" or zlib.crc32(head[12:29]).to_bytes(4, "big") != head[29:]:
        raise ValueError(f"{path}: not a PNG file; convert it to 8-bit RGB PNG")
    width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
    if (bits, colour) != (8, 2):
        kind = {0: "grey", 2: "RGB", 3: "palette", 4: "grey+alpha", 6: "RGBA"}.get(colour, "?")
        raise ValueError(f"{path}: {bits}-bit {kind} PNG; convert it to 8-bit RGB")
    return height, width


def read_rgb(path: str | Path) -> np.ndarray:
    """Decode one 8-bit RGB PNG to uint8 (H, W, 3). Raises ValueError naming the file."""
    data = Path(path).read_bytes()
    size = size_in_header(path, data[:33])
    check_pixels(path, *size)
    with naming(path):
        if decode_image_png_u8:
            return decode_image_png_u8(data, size, "rgb")
        return _decode_by_opencv(data)


def _decode_by_opencv(data: bytes) -> np.ndarray:
    """The same pixels as kornia_rs: libpng is as strict about checksums and missing data."""
    import cv2

    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:  # its reason stands on stderr
        raise ValueError("a damaged PNG")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_png(path: str | Path, image: np.ndarray, **options: object) -> None:
    """Write uint8 (H, W, 3) as PNG, so that `path` is never half a file; options: Pillow's."""
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, "PNG", **options)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """ValueError naming the file for all that a decoder raises; OSError of the system stays."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # kornia_rs has no type of its own, its panics are no Exception
        if isinstance(error, OSError) and error.errno or str(error).startswith(f"{path}: "):
            raise
        reason = " ".join(str(error).split())[:200]
        if not isinstance(error, ValueError | OSError) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{path}: unreadable image ({reason}); copy it again") from error
