"""All images of a data set, decoded once into one memory-mapped file that crops are read from.

Reading 256 x 256 out of a decoded 512 x 512 image takes under 0.1 ms, decoding its PNG 2 ms.
"""

import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from models.checkpoint import errors_named, lock
from models.hggt import MultiGT
from models.progress import progress

BLOCK = 64  # images between two waits for the disk
CHECKED = 200  # images that are compared with their checksums when the file is opened


class PixelCache:
    """cache[index, member] is an image of a multi-GT set: uint8 (H, W, 3), a read-only view.

    folder: holds the file NAME-KEY.rgb, the pixels of all images and their CRC32s
    key:    of the images' content (`image_digest`), so that changed or added images make a new file

    The first process writes the file and says so; others on the same machine wait for it. After an
    interruption the next process continues it. Raises ValueError, naming the folder, if the disk
    has too little room, or naming the file if it is damaged.
    """

    def __init__(self, folder: str | Path, sets: MultiGT, key: str):
        files = [path for row in sets.paths for path in row]
        self.file = Path(folder) / f"{Path(sets.root).resolve().name[:100]}-{key}.rgb"
        self.sizes, self.members = sets.sizes, len(sets.paths[0])
        ends = np.cumsum(np.repeat(sets.sizes.astype(np.int64).prod(1) * 3, self.members))
        self.starts = np.concatenate([[0], ends])
        if not self.file.exists():
            _build(self.file, files, self.starts, sets.read)
        if self.file.stat().st_size != ends[-1] + 4 * len(files):
            self._refuse(f"has {self.file.stat().st_size} bytes, not {ends[-1] + 4 * len(files)}")
        self._open()
        self.check(np.unique(np.linspace(0, len(files) - 1, CHECKED).astype(int)))

    def _open(self) -> None:
        content, end = np.asarray(np.memmap(self.file, np.uint8, "r")), self.starts[-1]
        self.pixels, self.checksums = content[:end], content[end:].view("<u4")

    def __getstate__(self) -> dict:
        """For a worker that is not forked, which opens the file itself."""
        return {k: v for k, v in vars(self).items() if k not in ("pixels", "checksums")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        index, member = key
        i, (height, width) = index * self.members + member, self.sizes[index]
        return self.pixels[self.starts[i] : self.starts[i + 1]].reshape(height, width, 3)

    def check(self, images: Iterable[int] | None = None) -> None:
        """ValueError if one of these images, by default of all, differs from its checksum."""
        for i in range(len(self.checksums)) if images is None else images:
            if zlib.crc32(self.pixels[self.starts[i] : self.starts[i + 1]]) != self.checksums[i]:
                self._refuse(f"is damaged at image {i}")

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"{self.file}: {reason}; delete it, and it is made again")


def _build(file: Path, paths: list[str], starts: np.ndarray,
           read: Callable[[str], np.ndarray]) -> None:
    """Write all images to `file`, image i from byte starts[i]; first to FILE.part.

    Their checksums follow them. Those of an interrupted process are computed from what it wrote.
    """
    part = file.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    needed = starts[-1] + 4 * len(paths) - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise ValueError(f"{file.parent}: {len(paths)} decoded images need {needed / 1e9:.3g} GB, "
                         f"{free / 1e9:.3g} GB are free; give --cache a folder on a larger disk")
    with errors_named(part), open(part, "ab+") as out:
        held = lock(out)
        if held is None and os.name == "posix":
            raise ValueError(f"{file.parent}: its file system has no locks; give --cache a folder "
                             "on a local disk")
        if held is False:
            print(f"waiting for another process, which makes {file}", flush=True)
            lock(out, wait=True)
        if file.exists():  # made since
            part.unlink(missing_ok=True)
            return
        # After a power failure the file may be longer than what reached the disk, at most by the
        # block after the last fsync.
        written = int(np.searchsorted(starts, os.fstat(out.fileno()).st_size, side="right")) - 1
        done = max(0, written - 1) // BLOCK * BLOCK
        out.truncate(starts[done])
        out.seek(0)
        checksums = [zlib.crc32(out.read(starts[i + 1] - starts[i])) for i in range(done)]
        print(f"decoding {len(paths)} images into {file}: {starts[-1] / 1e9:.3g} GB", flush=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool, \
                progress(total=len(paths), initial=done, desc="cache", unit="image",
                         delay=2) as bar:
            for first in range(done, len(paths), BLOCK):
                block = paths[first : first + BLOCK]
                for i, image in enumerate(pool.map(read, block), start=first):
                    if image.nbytes != starts[i + 1] - starts[i]:
                        raise ValueError(f"{paths[i]}: its size changed; rerun the same command")
                    checksums.append(zlib.crc32(np.ascontiguousarray(image)))
                    out.write(np.ascontiguousarray(image))
                out.flush()
                os.fsync(out.fileno())
                bar.update(len(block))
        out.write(np.array(checksums, "<u4").tobytes())
        out.flush()
        os.fsync(out.fileno())
        if os.name != "posix":
            out.close()  # Windows renames no open file; it has no lock to lose either
        os.replace(part, file)
