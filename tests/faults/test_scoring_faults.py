"""The same for evaluate.py and analyze_iqa.py: whatever happens, finished scores are kept."""

import csv
import os
import re
import shutil
import signal
import time

import pytest
import torch
from make_data import make_hggt
from PIL import Image
from test_faults import leftovers, one_line, said, start, wait_for
from test_train import run

from models.checkpoint import save_atomic
from models.rrdb import RRDBNet

IMAGES = 7  # neither two nor three processes have equal shares


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A test set, a training set with a manifest of pairs, a network, and undisturbed tables."""
    folder = tmp_path_factory.mktemp("scoring")
    make_hggt(folder / "gt", n=IMAGES, test=True)
    make_hggt(folder / "HGGT", n=IMAGES)
    (folder / "lq").mkdir()
    for path in (folder / "gt/images/original").iterdir():
        with Image.open(path) as image:
            image.resize((16, 16), Image.Resampling.BICUBIC).save(folder / "lq" / path.name)
    torch.manual_seed(0)
    for name in "ab":
        net = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)
        save_atomic({"params_ema": net.state_dict()}, folder / f"{name}.pt")
    with open(folder / "HGGT/pairs.csv", "w") as file:
        file.write("image1,image2,score\n")
        for i in range(IMAGES):
            for k in range(1, 5):
                image = f"Train/images/0-4/{{}}/img{i:02d}{{}}.png"
                pair = image.format("original", ""), image.format(f"0{k}", f"_0{k}")
                file.write(f"{','.join(pair)},{(3 * i + k) % 10 / 10}\n")
    run(*evaluation("straight-evaluation"), cwd=folder)
    run(*analysis("straight-analysis"), cwd=folder)
    return folder


def evaluation(out, *more):
    return ("evaluate.py", "--models", "A=a.pt", "B=b.pt", "--gt", "gt", "--lq", "lq", "--metrics",
            "psnr", "ssim", "--extra", "q=faults.metrics:slow", "--out", f"{out}/t.csv", *more)


def analysis(out, *more):
    return ("analyze_iqa.py", "--pairs", "HGGT/pairs.csv", "--sets", "HGGT", "--batch-size", 1,
            "--metrics", "q=faults.metrics:slow", "r=faults.metrics:quick", "--reference", "q",
            "--out", out, *more)


def lines(out, metric="*"):
    """(metric, key) of every score in the cache, whichever process wrote it."""
    found = []
    for file in sorted((out / "scores").glob(f"{metric}.csv")):
        if not file.name.startswith("sha256."):
            metric = re.sub(r"\.rank\d+$", "", file.stem)
            found += [(metric, row[0]) for row in csv.reader(file.open())
                      if len(row) == 5 and row[0] != "key"]
    return found


def tables(out):
    """All tables without the column of the time that the metric took."""
    found = {}
    for file in out.glob("*.csv"):
        rows = [row for row in csv.reader(file.open()) if not row[0].startswith("#")]
        keep = [i for i, name in enumerate(rows[0]) if name != "seconds"]
        found[file.name] = [[row[i] for i in keep] for row in rows]
    return found


@pytest.mark.parametrize("flags", [evaluation, analysis])
def test_a_stopped_or_killed_run_is_resumed_by_the_same_command(base, flags):
    out, straight = base / f"stopped-{flags.__name__}", tables(base / f"straight-{flags.__name__}")
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        before = len(lines(out))
        process = start(*flags(out.name), cwd=base)
        wait_for(lambda before=before: len(lines(out)) > before + 2, process)
        begin = time.monotonic()
        os.killpg(process.pid, number)
        stderr = process.communicate(timeout=60)[1]
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 0 and time.monotonic() - begin < 10, stderr[-1500:]
            assert "stopped by a signal" in one_line(stderr)
        assert tables(out) != straight
    run(*flags(out.name), cwd=base)
    assert tables(out) == straight and not leftovers(out)
    assert len(lines(out)) == len(set(lines(out)))  # no image was scored twice
    assert set(lines(out)) == set(lines(base / f"straight-{flags.__name__}"))


@pytest.mark.parametrize("processes", [2, 3])
def test_tables_do_not_depend_on_the_number_of_processes(base, processes):
    out = base / f"world{processes}"
    run(*evaluation(out.name), cwd=base, processes=processes)
    ranks = ["", *(f".rank{rank}" for rank in range(1, processes))]
    shares = [len(lines(out, f"ssim{rank}")) for rank in ranks]
    assert sum(shares) == 2 * IMAGES and max(shares) - min(shares) == 2  # of 7, in each of two rows
    assert len(lines(out)) == len(set(lines(out)))
    assert set(lines(out)) == set(lines(base / "straight-evaluation"))
    for name in ("t.csv", "t_per_image.csv"):
        assert (out / name).read_bytes() == (base / "straight-evaluation" / name).read_bytes()


def test_a_run_killed_on_three_processes_is_resumed_on_one(base):
    out = base / "moved"
    process = start(*evaluation("moved"), cwd=base, processes=3)
    wait_for(lambda: len(lines(out)) > 8, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run(*evaluation("moved"), cwd=base)
    for name in ("t.csv", "t_per_image.csv"):
        assert (out / name).read_bytes() == (base / "straight-evaluation" / name).read_bytes()
    assert len(lines(out)) == len(set(lines(out)))


@pytest.mark.parametrize("flags", [evaluation, analysis])
@pytest.mark.parametrize("scored", [False, True])  # the disk is full for the scores, for a table
def test_a_full_disk_leaves_the_old_tables(base, flags, scored):
    straight = base / f"straight-{flags.__name__}"
    out = base / f"full-{flags.__name__}{scored}"
    out.mkdir()
    for name in tables(straight):
        (out / name).write_text(f"old {name}")
    if scored:
        shutil.copytree(straight / "scores", out / "scores")
    process = start(*flags(out.name), cwd=base, limit=200)
    stderr = process.communicate(timeout=60)[1]
    line = one_line(stderr)
    assert process.returncode == 2 and "File too large" in line and f"{out.name}/" in line
    assert ("/scores/" in line) != scored and not leftovers(out)
    assert all((out / name).read_text() == f"old {name}" for name in tables(straight))
    if not scored:
        run(*flags(out.name), cwd=base)
        assert tables(out) == tables(straight)


def test_an_image_that_breaks_during_an_evaluation_is_named(base, tmp_path):
    make_hggt(tmp_path / "gt", n=IMAGES, test=True)
    out = tmp_path / "out"
    flags = (*evaluation(out), "--gt", tmp_path / "gt")
    process = start(*flags, cwd=base)
    wait_for(lambda: len(lines(out)) > 2, process)
    victim = tmp_path / "gt/images/01/img05_01.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and str(victim) in one_line(stderr)
    victim.write_bytes(whole)
    run(*flags, cwd=base)
    assert tables(out) == tables(base / "straight-evaluation")


def test_a_corrupt_image_in_the_middle_of_the_analysis_is_left_out(base, tmp_path):
    make_hggt(tmp_path / "HGGT", n=IMAGES)
    (tmp_path / "HGGT/pairs.csv").write_bytes((base / "HGGT/pairs.csv").read_bytes())
    victim = tmp_path / "HGGT/Train/images/0-4/02/img03_02.png"
    whole, half = victim.read_bytes(), victim.stat().st_size // 2
    victim.write_bytes(whole[:half] + bytes(40) + whole[half + 40 :])
    out = tmp_path / "out"
    flags = (*analysis(out), "--pairs", tmp_path / "HGGT/pairs.csv", "--sets", tmp_path / "HGGT")
    result = run(*flags, cwd=base)
    line = f"metrics:slow: 1 of 35 images not scored: {victim}: "
    assert line in result.stdout
    failures = tables(out)["table6.csv"][0].index("failures")
    assert [row[failures] for row in tables(out)["table6.csv"][1:]] == ["1", "1"]
    victim.write_bytes(whole)
    run(*flags, cwd=base)
    assert tables(out)["table6.csv"] == tables(base / "straight-analysis")["table6.csv"]


def test_a_rank_that_fails_ends_all_with_its_message(base):
    """The others wait for it at the end of the row; the message comes from it alone."""
    begin = time.monotonic()
    result = run(*evaluation("rank"), "--extra", "q=faults.metrics:fails_on_rank_1", cwd=base,
                 processes=2, ok=False)
    assert result.returncode != 0 and time.monotonic() - begin < 45
    assert said(result.stderr) == ["evaluate.py: [rank 1] metric broken: no score"]
    result = run(*evaluation("rank"), "--lq", "gt", cwd=base, processes=2, ok=False)
    assert result.returncode != 0  # all ranks meet the same
    assert len(said(result.stderr)) == len(set(said(result.stderr))) == IMAGES
    (base / "rank2/scores/faults.metrics-slow.rank1.csv").mkdir(parents=True)
    result = run(*analysis("rank2"), cwd=base, processes=2, ok=False)
    assert result.returncode != 0
    line, = said(result.stderr)
    assert line.startswith("analyze_iqa.py: [rank 0] ") and "faults.metrics-slow.rank1.csv" in line


@pytest.mark.parametrize("flags", [evaluation, analysis])
def test_a_rank_that_is_killed_ends_all(base, flags):
    begin = time.monotonic()
    more = ("--metrics", "psnr", "--extra", "q=faults.metrics:killed_on_rank_1")
    if flags is analysis:
        more = ("--metrics", "q=faults.metrics:killed_on_rank_1")
    result = run(*flags(f"killed-{flags.__name__}"), *more, cwd=base, processes=2, ok=False)
    assert result.returncode != 0 and time.monotonic() - begin < 45
    line, = said(result.stderr)
    # As rank 0 waits for the other, or before, by torchrun
    assert re.search(r"\[rank 0\] another process was killed, perhaps for lack of memory$|"
                     "stopped by a signal, or because another process was killed", line)
