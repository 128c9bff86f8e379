"""The long campaign: flipped bits, mutated images, ends of two-process runs.

    python tests/faults/campaign.py                                   # the table of RESULTS.md
    python tests/faults/campaign.py --flips 50 --images 500 --ends 5  # minutes

It prints a line per campaign and exits with 1 if one has found anything. tests/test_campaign.py and
tests/faults/test_ends.py run a sample of each.
"""

import argparse
import contextlib
import datetime
import io
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_data import make_hggt, smooth_image  # noqa: E402
from scripts import run_script  # noqa: E402

from models import checkpoint, hggt, scores  # noqa: E402
from models.cache import PixelCache  # noqa: E402
from models.checkpoint import load_file  # noqa: E402
from models.flags import new_parser  # noqa: E402
from models.images import is_plain_png, png_size, read_rgb  # noqa: E402
from models.photos import photo_size, read_photo, read_srgb  # noqa: E402
from models.scores import ScoreCache, file_hashes, read_or_error, read_rows  # noqa: E402
from tools.enhance import image_problem  # noqa: E402

TINY = ("--net", "swinir_tiny", "--data", "HGGT", "--perceptual", "laplacian", "--patch-size", 32,
        "--batch-size", 2, "--num-workers", 0, "--sampler", "rand", "--ema-decay", 0.5)


def one_line(error: Exception, path: Path) -> bool:
    """Whether an error is bad input's: one line that begins with the file."""
    text = str(error)
    return (isinstance(error, ValueError | OSError) and text.startswith(f"{path}: ")
            and "\n" not in text and text.isprintable())


# ------------------------------------------------------------------------- flipped bits


def plain(value: object) -> object:
    """A loaded value in a form that == compares bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return repr(value)


def make_states(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """{kind: (file, what loads it)} of every kind of file that a run reads back.

    A loaded value is compared with the intact one, or a part of it: lines of caches may be absent.
    """
    make_hggt(folder / "HGGT", n=2)
    train = run_script("train_sr.py", *TINY, "--init", "none", "--steps", 2, "--out", "run",
                       cwd=folder)
    tune = run_script("finetune_lora.py", *TINY, "--init", "run/net_g_ema.pt", "--lambda-q", 0,
                      "--lora-rank", 2, "--steps", 1, "--out", "ft", cwd=folder)
    assert train.returncode == tune.returncode == 0, train.stderr + tune.stderr
    data, caches = folder / "HGGT", folder / "scores"
    with mock.patch.object(checkpoint, "SETTLED_NS", -(10**12)):
        sets = hggt.load_sets(data)
        files = [path for row in sets.paths for path in row]
        file_hashes(files, caches)
    cache = ScoreCache("psnr", caches)
    cache.add([(f"{i:016x}", path, 20 + i / 7, 0.5) for i, path in enumerate(files)])
    PixelCache(folder / "pixels", sets, "key")
    listing = (data / hggt.INDEX_FILE).read_text().partition('"listing": "')[2].partition('"')[0]

    def pixels() -> dict:
        opened = PixelCache(folder / "pixels", sets, "key")
        return {(i, k): opened[i, k].copy() for i in range(2) for k in range(5)}

    def index() -> dict:
        found = hggt._read_index(data, listing)
        return vars(found) if found else {}

    return {
        "last.pt": (folder / "run/last.pt", lambda: load_file(folder / "run/last.pt")),
        "net_g_ema.pt": (folder / "run/net_g_ema.pt",
                         lambda: load_file(folder / "run/net_g_ema.pt")),
        "lora.pt": (folder / "ft/lora.pt", lambda: load_file(folder / "ft/lora.pt")),
        "index": (data / hggt.INDEX_FILE, index),
        "scores": (caches / "psnr.csv", lambda: ScoreCache("psnr", caches).known),
        "hashes": (caches / "sha256.csv",
                   lambda: {tuple(row[:-1]): row[-1]
                            for row in read_rows(caches, "sha256", len(scores.HASH_HEADER))}),
        "pixel cache": (next((folder / "pixels").glob("*.rgb")), pixels),
    }


def flip_bits(count: int, seed: int, folder: Path) -> Counter:
    """Flip one bit, `count` times, in turn in every kind of state; what loading it then does.

    Counts refused (one line), made anew (nothing, or fewer lines), harmless (the same values);
    WRONG (another value) and TRACEBACK are what must not be.
    """
    rng, seen = random.Random(seed), Counter()
    states = make_states(folder)
    intact = {kind: (path.read_bytes(), plain(load())) for kind, (path, load) in states.items()}
    for i in range(count):
        kind = [*states][i % len(states)]
        (path, load), (data, right) = states[kind], intact[kind]
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        try:
            value = plain(load())
        except Exception as error:
            outcome = "refused" if one_line(error, path) else "TRACEBACK"
        else:
            # Only caches may lose entries, which are then computed anew
            known = kind in ("index", "scores", "hashes") and value.items() <= right.items()
            outcome = "harmless" if value == right else "made anew" if known else "WRONG"
        if outcome.isupper():
            print(f"{outcome}: {kind}, byte {at}, bit {bit}")
        seen[outcome] += 1
        path.write_bytes(data)
    return seen


# ------------------------------------------------------------------------- mutated images


def image_files() -> dict[str, bytes]:
    """{name: content} of small valid images of all kinds."""
    rgb = smooth_image(np.random.default_rng(0), 24, 32)
    image, grey = Image.fromarray(rgb), Image.fromarray(rgb).convert("L")
    rgba = Image.fromarray(np.dstack([rgb, rgb[..., :1]]))
    deep = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[274] = 6
    files = {}

    def put(name: str, source: Image.Image, **options: object) -> None:
        buffer = io.BytesIO()
        kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF"}
        source.save(buffer, kinds[name.partition(".")[2]], **options)
        files[name] = buffer.getvalue()

    put("rgb.png", image)
    put("exif.png", image, exif=exif, dpi=(72, 72))
    put("palette.png", image.quantize(16), transparency=3)
    put("alpha.png", rgba)
    put("grey.png", grey)
    put("grey-alpha.png", rgba.convert("LA"))
    put("grey16.png", deep)
    put("animated.png", image, save_all=True, append_images=[image.rotate(180)])
    put("rgb.jpg", image, exif=exif, icc_profile=b"no profile" * 20)
    put("progressive.jpg", image, progressive=True)
    put("cmyk.jpg", image.convert("CMYK"))
    put("lossy.webp", image)
    put("alpha.webp", rgba, lossless=True, exif=exif)
    put("rgb.tif", image, compression="tiff_lzw")
    put("grey16.tif", deep)
    put("grey.tif", grey)
    put("alpha.tif", rgba)
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes of a file."""
    if rng.random() < 0.02:
        return rng.randbytes(len(data))
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(7), rng.randrange(len(data) or 1)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 60)]
        elif kind == 4:
            data[at : at + 8] = rng.randbytes(8)
        elif kind == 5:
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(
                [0, 1, 2**16, 2**31 - 1, 2**32 - 1]))
        elif data[:4] == b"\x89PNG" and len(data) > 33:  # another size, bits or colour
            field = rng.randrange(16, 26)
            data[field] = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def mutate_images(count: int, seed: int, folder: Path) -> Counter:
    """Read `count` mutated images in every way; counts read, refused and ESCAPED.

    An escape is anything but a result or one line that names the file.
    """
    rng, seen, files = random.Random(seed), Counter(), image_files()
    for i in range(count):
        name = [*files][i % len(files)]
        path = folder / name
        path.write_bytes(mutate(files[name], rng))
        for read in (is_plain_png, png_size, read_rgb, photo_size, read_photo, read_srgb,
                     read_or_error, lambda p: image_problem(p, 16)):
            try:
                with quiet():
                    result = read(path)
                outcome = "refused" if isinstance(result, str | Exception) else "read"
                text = str(result) if outcome == "refused" else ""
                if "\n" in text or not text.isprintable():
                    outcome = "ESCAPED"
            except BaseException as error:  # pyo3's panics are no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome, text = "refused" if one_line(error, path) else "ESCAPED", repr(error)
            if outcome == "ESCAPED":
                print(f"ESCAPED: {name}, image {i} of seed {seed}: {text[:300]}")
            seen[outcome] += 1
    return seen


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what C libraries write to stderr."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


# ------------------------------------------------------------------------- ends


def end_runs(count: int, folder: Path) -> Counter:
    """Train for two steps on two processes, `count` times; counts ended and ABORTED."""
    seen = Counter()
    if not (folder / "HGGT").exists():
        make_hggt(folder / "HGGT", n=2)
    for _ in range(count):
        shutil.rmtree(folder / "run", ignore_errors=True)
        done = run_script("train_sr.py", *TINY, "--init", "none", "--steps", 2, "--out", "run",
                          cwd=folder, processes=2)
        whole = done.returncode == 0 and (folder / "run/net_g_ema.pt").is_file()
        if not whole:
            print(f"ABORTED: exit code {done.returncode}: {done.stderr[-600:]}")
        seen["ended" if whole else "ABORTED"] += 1
    return seen


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> bool:
    """Returns whether a campaign has found anything."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                            capture_output=True, text=True).stdout.strip()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, count, run in (
                ("flipped bits", args.flips, lambda n, d: flip_bits(n, args.seed, d)),
                ("mutated images", args.images, lambda n, d: mutate_images(n, args.seed, d)),
                ("ends of two-process runs", args.ends, end_runs)):
            (Path(folder) / name).mkdir()
            found[name] = count, run(count, Path(folder) / name)
    print(f"\ncommit {commit}, {datetime.date.today()}, seed {args.seed}\n\n| campaign | trials | "
          "seen |\n|---|---|---|")
    for name, (count, seen) in found.items():
        print(f"| {name} | {count} | {', '.join(f'{n} {what}' for what, n in seen.items())} |")
    return any(what.isupper() for _, seen in found.values() for what in seen)


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--ends", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(parser.parse_args()))
