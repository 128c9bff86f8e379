"""What a cluster does to a long run: signals, kills, bad files, a full disk, NaN, a dead worker.

Each fault ends with the weights of an undisturbed run, or with one clear line and the last good
checkpoint intact. RESULTS.md has the table, kill_loop.py the long version.
"""

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from make_data import make_hggt
from PIL import Image
from test_train import ROOT, TINY, environment, run, same_weights

from models.checkpoint import load_file

AMO = ("train_sr.py", *TINY, "--sampler", "amo", "--init", "stage1/net_g_ema.pt", "--save-every", 2)
FINE = ("finetune_lora.py", *TINY, "--sampler", "amo", "--init", "stage1/net_g_ema.pt",
        "--lora-rank", 2, "--lambda-q", 0.01, "--save-every", 2)


def not_a_number(weights=None):
    """An NR-IQA whose seventh call gives NaN."""
    import torch

    class Metric(torch.nn.Module):
        calls = 0

        def forward(self, x):
            Metric.calls += 1
            return x.mean((1, 2, 3)) * (float("nan") if Metric.calls == 7 else 1.0)

    return Metric()


def start(*flags, cwd, limit=None, processes=0):
    """A run in the background, in its own process group; limit: largest file, bytes."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / flags[0]), *map(str, flags[1:])]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-1500:]
        assert time.monotonic() < end, "the run did not come that far"
        time.sleep(0.02)


def step_of(out):
    lines = (out / "log.csv").read_text().splitlines() if (out / "log.csv").exists() else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


def one_line(text):
    """The message below the progress bar."""
    lines = [line for line in text.split("\r")[-1].splitlines() if ".py: " in line]
    assert len(lines) == 1, text[-1500:]
    return lines[0]


def said(text):
    """All messages of the scripts, of all ranks, also behind a progress bar."""
    return re.findall(r"\w+\.py: .*", text)


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Data, a stage-one net, and an undisturbed run of 12 steps."""
    folder = tmp_path_factory.mktemp("faults")
    make_hggt(folder / "HGGT", n=4, size=64)
    run("train_sr.py", *TINY, "--data", "HGGT/Train/images/0-4/original", "--lambda-p", 0,
        "--lambda-a", 0, "--steps", 2, "--out", "stage1", cwd=folder)
    run(*AMO, "--steps", 12, "--out", "straight", cwd=folder)
    run(*FINE, "--steps", 24, "--out", "tuned", cwd=folder)
    return folder


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2),
                                                 (signal.SIGINT, 2)])
def test_a_signal_saves_and_the_same_command_goes_on(base, number, workers):
    out = base / f"signal{number}-{workers}"
    flags = (*AMO, "--num-workers", workers, "--save-every", 1000, "--out", out.name)
    process = start(*flags, "--steps", 5000, cwd=base)
    wait_for(lambda: step_of(out) >= 2, process)
    begin = time.monotonic()
    os.killpg(process.pid, number)  # to its workers as well, as a scheduler and Ctrl-C do
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr[-1500:]
    assert time.monotonic() - begin < 20
    step = int(re.search(r"stopped by a signal after step (\d+)", stdout)[1])
    assert load_file(out / "last.pt")["step"] == step
    assert not (out / "net_g_ema.pt").exists() and not leftovers(out)
    if step < 12:
        run(*flags, "--steps", 12, cwd=base)
        same_weights(base / "straight/last.pt", out / "last.pt")
        assert (base / "straight/log.csv").read_bytes() == (out / "log.csv").read_bytes()


def test_kills_at_random_moments_change_nothing(base):
    out, rng = base / "killed", random.Random(0)
    flags = (*AMO, "--steps", 12, "--out", "killed")
    kills = 0
    for _ in range(3):
        process, before = start(*flags, cwd=base), step_of(out)
        while process.poll() is None and step_of(out) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:  # a fast machine may have come to the end
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    run(*flags, cwd=base)
    same_weights(base / "straight/last.pt", out / "last.pt")
    assert (base / "straight/log.csv").read_bytes() == (out / "log.csv").read_bytes()


def test_a_fine_tuning_stopped_and_killed_ends_with_equal_files(base):
    out = base / "tuned-stopped"
    flags = (*FINE, "--out", out.name)
    for number, save_every in ((signal.SIGTERM, 1000), (signal.SIGKILL, 2), (signal.SIGINT, 1000)):
        before = step_of(out)
        process = start(*flags, "--save-every", save_every, "--steps", 5000, cwd=base)
        wait_for(lambda before=before: step_of(out) > before, process)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=60)
        killed = number == signal.SIGKILL
        assert process.returncode == (-number if killed else 0), stderr[-1500:]
        assert killed or "stopped by a signal after step" in stdout
        assert not (out / "lora.pt").exists() and not (out / "net_g_ema.pt").exists()
    assert load_file(out / "last.pt")["step"] < 24, "too fast for this test; give it more steps"
    run(*flags, "--steps", 24, cwd=base)
    for name in ("net_g_ema.pt", "lora.pt", "log.csv"):
        assert (out / name).read_bytes() == (base / "tuned" / name).read_bytes()


def test_a_truncated_checkpoint_is_refused_and_the_one_before_offered(base):
    out = base / "cut"
    flags = (*AMO, "--out", "cut")
    run(*flags, "--steps", 4, cwd=base)
    whole = (out / "last.pt").read_bytes()
    assert load_file(out / "previous.pt")["step"] == 2
    (out / "last.pt").write_bytes(whole[: len(whole) // 2])
    result = run(*flags, "--steps", 12, cwd=base, ok=False)
    line = one_line(result.stderr)
    assert result.returncode == 2 and "cut/last.pt: not a readable weight file" in line
    assert "mv cut/previous.pt cut/last.pt" in line
    os.replace(out / "previous.pt", out / "last.pt")
    run(*flags, "--steps", 12, cwd=base)
    same_weights(base / "straight/last.pt", out / "last.pt")
    (out / "last.pt").write_bytes((base / "stage1/net_g_ema.pt").read_bytes())
    line = one_line(run(*flags, "--steps", 12, cwd=base, ok=False).stderr)
    assert "cut/last.pt: not a training checkpoint" in line


def test_other_settings_are_refused_with_both_values_but_data_may_move(base):
    flags = (*AMO, "--steps", 2, "--out", "settings")
    run(*flags, cwd=base)
    result = run(*flags, "--tau", 3, cwd=base, ok=False)
    assert result.returncode == 2 and "--tau 10.0, not 3.0" in one_line(result.stderr)
    result = run(*flags, "--init", "straight/net_g_ema.pt", cwd=base, ok=False)
    assert "was trained with --init net_g_ema.pt (sha256" in one_line(result.stderr)
    (base / "moved").symlink_to("HGGT")
    run(*flags, "--data", "moved", "--steps", 3, cwd=base)
    make_hggt(base / "HGGT5", n=5, size=64)
    result = run(*flags, "--data", "HGGT5", cwd=base, ok=False)
    assert "--data of sha256" in one_line(result.stderr)


def test_a_write_that_fails_leaves_the_last_checkpoint(base):
    out = base / "full"
    run(*AMO, "--steps", 2, "--out", "full", cwd=base)
    before = (out / "last.pt").read_bytes()
    process = start(*AMO, "--steps", 12, "--out", "full", cwd=base, limit=len(before) // 2)
    stderr = process.communicate(timeout=90)[1]
    assert process.returncode == 2 and "File too large" in one_line(stderr)
    assert (out / "last.pt").read_bytes() == before and not leftovers(out)
    run(*AMO, "--steps", 12, "--out", "full", cwd=base)
    same_weights(base / "straight/last.pt", out / "last.pt")


def test_a_run_folder_that_cannot_be_written(base):
    result = run(*AMO, "--steps", 2, "--out", "/proc/run", cwd=base, ok=False)
    assert result.returncode == 2 and "/proc/run" in one_line(result.stderr)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_mid_run_is_named(base, tmp_path, workers):
    make_hggt(tmp_path / "HGGT", n=4, size=64)
    out = tmp_path / "out"
    flags = (*AMO, "--data", tmp_path / "HGGT", "--num-workers", workers, "--out", out)
    process = start(*flags, "--steps", 5000, cwd=base)
    wait_for(lambda: step_of(out) >= 4, process)
    victim = tmp_path / "HGGT/Train/images/0-4/02/img01_02.png"
    whole = victim.read_bytes()
    if workers:
        victim.unlink()
    else:
        victim.write_bytes(whole[: len(whole) // 2])
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and str(victim) in one_line(stderr)
    step = load_file(out / "last.pt")["step"]
    victim.write_bytes(whole)
    run(*flags, "--steps", step + 1, cwd=base)
    assert load_file(out / "last.pt")["step"] == step + 1


def test_a_broken_image_ends_all_ranks(base, tmp_path):
    make_hggt(tmp_path / "HGGT", n=4, size=64)
    victim = tmp_path / "HGGT/Train/images/0-4/03/img02_03.png"
    size = Image.open(victim).size
    victim.write_bytes(victim.read_bytes()[:200])  # its header is whole
    assert size == (64, 64)
    begin = time.monotonic()
    result = run(*AMO, "--data", tmp_path / "HGGT", "--steps", 50, "--out", tmp_path / "out",
                 cwd=base, processes=2, ok=False)
    assert result.returncode != 0 and time.monotonic() - begin < 45
    line, = said(result.stderr)  # of the rank that met it first
    assert re.match(r"train_sr.py: \[rank [01]\] ", line) and str(victim) in line


def test_a_signal_to_all_processes_of_torchrun_saves(base):
    """What a scheduler sends; torchrun then sends its processes another, in the same step."""
    flags = (*AMO, "--num-workers", 1, "--save-every", 1000, "--out", "all")
    process = start(*flags, "--steps", 5000, cwd=base, processes=2)
    wait_for(lambda: step_of(base / "all") >= 2, process)
    pids = [process.pid, *descendants(process.pid)]
    for _ in range(4):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.005)
    stdout, stderr = process.communicate(timeout=60)
    step = int(re.search(r"stopped by a signal after step (\d+)", stdout)[1])
    assert load_file(base / "all/last.pt")["step"] == step and not said(stderr)


def descendants(pid):
    children = [int(n) for task in Path(f"/proc/{pid}/task").iterdir()
                for n in (task / "children").read_text().split()]
    return children + [n for child in children for n in descendants(child)]


def test_a_killed_rank_ends_all_ranks(base):
    """Its loss in the middle of a step breaks the others' all-reduce."""
    begin = time.monotonic()
    result = run(*AMO, "--iqa", "faults.metrics:killed_on_rank_1", "--steps", 50, "--out", "rank",
                 cwd=base, processes=2, ok=False)
    assert result.returncode != 0 and time.monotonic() - begin < 45
    assert said(result.stderr) == [
        "train_sr.py: [rank 0] another process was killed, perhaps for lack of memory"]


@pytest.mark.parametrize("processes", [0, 2])
def test_a_loss_that_is_not_a_number_stops_all_ranks(base, processes):
    out = base / f"nan{processes}"
    flags = ("finetune_lora.py", *TINY, "--sampler", "upos", "--init", "stage1/net_g_ema.pt",
             "--lora-rank", 2, "--iqa", "faults.test_faults:not_a_number", "--save-every", 2,
             "--steps", 20, "--out", out.name)
    result = run(*flags, cwd=base, processes=processes, ok=False)
    assert result.returncode != 0
    line, = said(result.stderr)
    step = int(re.search(r"step (\d+): not finite: ", line)[1])
    assert "l_iqa nan" in line and "l_pix 0." in line and "img0" in line
    first = int(re.search(r"draws (\d+) to", line)[1])
    assert first - 2 * (step - 1) in range(max(processes, 1))  # of the rank that met it
    assert load_file(out / "last.pt")["step"] == (step - 1) // 2 * 2
    assert all(v.isfinite().all() for v in load_file(out / "last.pt")["params"].values())


def test_a_killed_worker_is_one_line(base):
    out = base / "worker"
    process = start(*AMO, "--num-workers", 1, "--steps", 5000, "--out", "worker", cwd=base)
    wait_for(lambda: step_of(out) >= 4, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "a data worker was killed" in one_line(stderr)
    assert load_file(out / "last.pt")["step"] >= 2


def test_four_processes_agree_with_one(base):
    flags = ("train_sr.py", *TINY, "--batch-size", 4, "--sampler", "amo", "--init",
             "stage1/net_g_ema.pt", "--steps", 3)
    run(*flags, "--out", "world1", cwd=base)
    run(*flags, "--out", "world4", cwd=base, processes=4)
    same_weights(base / "world1/last.pt", base / "world4/last.pt", tolerance=1e-5)
