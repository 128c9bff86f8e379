"""Quality of many images, each scored once: batched by size, cached, shared among processes.

A score is written to a CSV as soon as it is known, so that an interrupted run goes on where it was,
and the samplers and the analysis never score an image twice. Several metrics may count as one, by
the mean of their standardised scores.
"""

import contextlib
import csv
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

Array = TypeVar("Array", np.ndarray, Tensor)


class Scores(NamedTuple):
    quality: dict[str, float]  # by image key, up = better; an image that failed is absent
    seconds: float  # the metric's own time for these images, when they were scored

    def of(self, keys: np.ndarray) -> np.ndarray:
        """Qualities in the shape of the keys, NaN for an image that failed."""
        return np.array([self.quality.get(k, np.nan) for k in keys.flat]).reshape(keys.shape)


def cache_stem(name: str) -> str:
    """File name of a metric's cache: "name" or "name@weights", the weights by their checksum."""
    name, _, file = name.partition("@")
    stem = re.sub(r"[^\w.+-]", "_", name)
    return f"{stem}-{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}" if file else stem


def one_line(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:400]


def read_scores(folder: Path, stem: str) -> dict[tuple[str, int], tuple[float, float]]:
    """{(image key, bytes): (quality, seconds)} from the files of all ranks of this and past runs.

    A line that was cut short lacks a column and is passed over, or lacks digits of its seconds.
    """
    known = {}
    for file in sorted([*folder.glob(f"{stem}.csv"), *folder.glob(f"{stem}.rank*.csv")]):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, csv.Error):  # header or cut line
                image, size, quality, seconds = next(csv.reader([line]), ())
                known[image, int(size)] = float(quality), float(seconds)
    return known


def read_or_error(path: str) -> np.ndarray | Exception:
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                return ValueError(f"mode {image.mode}; convert it to 8-bit RGB")
            return np.asarray(image)
    except (ValueError, OSError, SyntaxError) as error:  # Pillow: SyntaxError for broken PNGs
        return ValueError(f"unreadable image ({error})")


def keep_decoded(limit: int) -> Callable[[str], np.ndarray | Exception]:
    """`read_or_error`, keeping the first images that fit in `limit` bytes for the next metric."""
    kept, room = {}, limit

    def read(path: str) -> np.ndarray | Exception:
        nonlocal room
        image = kept[path] if path in kept else read_or_error(path)
        size = getattr(image, "nbytes", limit + 1)  # none of an error
        if path not in kept and size <= room:
            kept[path], room = image, room - size
        return image

    return read


def read_batches(files: dict, batch_size: int, read: Callable) -> Iterator[list[tuple]]:
    """Batches of (id, uint8 (H, W, 3)) with images of one size, from {id: path}.

    Eight batches are decoded ahead; instead of an image that can't be read there is an Exception.
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
    except Exception as error:  # whatever a third-party metric raises, the others go on
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
    """Quality of every image; only what `folder` does not hold yet is scored.

    name:   of the metric; may be "name@file", then the file's checksum is part of the cache's name
    build:  () -> frozen NR-IQA, (N, 3, H, W) in [0, 1] -> (N,), up = better; called only if needed
    images: {key: path}; the key and the file's size address the cache
    batch_size: of images of one size; None: 8 on a GPU, 1 on a CPU, where batches take longer
    folder: for <metric>.csv, and <metric>.rankN.csv of the other processes
    rank, world, gather: of several processes; gather(item) -> the items of all ranks, a barrier.
            Every rank calls this with the same images and scores its share of the missing ones
    read:   path -> uint8 (H, W, 3), or what is wrong with it

    What goes wrong is printed: None is returned if the metric failed, Scores without an image that
    failed. OSError if a score cannot be written.
    """
    from models.distributed import gather, rank_and_world
    rank, world = rank_and_world()
    batch_size = batch_size or (8 if torch.device(device).type == "cuda" else 1)
    stem = cache_stem(name)
    folder.mkdir(parents=True, exist_ok=True)
    files = {(key, os.path.getsize(path)): path for key, path in images.items()}
    # As rank 0 reads it, for all: another run may be writing to the same folder
    known = gather(read_scores(folder, stem) if rank == 0 else None)[0]
    missing = sorted(files.keys() - known.keys())
    error, failures, n_scored = None, [], 0
    mine, net = {i: files[i] for i in missing[rank::world]}, None
    for turn in (rank == 0, rank > 0):  # rank 0 first: it may download the weights
        if turn and mine:
            try:
                net = build()
            except Exception as e:  # no weights: the other metrics go on
                error = one_line(e)
        gather()
    if net is not None:
        file = folder / f"{stem}{f'.rank{rank}' if rank else ''}.csv"
        try:
            end = file.read_bytes()[-1:] if file.is_file() else b""
            with open(file, "a", newline="", encoding="utf-8") as log, \
                    tqdm(total=len(mine), desc=name, unit="image", disable=rank > 0) as bar:
                writer = csv.writer(log, lineterminator="\n")
                if end != b"\n":  # a new file, or one whose last line a kill cut short
                    log.write("\n" if end else "image,bytes,quality,seconds\n")
                for batch in read_batches(mine, batch_size, read):
                    results = score_batch(net, [image for _, image in batch], device)
                    for (image_id, _), result in zip(batch, results, strict=True):
                        if isinstance(result, Exception):
                            failures.append(f"{image_id[0]}: {one_line(result)}")
                        else:
                            writer.writerow([*image_id, f"{result[0]:.9g}", f"{result[1]:.6f}"])
                            n_scored += 1
                    log.flush()  # a kill loses one batch
                    bar.update(len(batch))
                    if len(failures) >= 64 and not known and not n_scored:
                        break  # it is the metric, not its images
        except OSError as e:  # a full disk: all ends; the error of a write does not name its file
            raise OSError(f"{file}: {e.strerror or e}") from e
        except Exception as e:  # no memory
            error = one_line(e)
    if missing:
        reports = gather((error, *failures[:1]))
        error = next((r[0] for r in reports if r[0]), None)
        failures = [text for r in reports for text in r[1:]]
        known = read_scores(folder, stem)
    found = {i[0]: known[i] for i in files if i in known}
    if rank == 0 and len(found) < len(files):
        print(f"{name}: {len(files) - len(found)} of {len(files)} images not scored: "
              f"{error or ''.join(failures[:1])}")
    if files and (error or not found):
        return None
    return Scores({key: q for key, (q, _) in found.items()}, sum(s for _, s in found.values()))
