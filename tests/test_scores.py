"""models/scores.py: keys, the files of the cache, and scoring on one and two processes."""

import os
import resource
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import checkpoint, scores
from models.scores import ScoreCache, Scores, compared_key, file_hashes, output_key, score_images

ROOT = Path(__file__).resolve().parent.parent


class Brightness(torch.nn.Module):
    """The mean of each image, or `function` of the images; `calls` counts images."""

    def __init__(self, function=lambda x: x.mean((1, 2, 3))):
        super().__init__()
        self.function, self.calls = function, 0

    def forward(self, x):
        self.calls += len(x)
        return self.function(x)


def save(path: Path, level: int, side: int = 8) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path, compress_level=0)
    return str(path)


def age(*paths: str, seconds: float = 60) -> None:
    """Set the time of files into the past; only their ctime is now."""
    for path in paths:
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def settled(monkeypatch):
    """Files just written count as unchanged for long, as the kernel sets ctime."""
    monkeypatch.setattr(checkpoint, "SETTLED_NS", -(10**12))


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are read to hash them."""
    found, plain = [], scores.sha256
    monkeypatch.setattr(scores, "sha256", lambda p: found.append(Path(p).name) or plain(p))
    return found


# ------------------------------------------------------------------------- hashes


def test_a_file_is_hashed_again_only_if_it_was_touched(tmp_path, settled, hashed):
    a, b = save(tmp_path / "a.png", 1), save(tmp_path / "b, c.png", 2)
    first = file_hashes([a, b, a], tmp_path / "cache")
    assert sorted(hashed) == ["a.png", "b, c.png"]
    assert first == {path: scores.sha256(path) for path in (a, b)}
    hashed.clear()
    assert file_hashes([b, a], tmp_path / "cache") == first and not hashed

    # Size and mtime stay: ctime tells
    before = os.stat(a)
    save(tmp_path / "a.png", 3)
    os.utime(a, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(a).st_size, os.stat(a).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = file_hashes([a, b], tmp_path / "cache")
    assert hashed == ["a.png"] and second[a] != first[a] and second[b] == first[b]
    hashed.clear()
    age(b)  # touched, content unchanged
    assert file_hashes([a, b], tmp_path / "cache") == second and hashed == ["b, c.png"]


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_each_part_of_a_files_state_tells(tmp_path, settled, hashed, monkeypatch, field):
    path, plain = save(tmp_path / "a.png", 1), os.stat
    file_hashes([path], tmp_path / "cache")

    def other(file, **options):
        found = plain(file, **options)
        if file != path:
            return found
        state = {key: getattr(found, key) for key in dir(found) if key.startswith("st_")}
        return types.SimpleNamespace(**state | {field: state[field] + 1})

    monkeypatch.setattr(os, "stat", other)
    file_hashes([path], tmp_path / "cache")
    assert hashed == ["a.png"] * 2


def test_the_hash_of_a_file_that_just_changed_is_not_remembered(tmp_path, hashed):
    path = save(tmp_path / "a.png", 1)
    age(path)  # a copied time does not make it old
    for _ in range(2):
        file_hashes([path], tmp_path / "cache")
    assert hashed == ["a.png"] * 2 and not (tmp_path / "cache/sha256.csv").exists()


def test_a_cut_off_hash_is_not_taken(tmp_path, settled, hashed):
    path = save(tmp_path / "a.png", 1)
    whole = file_hashes([path], tmp_path)
    memory = tmp_path / "sha256.csv"
    memory.write_text(memory.read_text()[:-9])
    assert file_hashes([path], tmp_path) == whole and len(hashed) == 2
    assert file_hashes([path], tmp_path) == whole and len(hashed) == 2


def test_unreadable_files_are_told_apart(tmp_path):
    path = save(tmp_path / "a.png", 1)
    found = file_hashes([path, str(tmp_path / "gone.png"), str(tmp_path)], tmp_path / "cache")
    assert isinstance(found[path], str)
    assert isinstance(found[str(tmp_path / "gone.png")], FileNotFoundError)
    assert isinstance(found[str(tmp_path)], IsADirectoryError)


def test_a_read_only_cache_serves_what_it_has(tmp_path, monkeypatch):
    def refuse(path, header, rows):
        raise PermissionError(path)

    images = {"a": save(tmp_path / "a.png", 1)}
    first = score_images("m:mean", Brightness, images, tmp_path / "cache")
    monkeypatch.setattr(scores, "append_rows", refuse)
    monkeypatch.setattr(checkpoint, "SETTLED_NS", -(10**12))  # there is a hash to remember
    assert score_images("m:mean", None, images, tmp_path / "cache") == first


# ------------------------------------------------------------------------- keys


def test_what_a_key_depends_on():
    keys = [output_key("a", "b"), output_key("b", "a"), output_key("a", "c"),
            compared_key(output_key("a", "b"), ["x", "y"], 4),
            compared_key(output_key("a", "b"), ["x"], 4),
            compared_key(output_key("a", "b"), ["x", "y"], 0),
            compared_key(output_key("a", "c"), ["x", "y"], 4)]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert compared_key("k", [], 4) == "k"


# ------------------------------------------------------------------------- the files


def test_scores_are_kept_to_the_bit_and_labels_are_only_labels(tmp_path):
    cache = ScoreCache("psnr", tmp_path)
    values = {"k0": 27.12345678901234, "k1": float("inf"), "k2": -0.1, "k3": 1e-9}
    for (key, value), label in zip(values.items(), ("a, b", 'c"d', "e\nf", "é"), strict=True):
        cache.add([(key, label, value, 0.5)])
    cache.add([("nan", "nan", float("nan"), 0.5)])
    assert "nan" in cache  # known in this run, but not kept
    found = ScoreCache("psnr", tmp_path).known
    assert {key: score for key, (score, _) in found.items()} == values
    lines = (tmp_path / "psnr.csv").read_text().split("\n")
    assert lines[0] == "key,image,score,seconds,crc32" and len(lines) == 1 + 4 + 1
    assert lines[1].startswith('k0,"a, b",27.12345678901234,0.500000,')


def test_wherever_a_kill_cuts_the_last_line_the_rest_is_kept(tmp_path):
    paths = {name: save(tmp_path / f"{name}.png", 9 * i) for i, name in enumerate("abc")}
    straight = score_images("m:mean", Brightness, paths, tmp_path)
    file = tmp_path / "m-mean.csv"
    whole = file.read_text()
    begin = whole.rstrip("\n").rindex("\n") + 1
    for cut in range(begin, len(whole) + 1):
        file.write_text(whole[:cut])
        net = Brightness()
        found = score_images("m:mean", lambda net=net: net, paths, tmp_path)
        assert found.quality == straight.quality
        assert net.calls == (cut < len(whole) - 1)  # all but the line's end
        net = Brightness()
        assert score_images("m:mean", lambda net=net: net, paths, tmp_path).quality == found.quality
        assert net.calls == 0


def test_other_weights_have_another_file(tmp_path):
    weights = tmp_path / "w.pt"
    image = {"a": save(tmp_path / "a.png", 1)}
    for content, calls in ((b"one", 1), (b"two", 1), (b"one", 0)):
        weights.write_bytes(content)
        net = Brightness()
        score_images(f"m:mean@{weights}", lambda net=net: net, image, tmp_path / "cache")
        assert net.calls == calls
    assert len(list((tmp_path / "cache").glob("m-mean-*.csv"))) == 2


def test_a_full_disk_is_named(tmp_path):
    """A file size limit stands for it."""
    images, size = {"a": save(tmp_path / "a.png", 1)}, 10**5
    (tmp_path / "m-mean.csv").write_text("x" * (size - 10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match=r"mean\.csv: File too large"):
            score_images("m:mean", Brightness, images, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    net = Brightness()
    assert score_images("m:mean", lambda: net, images, tmp_path) and net.calls == 1


# ------------------------------------------------------------------------- score_images


def test_equal_content_is_scored_once_whatever_its_name(tmp_path):
    images = {name: save(tmp_path / f"{name}.png", level) for name, level in
              (("a", 10), ("b", 20), ("copy of a", 10))}
    net = Brightness()
    found = score_images("m:mean", lambda: net, images, tmp_path / "cache")
    assert net.calls == 2 and found.quality["a"] == found.quality["copy of a"]
    assert list(found.quality) == list(images)
    os.rename(images["b"], tmp_path / "renamed.png")
    again = score_images("m:mean", None, {"r": str(tmp_path / "renamed.png")}, tmp_path / "cache")
    assert again.quality == {"r": found.quality["b"]}
    assert again.seconds <= found.seconds
    save(tmp_path / "a.png", 30)  # another content under the old name, of equal size
    age(images["a"])
    found = score_images("m:mean", lambda: net, images | {"b": str(tmp_path / "renamed.png")},
                         tmp_path / "cache")
    assert net.calls == 3 and found.quality["a"] == pytest.approx(30 / 255)


def test_an_unreadable_file_is_a_failure_of_its_own(tmp_path, capsys):
    images = {"a": save(tmp_path / "a.png", 1), "gone": str(tmp_path / "gone.png")}
    found = score_images("m:mean", Brightness, images, tmp_path / "cache")
    assert list(found.quality) == ["a"]
    assert np.isnan(found.of(np.array(["gone"], object))).all()
    assert capsys.readouterr().out == ("m:mean: 1 of 2 images not scored: gone: [Errno 2] No such "
                                       f"file or directory: '{tmp_path}/gone.png'\n")
    assert score_images("m:mean", Brightness, {"gone": images["gone"]}, tmp_path / "cache") is None


def large_only(x):
    if x.shape[-1] < 16:
        raise RuntimeError("image too small")
    return x.mean((1, 2, 3))


def test_failures_of_single_images_and_of_metrics(tmp_path, capsys):
    images = {f"{i}.png": save(tmp_path / f"{i}.png", 100 + i, side)
              for i, side in enumerate((16, 8, 16))}
    (tmp_path / "3.png").write_bytes(b"not an image")
    images["3.png"] = str(tmp_path / "3.png")

    def score(name, function):
        found = score_images(name, lambda: Brightness(function), images, tmp_path / "cache",
                             batch_size=8)
        text = capsys.readouterr().out
        assert text.count("\n") == 1
        return found, text

    found, text = score("large", large_only)
    assert list(found.quality) == ["0.png", "2.png"]
    assert found.quality["2.png"] == pytest.approx(0.4)
    assert text.startswith("large: 2 of 4 images not scored: 1.png: RuntimeError: image too small")
    # A metric that takes one image at a time
    found, text = score("single", lambda x: x.mean((1, 2, 3)) if len(x) == 1 else 1 / 0)
    assert list(found.quality) == ["0.png", "1.png", "2.png"]
    assert "1 of 4 images not scored: 3.png: unreadable image" in text
    found, text = score("nan", lambda x: torch.full((len(x),), torch.nan))
    assert found is None and "4 of 4 images not scored: 0.png: gave a quality of [nan" in text

    def absent():
        raise OSError("weights are missing")

    assert score_images("absent", absent, images, tmp_path / "cache") is None
    assert capsys.readouterr().out == "absent: 4 of 4 images not scored: weights are missing\n"


@pytest.mark.parametrize("bad, given_up", [(12, False), (70, True)])
def test_a_metric_is_given_up_after_many_failures_without_a_success(tmp_path, bad, given_up):
    images = {}
    for i in range(bad):
        images[f"a{i:02}"] = str(tmp_path / f"a{i:02}.png")
        Path(images[f"a{i:02}"]).write_text(f"not an image, {i}")
    images["z"] = save(tmp_path / "z.png", 100)
    found = score_images("m:mean", Brightness, images, tmp_path / "cache")
    assert found is None if given_up else list(found.quality) == ["z"]


def test_images_of_several_sizes_are_scored_in_batches_and_once(tmp_path, monkeypatch):
    batches, plain = [], scores.score_batch
    monkeypatch.setattr(scores, "score_batch", lambda net, batch, device: (
        batches.append([len(x) for x in batch]), plain(net, batch, device))[1])
    sides = (32, 24, 32, 32, 40, 24)
    images = {f"data/{i}, image.png": save(tmp_path / f"{i}, image.png", 20 * i, side)
              for i, side in enumerate(sides)}
    found = score_images("m:mean", Brightness, images, tmp_path / "cache", batch_size=2)
    assert sorted(batches) == [[24, 24], [32], [32, 32], [40]]
    for i, q in enumerate(found.quality.values()):
        assert q == pytest.approx(20 * i / 255, rel=1e-6)
    assert score_images("m:mean", None, images, tmp_path / "cache") == found  # with its seconds


def test_an_image_is_decoded_once_for_several_metrics_as_far_as_memory_allows(tmp_path,
                                                                               monkeypatch):
    images = {str(i): save(tmp_path / f"{i}.png", 20 * i + 10, 32) for i in range(4)}
    (tmp_path / "broken.png").write_text("none")
    images["broken"] = str(tmp_path / "broken.png")
    opened, plain = [], scores.read_or_error
    monkeypatch.setattr(scores, "read_or_error", lambda path: (opened.append(path), plain(path))[1])
    for room, count in ((10**6, 4), (2 * 32 * 32 * 3, 2 + 3 * 2), (0, 3 * 4)):
        opened.clear()
        read = scores.keep_decoded(room)
        for _ in range(3):
            decoded = [read(path) for path in images.values()]
        for image, path in zip(decoded[:4], images.values(), strict=False):
            assert (image == plain(path)).all()
        assert isinstance(decoded[4], ValueError) and opened.count(images["broken"]) == 3
        assert len(opened) - 3 == count
    opened.clear()
    del images["broken"]
    read = scores.keep_decoded(10**6)
    for name in ("one", "another"):
        score_images(name, Brightness, images, tmp_path / "cache", read=read)
    assert len(opened) == 4


def test_nothing_to_score(tmp_path):
    assert score_images("m:mean", None, {}, tmp_path) == Scores({}, 0)


WORKER = """
import json, sys
from pathlib import Path
import torch
from models.distributed import cleanup, init_distributed
from models.scores import score_images

class Brightness(torch.nn.Module):
    def forward(self, x):
        with open(f"calls{rank}", "a") as file:
            file.write("x" * len(x))
        return x.mean((1, 2, 3))

rank, world, device = init_distributed()
images = {path.stem: str(path) for path in Path("images").iterdir()}
found = score_images("m:mean", Brightness, images, Path("cache"), device)
Path(f"found{rank}.json").write_text(json.dumps(found.quality, sort_keys=True))
cleanup()
"""


def test_two_processes_share_the_work_and_one_resumes_it(tmp_path):
    for i in range(7):
        save(tmp_path / f"images/{i}.png", 10 * i)
    save(tmp_path / "images/copy.png", 10)
    (tmp_path / "worker.py").write_text(WORKER)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", "worker.py"], cwd=tmp_path, env=env, check=True,
                   timeout=120, capture_output=True)
    calls = [len((tmp_path / f"calls{rank}").read_text()) for rank in (0, 1)]
    assert calls == [4, 3]
    assert (tmp_path / "found0.json").read_text() == (tmp_path / "found1.json").read_text()
    images = {path.stem: str(path) for path in (tmp_path / "images").iterdir()}
    net = Brightness()
    assert len(score_images("m:mean", lambda: net, images, tmp_path / "cache").quality) == 8
    assert net.calls == 0
    (tmp_path / "cache/m-mean.rank1.csv").unlink()
    assert len(score_images("m:mean", lambda: net, images, tmp_path / "cache").quality) == 8
    assert net.calls == 3
