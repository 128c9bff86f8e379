"""The score cache: a metric scores every image once, whichever script asks.

A folder holds <metric>.csv, a line key,image,score,seconds,crc32 per score, and <metric>.rankN.csv
of the other processes under torchrun. The file's name tells the metric and its weights; the key
tells the image: the content of a file, or what made a network's output; `image` is a label for
readers. Lines are appended as soon as scores are known: a kill loses at most the batch in hand. A
line that was cut off or damaged is ignored, and its image scored again. After a change to the code
of your own metric, delete its score file.

sha256.csv remembers the hashes of files, so that a file is read again only if it was touched.
"""

import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import io
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.checkpoint import (
    errors_named,
    file_digest,
    file_stamp,
    is_settled,
    one_line,
    read_text,
    sha256,
)
from models.distributed import agree, gather, machine, rank_and_world, rank_zero_first
from models.images import FORMATS, naming, open_image
from models.progress import Lines, progress

SCORE_HEADER = ("key", "image", "score", "seconds")
HASH_HEADER = ("path", "size", "mtime_ns", "ctime_ns", "inode", "sha256")
HOPELESS = 64  # failures without a success after which a metric is given up


class Scores(NamedTuple):
    quality: dict[str, float]  # by image key, up = better; an image that failed is absent
    seconds: float  # the metric's own time for these images, when they were scored

    def of(self, keys: np.ndarray) -> np.ndarray:
        """Qualities in the shape of the keys, NaN for an image that failed."""
        return np.array([self.quality.get(k, np.nan) for k in keys.flat]).reshape(keys.shape)


# ------------------------------------------------------------------------- files of the cache


def read_rows(folder: Path, stem: str, columns: int) -> Iterator[list[str]]:
    """Intact lines of <stem>.csv and of all <stem>.rankN.csv, without their checksum."""
    for file in sorted([*folder.glob(f"{stem}.csv"), *folder.glob(f"{stem}.rank*.csv")]):
        for line in read_text(file, "surrogateescape").split("\n"):
            with contextlib.suppress(csv.Error):
                row = next(csv.reader([line]), [])
                if len(row) == columns + 1 and row[-1] == _checksum(row[:-1]):
                    yield row[:-1]


def append_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Append lines at once, each with a checksum in its last cell; OSError names the file."""
    text = io.StringIO()
    with errors_named(path), open(path, "a+b") as file:
        if not file.seek(0, os.SEEK_END):
            text.write(",".join([*header, "crc32"]) + "\n")
        else:
            file.seek(-1, os.SEEK_END)
            text.write("\n" * (file.read() != b"\n"))  # ends a line that a kill cut short
        cells = ([str(cell) for cell in row] for row in rows)
        csv.writer(text, lineterminator="\n").writerows([*row, _checksum(row)] for row in cells)
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def _checksum(cells: Sequence[str]) -> str:
    return f"{zlib.crc32(repr(cells).encode()):08x}"


def rank_file(folder: Path, stem: str) -> Path:
    """The file that this process appends to."""
    rank, _ = rank_and_world()
    return folder / f"{stem}{f'.rank{rank}' if rank else ''}.csv"


# ------------------------------------------------------------------------- keys


def cache_stem(name: str) -> str:
    """A metric as a part of file names: "name" or "name@weights", the weights by their checksum."""
    name, _, file = name.partition("@")
    stem = re.sub(r"[^\w.+-]", "-", name)  # "-" is in no name of a module or function
    return f"{stem}-{file_digest(file)}" if file else stem


def pyiqa_version() -> str:
    try:
        return importlib.metadata.version("pyiqa")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def file_hashes(paths: Iterable[str], folder: Path) -> dict[str, str | OSError]:
    """SHA-256 of each file, or why it cannot be read; the ranks of a machine share the work.

    A hash is remembered in `folder` under the file's size, mtime, ctime and inode, unless the file
    changed within the last two seconds.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be written is no obstacle
        folder.mkdir(parents=True, exist_ok=True)
    rank, _ = rank_and_world()
    node, local_rank, local_world = machine()
    known = {tuple(row[:-1]): row[-1] for row in read_rows(folder, "sha256", len(HASH_HEADER))}
    share, found = sorted(set(paths))[local_rank::local_world], {}
    with ThreadPoolExecutor(4) as pool, \
            progress(total=len(share), desc="hash", unit="file", delay=2, disable=rank > 0) as bar:
        for i in range(0, len(share), 256):
            part = share[i : i + 256]
            hashed = list(pool.map(functools.partial(_hash_file, known=known), part))
            found |= {path: digest for path, (digest, _) in zip(part, hashed, strict=True)}
            new = [state for _, state in hashed if state]
            with contextlib.suppress(OSError):
                if new:
                    append_rows(rank_file(folder, "sha256"), HASH_HEADER, new)
            bar.update(len(part))
    return {path: digest for where, part in gather((node, found)) if where == node
            for path, digest in part.items()}


def _hash_file(path: str, known: dict[tuple, str]) -> tuple[str | OSError, tuple | None]:
    """SHA-256 of a file, and the line to remember, None if there is nothing new or it is unsafe."""

    try:
        begin, stamp = time.time_ns(), file_stamp(os.stat(path))
        line = (os.path.abspath(path), *map(str, stamp))
        if line in known:
            return known[line], None
        digest = sha256(path)
        settled = is_settled(stamp, begin) and file_stamp(os.stat(path)) == stamp
        return digest, (*line, digest) if settled else None
    except OSError as error:
        return error, None


def file_key(digest: str) -> str:
    """Key of a file's scores, from its SHA-256."""
    return digest[:16]


def output_key(checkpoint: str, lq: str) -> str:
    """Key of a network's output, from the SHA-256 of its checkpoint and of the LQ file."""
    return _text_key("output", checkpoint, lq, "whole image", "float32")


def compared_key(key: str, references: Sequence[str], crop_border: int) -> str:
    """Key of an image compared with references, from its own key and their SHA-256."""
    return _text_key(key, *references, crop_border) if references else key


def _text_key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------- the cache


class Score(NamedTuple):
    score: float
    seconds: float  # that the metric took


class ScoreCache:
    """All scores of one metric in a folder; every process opens it with the same arguments.

    known: {key: Score}, the same in all processes; `add` writes new ones, which `share` makes known
    to all.
    """

    def __init__(self, name: str, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        stem = cache_stem(name)
        if ":" not in name and name not in ("psnr", "ssim"):
            stem += f"-pyiqa{pyiqa_version()}"  # its weights and code are those of its version
        agree(f"metric {name} and its weights", stem)
        self.path = rank_file(folder, stem)
        # What the first process of each machine reads, for all: another run may be writing, and
        # machines without a shared disk keep different scores
        _, local_rank, _ = machine()
        self.known = {}
        for part in reversed(gather({} if local_rank else dict(self._read(folder, stem)))):
            self.known |= part
        self.new: dict[str, Score] = {}

    @staticmethod
    def _read(folder: Path, stem: str) -> Iterator[tuple[str, Score]]:
        for key, _, score, seconds in read_rows(folder, stem, len(SCORE_HEADER)):
            with contextlib.suppress(ValueError):
                yield key, Score(float(score), float(seconds))

    def __contains__(self, key: str) -> bool:
        return key in self.known or key in self.new

    def add(self, rows: Sequence[tuple[str, str, float, float]]) -> None:
        """Write (key, label, score, seconds), but no NaN; OSError names the file."""
        lines = [(key, " ".join(label.splitlines()), score, f"{seconds:.6f}")
                 for key, label, score, seconds in rows if not np.isnan(score)]
        if lines:
            append_rows(self.path, SCORE_HEADER, lines)
        self.new |= {key: Score(score, round(seconds, 6)) for key, _, score, seconds in rows}

    def score(
        self, metric: Callable, labels: dict[str, str], images: Tensor, gts: Tensor | None = None
    ) -> None:
        """Score images, (N, 3, H, W), by `metric` and write each score under its {key: label}.

        Against gts, (K, 3, H, W), there is one image, whose score is the mean over them.
        Raises ValueError, which names the label, for a NaN.
        """
        if images.is_cuda:
            torch.cuda.synchronize()  # what made the images has its own time
        begin = time.perf_counter()
        if gts is None:
            scores = metric(images).tolist()
        else:
            scores = [metric(images.expand_as(gts), gts).cpu().double().mean().item()]
        for label, score in zip(labels.values(), scores, strict=True):
            if math.isnan(score):
                raise ValueError(f"{label}: metric {self.name} gave {score}")
        seconds = (time.perf_counter() - begin) / len(labels)
        self.add([(key, label, score, seconds)
                  for (key, label), score in zip(labels.items(), scores, strict=True)])

    def share(self) -> None:
        """Make the new scores of every process known to all; a barrier."""
        for new in gather(self.new):
            self.known |= new
        self.new = {}


# ------------------------------------------------------------------------- scoring files


def read_or_error(path: str) -> np.ndarray | Exception:
    """An image file as uint8 (H, W, 3), or what is wrong with it."""
    try:
        with naming(path), open_image(path, (*FORMATS, "BMP")) as image:
            if image.mode != "RGB":
                return ValueError(f"mode {image.mode}; convert it to 8-bit RGB")
            return np.asarray(image)
    except (ValueError, OSError) as error:
        return ValueError(one_line(error).removeprefix(f"{path}: "))


def keep_decoded(limit: int) -> Callable[[str], np.ndarray | Exception]:
    """`read_or_error`, keeping the first images that fit in `limit` bytes for the next metric."""
    kept, room = {}, limit

    def read(path: str) -> np.ndarray | Exception:
        nonlocal room
        image = kept[path] if path in kept else read_or_error(path)
        size = getattr(image, "nbytes", limit + 1)  # an error has none
        if path not in kept and size <= room:
            kept[path], room = image, room - size
        return image

    return read


def read_batches(files: dict, batch_size: int, read: Callable) -> Iterator[list[tuple]]:
    """Batches of (id, uint8 (H, W, 3)) with images of one size, from {id: path}.

    Eight batches are decoded ahead; an image that cannot be read is an Exception instead.
    """
    ids = list(files)
    chunks = [ids[i : i + 8 * batch_size] for i in range(0, len(ids), 8 * batch_size)]
    with ThreadPoolExecutor(4) as pool:
        ahead = pool.map(read, [files[i] for i in chunks[0]])
        for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
            decoded, ahead = list(ahead), pool.map(read, [files[i] for i in following])
            by_size: dict[tuple | None, list] = {}
            for item in zip(chunk, decoded, strict=True):
                by_size.setdefault(getattr(item[1], "shape", None), []).append(item)
            for group in by_size.values():
                for i in range(0, len(group), batch_size):
                    yield group[i : i + batch_size]


def score_batch(net: nn.Module, batch: list, device: torch.device | str) -> list:
    """(quality, seconds) of each image, or the Exception that it raises on its own."""
    if isinstance(batch[0], Exception):
        return batch
    try:
        start = time.perf_counter()
        x = torch.from_numpy(np.stack(batch).transpose(0, 3, 1, 2)).to(device).float() / 255
        quality = net(x).tolist()  # waits for a GPU
        if not np.isfinite(quality).all():
            raise ValueError(f"gave a quality of {quality[:8]}")
        return [(q, (time.perf_counter() - start) / len(batch)) for q in quality]
    except Exception as error:  # whatever a third-party metric raises, the other images are scored
        if len(batch) == 1:
            return [error]
    # After the except clause, whose traceback holds the batch's tensors
    return [score_batch(net, [x], device)[0] for x in batch]


def score_images(
    name: str,
    build: Callable[[], nn.Module],
    images: dict[str, str],
    folder: Path,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    read: Callable[[str], np.ndarray | Exception] = read_or_error,
) -> Scores | None:
    """Quality of every image file; a content that `folder` holds a score of is not scored again.

    name:   of the metric; may be "name@file", the file's checksum is then part of the cache's name
    build:  () -> frozen NR-IQA, (N, 3, H, W) in [0, 1] -> (N,), up = better; called only if needed
    images: {label: path}
    batch_size: of images of one size; None: 8 on a GPU, 1 on a CPU, where batches take longer
    read:   path -> uint8 (H, W, 3), or what is wrong with it

    Under torchrun every process calls this with the same images and scores its share. Problems are
    printed: None is returned if the metric failed, Scores without an image that failed. OSError if
    a score cannot be written, ValueError if the machines hold other images.
    """
    rank, world = rank_and_world()
    batch_size = batch_size or (8 if torch.device(device).type == "cuda" else 1)
    keys, failures = _keys_of(images, folder)
    agree("the images to score", [keys.get(label) for label in images])
    cache = ScoreCache(name, folder)
    first_of = {keys[label]: label for label in reversed(keys)}
    missing = [key for key in dict.fromkeys(keys.values()) if key not in cache]
    share = {key: first_of[key] for key in missing[rank::world]}

    # Rank 0 builds first: it may download the weights
    net, error = rank_zero_first(lambda: _try_to_build(build) if share else (None, None))
    if net is not None:
        files = {key: images[label] for key, label in share.items()}
        with progress(total=len(share), desc=name, unit="image", disable=rank > 0) as bar:
            batches = read_batches(files, batch_size, read)
            failed, error = _score_batches(net, batches, share, cache, device, bar)
            failures += failed
    reports = gather((error, failures[:1]))
    cache.share()
    error = next((e for e, _ in reports if e), None)

    found = {label: cache.known[key] for label, key in keys.items() if key in cache}
    if rank == 0 and len(found) < len(images):
        first = [text for _, texts in reports for text in texts][:1]
        print(f"{name}: {len(images) - len(found)} of {len(images)} images not scored: "
              f"{error or ''.join(first)}")
    if images and (error or not found):
        return None
    # Nine digits determine a float32
    return Scores({label: float(f"{score:.9g}") for label, (score, _) in found.items()},
                  sum(cache.known[key].seconds for key in dict.fromkeys(map(keys.get, found))))


def _keys_of(images: dict[str, str], folder: Path) -> tuple[dict[str, str], list[str]]:
    """{label: key} of the files that can be read, and a line for each other."""
    hashes = file_hashes(images.values(), folder)
    keys = {label: hashes[path] for label, path in images.items()}
    return ({label: file_key(found) for label, found in keys.items() if isinstance(found, str)},
            [f"{label}: {one_line(found)}" for label, found in keys.items()
             if isinstance(found, OSError)])


def _try_to_build(build: Callable[[], nn.Module]) -> tuple[nn.Module | None, str | None]:
    try:
        return build(), None
    except Exception as error:  # no weights: the other metrics are scored all the same
        return None, one_line(error)


def _score_batches(
    net: nn.Module, batches: Iterable[list[tuple]], labels: dict[str, str], cache: ScoreCache,
    device: torch.device | str, bar: tqdm | Lines,
) -> tuple[list[str], str | None]:
    """Score batches of (key, image) and write each at once.

    Returns a line per image that failed, and why the metric failed as a whole, if it did.
    """
    failures: list[str] = []
    try:
        for batch in batches:
            rows = []
            results = score_batch(net, [image for _, image in batch], device)
            for (key, _), result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    failures.append(f"{labels[key]}: {one_line(result)}")
                else:
                    rows.append((key, labels[key], *result))
            cache.add(rows)
            bar.update(len(batch))
            if len(failures) >= HOPELESS and not cache.known and not cache.new:
                break  # it is the metric, not its images
    except OSError:  # a full disk ends all
        raise
    except Exception as error:  # no memory
        return failures, one_line(error)
    return failures, None
