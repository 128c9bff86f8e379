"""All images of a data set, decoded once into one memory-mapped file that crops are read from.

Reading 256 x 256 out of a decoded 512 x 512 image takes under 0.1 ms, decoding its PNG 2 ms.
"""

import fcntl
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.hggt import MultiGT, read_rgb

BLOCK = 64  # images between two waits for the disk


class PixelCache:
    """cache[index, member] is an image of a multi-GT set: uint8 (H, W, 3), a read-only view.

    folder: holds the file NAME-KEY.rgb; the key is a checksum of every image's path below the data
            folder, size and time, so that changed or added images make a new file

    The first process writes the file and says so; others on the same machine wait for it. After an
    interruption the next process continues it. Raises ValueError, naming the folder, if the disk
    has too little room, or naming the file if it is damaged.
    """

    def __init__(self, folder: str | Path, sets: MultiGT):
        files = [path for row in sets.paths for path in row]
        key = hashlib.sha256(sets.sizes.astype(np.int64).tobytes())
        for path in files:
            stat = os.stat(path)
            name = os.path.relpath(path, sets.root)
            key.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        file = Path(folder) / f"{Path(sets.root).resolve().name}-{key.hexdigest()[:16]}.rgb"
        self.sizes, self.members = sets.sizes, len(sets.paths[0])
        ends = np.cumsum(np.repeat(sets.sizes.astype(np.int64).prod(1) * 3, self.members))
        self.starts = np.concatenate([[0], ends])
        if not file.exists():
            _build(file, files, self.starts)
        if file.stat().st_size != ends[-1]:
            raise ValueError(f"{file}: has {file.stat().st_size} bytes, not {ends[-1]}; delete it")
        self.pixels = np.asarray(np.memmap(file, np.uint8, "r"))

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        index, member = key
        i, (height, width) = index * self.members + member, self.sizes[index]
        return self.pixels[self.starts[i] : self.starts[i + 1]].reshape(height, width, 3)


def _build(file: Path, paths: list[str], starts: np.ndarray) -> None:
    """Write all images to `file`, image i from byte starts[i]; first to FILE.part."""
    part = file.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    needed = starts[-1] - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise ValueError(f"{file.parent}: {len(paths)} decoded images need {needed / 1e9:.3g} GB, "
                         f"{free / 1e9:.3g} GB are free; give --cache a folder on a larger disk")
    with open(part, "ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError:
            print(f"waiting for another process, which makes {file}", flush=True)
            fcntl.flock(out, fcntl.LOCK_EX)
        if file.exists():  # made since
            part.unlink(missing_ok=True)
            return
        # After a power failure the file may be longer than what reached the disk, at most by the
        # block after the last fsync.
        written = int(np.searchsorted(starts, os.fstat(out.fileno()).st_size, side="right")) - 1
        done = max(0, written - 1) // BLOCK * BLOCK
        out.truncate(starts[done])
        print(f"decoding {len(paths)} images into {file}: {starts[-1] / 1e9:.3g} GB", flush=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool, \
                tqdm(total=len(paths), initial=done, desc="cache", unit="image", delay=2) as bar:
            for first in range(done, len(paths), BLOCK):
                block = paths[first : first + BLOCK]
                for i, image in enumerate(pool.map(read_rgb, block), start=first):
                    if image.nbytes != starts[i + 1] - starts[i]:
                        raise ValueError(f"{paths[i]}: its size changed; rerun the same command")
                    out.write(np.ascontiguousarray(image))
                out.flush()
                os.fsync(out.fileno())
                bar.update(len(block))
        os.replace(part, file)
