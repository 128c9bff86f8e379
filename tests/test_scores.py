"""models/scores.py: keys, the files of the cache, and scoring on one and two processes."""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import scores
from models.scores import ScoreCache, Scores, compared_key, file_hashes, output_key, score_images

ROOT = Path(__file__).resolve().parent.parent


class Brightness(torch.nn.Module):
    """The mean of each image; `calls` counts images."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += len(x)
        return x.mean((1, 2, 3))


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
    monkeypatch.setattr(scores, "SETTLED_NS", -(10**12))


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
    hashed.clear()
    os.rename(a, tmp_path / "old.png")  # another inode
    shutil.copy2(tmp_path / "old.png", a)
    assert file_hashes([a], tmp_path / "cache") == {a: second[a]} and hashed == ["a.png"]


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
    first = score_images("mean", Brightness, images, tmp_path / "cache")
    monkeypatch.setattr(scores, "append_rows", refuse)
    monkeypatch.setattr(scores, "SETTLED_NS", -(10**12))  # there is a hash to remember
    assert score_images("mean", None, images, tmp_path / "cache") == first


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
    assert lines[0] == "key,image,score,seconds" and len(lines) == 1 + 4 + 1
    assert lines[1] == 'k0,"a, b",27.12345678901234,0.500000'


def test_wherever_a_kill_cuts_the_last_line_the_rest_is_kept(tmp_path):
    paths = {name: save(tmp_path / f"{name}.png", 9 * i) for i, name in enumerate("abc")}
    straight = score_images("mean", Brightness, paths, tmp_path)
    file = tmp_path / "mean.csv"
    whole = file.read_text()
    begin = whole.rstrip("\n").rindex("\n") + 1
    for cut in range(begin, len(whole) + 1):
        file.write_text(whole[:cut])
        net = Brightness()
        found = score_images("mean", lambda net=net: net, paths, tmp_path)
        assert found.quality == straight.quality
        # Cut within the seconds or after, the score is whole
        assert net.calls == (cut <= whole.rindex(",") + 1)
        net = Brightness()
        assert score_images("mean", lambda net=net: net, paths, tmp_path).quality == found.quality
        assert net.calls == 0


def test_other_weights_have_another_file(tmp_path):
    weights = tmp_path / "w.pt"
    image = {"a": save(tmp_path / "a.png", 1)}
    for content, calls in ((b"one", 1), (b"two", 1), (b"one", 0)):
        weights.write_bytes(content)
        net = Brightness()
        score_images(f"own:mean@{weights}", lambda net=net: net, image, tmp_path / "cache")
        assert net.calls == calls
    assert len(list((tmp_path / "cache").glob("own_mean-*.csv"))) == 2


def test_a_full_disk_is_named(tmp_path):
    """A file size limit stands for it."""
    images, size = {"a": save(tmp_path / "a.png", 1)}, 10**5
    (tmp_path / "mean.csv").write_text("x" * (size - 10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match=r"mean\.csv: File too large"):
            score_images("mean", Brightness, images, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    net = Brightness()
    assert score_images("mean", lambda: net, images, tmp_path) and net.calls == 1


# ------------------------------------------------------------------------- score_images


def test_equal_content_is_scored_once_whatever_its_name(tmp_path):
    images = {name: save(tmp_path / f"{name}.png", level) for name, level in
              (("a", 10), ("b", 20), ("copy of a", 10))}
    net = Brightness()
    found = score_images("mean", lambda: net, images, tmp_path / "cache")
    assert net.calls == 2 and found.quality["a"] == found.quality["copy of a"]
    assert list(found.quality) == list(images)
    os.rename(images["b"], tmp_path / "renamed.png")
    again = score_images("mean", None, {"r": str(tmp_path / "renamed.png")}, tmp_path / "cache")
    assert again.quality == {"r": found.quality["b"]}
    assert again.seconds <= found.seconds
    save(tmp_path / "a.png", 30)  # another content under the old name, of equal size
    age(images["a"])
    found = score_images("mean", lambda: net, images | {"b": str(tmp_path / "renamed.png")},
                         tmp_path / "cache")
    assert net.calls == 3 and found.quality["a"] == pytest.approx(30 / 255)


def test_an_unreadable_file_is_a_failure_of_its_own(tmp_path, capsys):
    images = {"a": save(tmp_path / "a.png", 1), "gone": str(tmp_path / "gone.png")}
    found = score_images("mean", Brightness, images, tmp_path / "cache")
    assert list(found.quality) == ["a"]
    assert np.isnan(found.of(np.array(["gone"], object))).all()
    assert capsys.readouterr().out == ("mean: 1 of 2 images not scored: gone: [Errno 2] No such "
                                       f"file or directory: '{tmp_path}/gone.png'\n")
    assert score_images("mean", Brightness, {"gone": images["gone"]}, tmp_path / "cache") is None


def test_nothing_to_score(tmp_path):
    assert score_images("mean", None, {}, tmp_path) == Scores({}, 0)


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
found = score_images("mean", Brightness, images, Path("cache"), device)
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
    assert len(score_images("mean", lambda: net, images, tmp_path / "cache").quality) == 8
    assert net.calls == 0
    (tmp_path / "cache/mean.rank1.csv").unlink()
    assert len(score_images("mean", lambda: net, images, tmp_path / "cache").quality) == 8
    assert net.calls == 3
