"""models/cache.py and --cache: the same samples, never a stale or half-made file."""

import functools
import multiprocessing
import os
import resource
import time
from unittest import mock

import numpy as np
import pytest
from make_data import make_hggt, smooth_image
from PIL import Image
from torch.utils.data import DataLoader

import train_sr
from models import cache, hggt
from models.cache import PixelCache
from models.checkpoint import load_file
from models.dataset import MultiGTDataset, StepBatchSampler
from models.degradations import degrade_patch, usm_sharpen
from models.hggt import load_sets
from models.images import read_rgb
from models.quality import image_digest
from models.samplers import sampling_weights
from tools import check

SIZES = ((96, 120), (101, 96), (150, 133))  # height, width


@pytest.fixture
def data(tmp_path):
    """Three labelled sets of different sizes."""
    make_hggt(tmp_path / "HGGT", n=3)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "HGGT").rglob("*.png")):
        Image.fromarray(smooth_image(rng, *SIZES[int(path.name[3:5])])).save(path)
    return tmp_path / "HGGT"


def cache_of(root, folder, decode=read_rgb):
    with mock.patch.object(hggt, "read_rgb", decode):
        sets = load_sets(root)
        return PixelCache(folder, sets, image_digest(sets, root / ".scores"))


def assert_right(pixels, root):
    for i, row in enumerate(load_sets(root).paths):
        for k, path in enumerate(row):
            assert np.array_equal(pixels[i, k], np.asarray(Image.open(path))), path


@pytest.mark.parametrize("setting", ["one_round", "two_round"])
def test_samples_are_those_without(data, tmp_path, setting):
    sets, pixels = load_sets(data), cache_of(data, tmp_path / "cache")
    quality = np.random.default_rng(1).uniform(0, 100, (3, 5))
    for sampler in train_sr.SAMPLERS:
        weights = sampling_weights(sampler, sets.labels, quality, 10.0, (3, 5))
        for prepare in (None, usm_sharpen) if sampler == "origs_only" else (None,):
            plain, cached = (
                MultiGTDataset(sets, weights, 64, 3, functools.partial(degrade_patch,
                                                                       setting=setting),
                               prepare=prepare, cache=c) for c in (None, pixels))
            steps = StepBatchSampler(1, 4, 3, 0, 1)
            loaded = [
                list(DataLoader(draws, batch_sampler=steps, num_workers=workers,
                                multiprocessing_context="fork" if workers else None))
                for draws in (plain, cached) for workers in ((0, 2) if draws is cached else (0,))]
            for first, *others in zip(*loaded, strict=True):
                for other in others:
                    for key in first:
                        assert (first[key] == other[key]).all(), (sampler, key)


def test_only_crops_are_read_and_nothing_is_written(data, tmp_path):
    pixels = cache_of(data, tmp_path)
    assert pixels[1, 2].base is not None and not pixels[1, 2].flags.writeable
    assert_right(pixels, data)
    again = cache_of(data, tmp_path, decode=None)  # nothing to decode
    assert_right(again, data)
    assert len(list(tmp_path.glob("*.rgb"))) == 1 and not list(tmp_path.glob("*.part"))


def test_changed_images_are_decoded_again(data, tmp_path):
    before = cache_of(data, tmp_path)
    path = load_sets(data).paths[1][0]
    stat, changed = os.stat(path), np.asarray(Image.open(path))[::-1]
    Image.fromarray(changed).save(path, compress_level=0)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))  # the size tells
    assert_right(cache_of(data, tmp_path), data)
    stat = os.stat(path)
    Image.fromarray(changed[:, ::-1]).save(path, compress_level=0)
    assert os.stat(path).st_size == stat.st_size
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))  # the content tells
    assert_right(cache_of(data, tmp_path), data)
    assert len(list(tmp_path.glob("*.rgb"))) == 3
    assert not np.array_equal(before[1, 0], read_rgb(path))  # a running process keeps its old file
    # Added, and the labels alone
    for folder in ("original", "01", "02", "03", "04"):
        source = data / f"Train/images/0-4/{folder}"
        suffix = "" if folder == "original" else f"_{folder}"
        os.link(source / f"img00{suffix}.png", source / f"img03{suffix}.png")
    for annotator in "ABC":
        votes = data / f"Train/labels/0-4/{annotator}"
        (votes / "img03.json").write_text((votes / "img00.json").read_text())
    assert_right(cache_of(data, tmp_path), data)
    assert len(list(tmp_path.glob("*.rgb"))) == 4
    (votes / "img03.json").write_text((votes / "img01.json").read_text())
    cache_of(data, tmp_path, decode=None)


def test_an_interrupted_build_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 4)
    decoded = []

    def decode(path):
        if len(decoded) == 10:
            raise KeyboardInterrupt
        decoded.append(path)
        return read_rgb(path)

    with pytest.raises(KeyboardInterrupt):
        cache_of(data, tmp_path, decode)
    assert not list(tmp_path.glob("*.rgb"))
    part, = tmp_path.glob("*.part")
    # The machine went down: all of the block that was not waited for is noise.
    sizes = [3 * h * w for h, w in SIZES for _ in range(5)]
    assert part.stat().st_size >= sum(sizes[:8])
    with open(part, "r+b") as file:
        file.seek(sum(sizes[:8]))
        file.truncate()
        file.write(b"\x07" * sum(sizes[8:12]))
    done, decoded = len(decoded), []
    assert_right(cache_of(data, tmp_path, lambda p: decoded.append(p) or read_rgb(p)), data)
    assert done >= 10 and len(decoded) == 15 - 8 and not list(tmp_path.glob("*.part"))


def slow_decode(log, path):
    with open(log, "a") as file:
        file.write(f"{path}\n")
    time.sleep(0.05)
    return read_rgb(path)


def test_processes_at_once_decode_once(data, tmp_path):
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    args = (data, tmp_path / "cache", functools.partial(slow_decode, log))
    processes = [fork.Process(target=cache_of, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 15
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert_right(cache_of(*args[:2], decode=None), data)


def test_too_little_room_and_a_damaged_file(data, tmp_path, monkeypatch):
    usage = cache.shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"15 decoded images need 0.000\d+ GB, 0.0001 GB are free"):
        cache_of(data, tmp_path / "cache", decode=None)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    cache_of(data, tmp_path / "cache")
    file, = (tmp_path / "cache").iterdir()
    os.truncate(file, 1000)
    with pytest.raises(ValueError, match="has 1000 bytes, not 617550; delete it"):
        cache_of(data, tmp_path / "cache")


def test_a_run_with_it_and_resumed_without_equals_one_without(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def train(out, *flags):
        train_sr.main(train_sr.parse_args([
            "--net", "swinir_tiny", "--data", str(data), "--sampler", "rand", "--batch-size", "2",
            "--perceptual", "laplacian", "--patch-size", "32", "--log-every", "1", "--out", out,
            "--num-workers", "0", "--lr", "1e-3", "--init", "none", *flags]))

    train("plain", "--steps", "3")
    train("cached", "--steps", "2", "--cache", "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    train("cached", "--steps", "3")
    assert (tmp_path / "plain/log.csv").read_text() == (tmp_path / "cached/log.csv").read_text()
    a, b = (load_file(tmp_path / out / "last.pt")["params"] for out in ("plain", "cached"))
    assert all((a[key] == b[key]).all() for key in a)


def test_one_flipped_bit_is_found_at_start_and_by_the_check(data, tmp_path, monkeypatch, capsys):
    cache_of(data, tmp_path / "cache")
    file, = (tmp_path / "cache").iterdir()
    intact = file.read_bytes()
    for at in (0, 300_000, len(intact) - 1):  # a pixel, another, a checksum
        file.write_bytes(intact[:at] + bytes([intact[at] ^ 4]) + intact[at + 1 :])
        with pytest.raises(ValueError, match=r"\.rgb: is damaged at image \d+; delete it"):
            cache_of(data, tmp_path / "cache")
    # Of more than CHECKED images, the check reads all
    monkeypatch.setattr(cache, "CHECKED", 2)  # the first and the last
    file.write_bytes(intact[:300_000] + b"!!" + intact[300_002:])
    assert cache_of(data, tmp_path / "cache") is not None
    flags = ["--data", str(data), "--cache", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match="is damaged at image"):
        check.main(check.parse_args(flags))
    file.write_bytes(intact)
    check.main(check.parse_args(flags))
    assert "15 images as their checksums say" in capsys.readouterr().out


def test_a_full_disk_names_the_file(data, tmp_path):
    """A file size limit stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"\.part: File too large"):
            cache_of(data, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_right(cache_of(data, tmp_path / "cache"), data)
