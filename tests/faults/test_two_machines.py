"""Two machines without a shared disk: two folders of this host, each with its own data and weights.

Each folder runs a torchrun of its own (--nnodes=2) with relative paths, so that no file of one is
seen by the other. Processes share the host's network, through which they find each other.
"""

import contextlib
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from make_data import make_hggt
from PIL import Image, ImageChops
from scripts import ROOT, environment, run_script

from models.checkpoint import load_file, read_csv
from models.rrdb import RRDBNet

TINY = ("--net", "swinir_tiny", "--data", "HGGT", "--perceptual", "laplacian", "--patch-size", 32,
        "--batch-size", 4, "--num-workers", 0, "--log-every", 1, "--lr", 1e-3, "--lr-d", 1e-4,
        "--save-every", 2, "--init", "none", "--iqa", "own:contrast", "--ema-decay", 0.5)
OWN = """import torch
class Contrast(torch.nn.Module):
    def forward(self, x):
        return 100 * x.flatten(1).std(1)
def contrast(weights=None):
    return Contrast()
"""


def make_machine(folder: Path) -> Path:
    """A working folder with data, a test set, pairs, a quality model and a checkpoint."""
    make_hggt(folder / "HGGT", n=4, size=64)
    make_hggt(folder / "test", n=3, size=64, test=True)
    (folder / "lq").mkdir()
    for path in (folder / "test/images/original").iterdir():
        Image.open(path).resize((16, 16), Image.Resampling.BICUBIC).save(folder / "lq" / path.name)
    images = sorted((folder / "HGGT").rglob("*.png"))
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = [[os.path.relpath(a, folder), os.path.relpath(b, folder), 0.2 + 0.6 * (i % 2)]
                for i, (a, b) in enumerate(zip(images, images[1:], strict=False))]
        csv.writer(file).writerows([["image1", "image2", "score"], *rows[:14]])
    (folder / "own.py").write_text(OWN)
    torch.manual_seed(0)
    net = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)
    torch.save({"params": net.state_dict()}, folder / "net.pth")
    return folder


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    return [make_machine(tmp_path_factory.mktemp(f"machine{i}")) for i in range(2)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(machines, script, *flags):
    """One torchrun per machine, one process each."""
    port = free_port()
    return [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={i}",
         "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}",
         str(ROOT / script), *map(str, flags)],
        cwd=folder, env=environment(PYTHONPATH=f"{ROOT}:{folder}"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        for i, folder in enumerate(machines)]


def kill_all(folder: Path) -> None:
    """SIGKILL to every process that runs in a folder, torchrun's workers among them."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if Path(entry, "cwd").resolve() == folder.resolve():
                os.kill(int(entry.name), signal.SIGKILL)


def two(machines, script, *flags, ok=True):
    """(stdout, stderr) of each machine."""
    started = launch(machines, script, *flags)
    texts = [process.communicate(timeout=120) for process in started]
    if ok:
        assert [p.returncode for p in started] == [0, 0], texts[0][1][-1500:] + texts[1][1][-1500:]
    else:
        assert all(p.returncode for p in started)
    return texts


def one(folder, script, *flags, processes=2):
    done = run_script(script, *flags, cwd=folder, processes=processes,
                      PYTHONPATH=f"{ROOT}:{folder}")
    assert done.returncode == 0, done.stderr[-1500:]


def same_run(a: Path, b: Path) -> None:
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    for key, value in load_file(a / "last.pt")["params"].items():
        assert torch.equal(value, load_file(b / "last.pt")["params"][key]), key
    assert (a / "net_g_ema.pt").read_bytes() == (b / "net_g_ema.pt").read_bytes()


@pytest.fixture(scope="module")
def straight(machines):
    """Six steps of two processes on one machine."""
    one(machines[0], "train_sr.py", *TINY, "--sampler", "amo", "--steps", 6, "--out", "one")
    return machines[0] / "one"


def test_a_run_and_its_resume_equal_one_machines(machines, straight):
    flags = (*TINY, "--sampler", "amo", "--out", "two")
    two(machines, "train_sr.py", *flags, "--steps", 4)
    assert not (machines[1] / "two").exists()  # rank 0 alone writes
    texts = two(machines, "train_sr.py", *flags, "--steps", 6)
    assert "resuming two at step 4" in texts[0][0]
    same_run(straight, machines[0] / "two")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_that_dies_ends_the_run_which_then_resumes(machines, straight, killed):
    flags = (*TINY, "--sampler", "amo", "--steps", 6, "--out", f"killed{killed}")
    started = launch(machines, "train_sr.py", *flags)
    log, deadline = machines[0] / f"killed{killed}/log.csv", time.time() + 60
    while time.time() < deadline and not (log.is_file() and len(log.read_text().split()) > 2):
        time.sleep(0.02)
    kill_all(machines[killed])
    texts = [process.communicate(timeout=120) for process in started]
    assert started[1 - killed].returncode
    assert "Traceback (most recent call last):\n  File \"" + str(ROOT) not in texts[1 - killed][1]
    two(machines, "train_sr.py", *flags)
    same_run(straight, machines[0] / f"killed{killed}")


def test_sma_scores_every_image_once_and_equals_one_machine(machines):
    flags = (*TINY, "--sampler", "sma", "--steps", 2)
    two(machines, "train_sr.py", *flags, "--out", "sma-two")
    shutil.rmtree(machines[0] / "HGGT/.scores")
    one(machines[0], "train_sr.py", *flags, "--out", "sma-one")
    same_run(machines[0] / "sma-one", machines[0] / "sma-two")


def test_fine_tuning_on_two_machines_equals_one(machines, straight):
    for folder in machines:
        shutil.copy(straight / "net_g_ema.pt", folder / "base.pt")
    flags = (*TINY, "--sampler", "amo", "--init", "base.pt", "--lora-rank", 2, "--steps", 2)
    two(machines, "finetune_lora.py", *flags, "--out", "ft-two")
    one(machines[0], "finetune_lora.py", *flags, "--out", "ft-one")
    same_run(machines[0] / "ft-one", machines[0] / "ft-two")


@pytest.mark.parametrize("sampler", ["rand", "upos"])
def test_the_number_of_processes_may_change(machines, sampler):
    flags = (*TINY, "--sampler", sampler)
    one(machines[0], "train_sr.py", *flags, "--steps", 20, "--out", f"{sampler}1", processes=0)
    for processes, steps in ((4, 8), (2, 14), (0, 20)):
        one(machines[0], "train_sr.py", *flags, "--steps", steps, "--out", f"{sampler}421",
            processes=processes)
    straight, changed = ([{k: float(v) for k, v in row.items()} for row in
                          read_csv(machines[0] / f"{sampler}{n}/log.csv")[0]] for n in (1, 421))
    assert len(straight) == len(changed) == 20
    for a, b in zip(straight, changed, strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-7), (a["step"], key)


def table(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(path)[0]]


def test_an_analysis_on_two_machines_equals_one(machines):
    """It scored 4 of 14 pairs and exited with 0."""
    flags = ("--pairs", "pairs.csv", "--sets", "HGGT", "--metrics", "own=own:contrast", "piqe",
             "--reference", "own")
    two(machines, "analyze_iqa.py", *flags, "--out", "analysis")
    one(machines[0], "analyze_iqa.py", *flags, "--out", "analysis-one", processes=0)
    for name in ("table1", "table2", "table3", "table4", "table6", "figure2"):
        assert table(machines[0] / f"analysis/{name}.csv") == table(
            machines[0] / f"analysis-one/{name}.csv"), name
    assert table(machines[0] / "analysis/table6.csv")[0]["failures"] == "0"
    # Each machine kept its share of the scores: a rerun computes none
    texts = two(machines, "analyze_iqa.py", *flags, "--out", "analysis")
    assert "image/s" not in texts[0][1] and "it/s" not in texts[1][1]


def test_an_evaluation_on_two_machines_equals_one(machines, tmp_path):
    flags = ("--models", "A=net.pth", "--gt", "test", "--lq", "lq", "--metrics", "psnr", "ssim",
             "--extra", "own=own:contrast")
    two(machines, "evaluate.py", *flags, "--out", "t5/two.csv")
    one(machines[0], "evaluate.py", *flags, "--out", "t5-one/two.csv", processes=0)
    for name in ("two", "two_per_image"):
        assert (machines[0] / f"t5/{name}.csv").read_bytes() == (
            machines[0] / f"t5-one/{name}.csv").read_bytes()
    texts = two(machines, "evaluate.py", *flags, "--out", "sr/t.csv", "--save-sr", "sr", ok=False)
    assert "--save-sr sr: rank 1, on another machine, does not see rank 0's; give a folder" in (
        "".join(err for _, err in texts))
    two(machines, "evaluate.py", *flags, "--out", "sr/t.csv", "--save-sr", tmp_path / "shared")
    assert len(list((tmp_path / "shared/A").iterdir())) == 3


@pytest.mark.parametrize(("what", "expected"), [
    ("pixels", "--data and weights: data is of sha256"),
    ("weights", "--models and the test images differ between rank 0 and rank 1"),
    ("labels", "--models and the test images differ between rank 0 and rank 1"),
    ("metric", "metric own:contrast@w.txt and its weights differ between rank 0 and rank 1"),
])
def test_other_files_on_one_machine_are_refused_at_the_start(machines, tmp_path, what, expected):
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in machines]
    for i, folder in enumerate(copies):
        (folder / "w.txt").write_text(str(i) if what == "metric" else "")
    if what == "pixels":
        path = copies[1] / "HGGT/Train/images/0-4/03/img02_03.png"
        ImageChops.invert(Image.open(path)).save(path)
    elif what == "weights":
        net = load_file(copies[1] / "net.pth")
        net["params"]["conv_last.bias"] += 1
        torch.save(net, copies[1] / "net.pth")
    elif what == "labels":
        for votes in (copies[1] / "test/labels").rglob("img01.json"):
            votes.write_text(votes.read_text().replace("Positive", "Similar"))
    train = ("train_sr.py", *TINY, "--sampler", "rand", "--steps", 2, "--out", "x")
    score = ("evaluate.py", "--models", "A=net.pth", "--gt", "test", "--lq", "lq", "--metrics",
             "psnr", "--extra", "own=own:contrast@w.txt", "--out", "t.csv")
    texts = two(copies, *(train if what == "pixels" else score), ok=False)
    text = "".join(err for _, err in texts)
    assert text.count(expected) == 1 and "give all machines the same files" in text, text[-1500:]
    assert not (copies[0] / "x/last.pt").exists() and not (copies[0] / "t.csv").exists()
