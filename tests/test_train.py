"""train_sr.py and finetune_lora.py: the samplers as functions, and real runs as subprocesses."""

import copy
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from make_data import make_hggt
from scripts import ROOT, environment, run_script
from torch import nn

import finetune_lora
import train_sr
from models import distributed, quality
from models.checkpoint import load_file, read_state
from models.distributed import dead_worker_named
from models.hggt import load_sets
from models.iqa import FrozenMetric
from models.quality import (
    MeanOfMetrics,
    image_quality,
    in_tf32,
    mean_standardised,
    scale_of,
)
from models.run import LOCKS
from models.samplers import choose_argmax, sampling_weights
from models.swinir import SwinIR
from train_sr import ema_decay_at, ema_update, lr_at

LABELS = np.array([[0, 1, 1, -1, 0], [0, -1, 0, 0, -1], [0, 1, 0, 0, 0]], np.int8)
QUALITY = np.array([[50.0, 60.0, 70.0, 90.0, 40.0]] * 3)


def sharpness():
    """An NR-IQA for the tests: mean absolute horizontal difference, differentiable."""

    class Sharpness(nn.Module):
        def forward(self, x):
            return 100 * (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))

    return Sharpness()


def darkness():
    """A second one, on another scale; the less contrast, the better."""

    class Darkness(nn.Module):
        def forward(self, x):
            return -(x - 0.5).square().mean((1, 2, 3))

    return Darkness()


def constant():
    class Constant(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3)) * 0 + 3

    return Constant()


def weights(sampler, tau=10.0):
    return sampling_weights(sampler, LABELS, QUALITY, tau, LABELS.shape)


def test_sampling_weights_by_hand():
    assert (weights("origs_only") == [[1, 0, 0, 0, 0]] * 3).all()
    assert np.allclose(weights("rand"), 0.2)
    # Uniform over positives; a set without any is dropped; the original never.
    assert (weights("upos") == [[0, 0.5, 0.5, 0, 0], [0] * 5, [0, 1, 0, 0, 0]]).all()
    e = np.exp([5.0, 6.0, 7.0, 9.0, 4.0])  # Q / tau
    assert np.allclose(weights("sma"), e / e.sum())
    smp = weights("smp")
    assert np.allclose(smp[0], [0, 1 / (1 + np.e), np.e / (1 + np.e), 0, 0])
    assert (smp[1] == 0).all() and (smp[2] == [0, 1, 0, 0, 0]).all()
    assert weights("amo") is None


def test_temperature_limits():
    assert np.allclose(weights("sma", tau=1e9), 0.2)
    assert np.allclose(weights("sma", tau=1e-3), [0, 0, 0, 1, 0])
    assert np.allclose(weights("smp", tau=1e9)[0], weights("upos")[0])


def test_amo_takes_the_best_patch():
    gts = torch.rand(3, 5, 3, 8, 8) * 0.1
    gts[0, 2] += 0.5 * torch.rand(3, 8, 8)
    gts[1, 4] += 0.5 * torch.rand(3, 8, 8)
    gts[2, 0] += 0.5 * torch.rand(3, 8, 8)
    assert choose_argmax(gts, sharpness()).tolist() == [2, 4, 0]
    gts[0, 3] = torch.nan  # a score that fails is not the best
    assert choose_argmax(gts, sharpness()).tolist() == [2, 4, 0]


def test_several_metrics_are_the_mean_of_standardised_scores_on_the_scale_of_the_first():
    scores = np.array([[10.0, 0.1], [20.0, 0.4], [30.0, 0.1], [40.0, 0.2]])
    scale = scale_of(scores, ["a", "b"])
    assert np.allclose(scale, [[25, 0.2], [125**0.5, 0.015**0.5]])
    standardised = (scores - [25, 0.2]) / [125**0.5, 0.015**0.5]
    expected = standardised.mean(1) * 125**0.5 + 25
    assert np.allclose(mean_standardised(scores, scale), expected)
    assert np.isclose(expected.mean(), 25)
    # tensors alike, and with gradients; twice the same metric is that metric
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    both = MeanOfMetrics([sharpness(), sharpness()])
    both.scale = torch.tensor([[30.0, 30.0], [7.0, 7.0]])
    assert torch.allclose(both(x), sharpness()(x))
    both(x).sum().backward()
    assert x.grad.abs().sum() > 0
    tensors = mean_standardised(torch.tensor(scores), torch.tensor(scale))
    assert np.allclose(tensors.numpy(), expected)
    for constant in (0, 0.123456789, 41.2345678):  # whose deviations are not quite 0
        with pytest.raises(ValueError, match="--iqa b: gives all ground truths the same score"):
            scale_of(np.stack([np.arange(185.0), np.full(185, constant)], 1), ["a", "b"])
    for broken in (np.nan, np.inf):
        with pytest.raises(ValueError, match="--iqa a: has no finite score"):
            scale_of(np.where(scores == 10, broken, scores), ["a", "b"])


def test_schedule_and_ema():
    assert [lr_at(s, 8.0, [2, 4]) for s in range(1, 7)] == [8, 8, 4, 4, 2, 2]
    net, ema = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
        ema.weight.fill_(0.0)
    for _ in range(3):
        ema_update(ema, net, 0.9)
    assert torch.allclose(ema.weight, torch.full((1, 2), 1 - 0.9**3))


def test_a_warm_up_of_the_average_lets_short_runs_move_it():
    assert ema_decay_at(1, 0.999, warmup=False) == 0.999
    assert ema_decay_at(1, 0.999, warmup=True) == 2 / 11
    assert ema_decay_at(8989, 0.999, warmup=True) == pytest.approx(8990 / 8999)
    assert ema_decay_at(10_000, 0.999, warmup=True) == 0.999
    for warmup, least, most in ((False, 0.02, 0.04), (True, 0.9, 1)):  # of a jump at step 1
        net, ema = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(net.weight), nn.init.zeros_(ema.weight)
        for step in range(1, 31):
            ema_update(ema, net, ema_decay_at(step, 0.999, warmup))
        assert least < ema.weight.item() < most


def test_presets_are_the_papers():
    swinir, rrdb = train_sr.PRESETS["swinir"], train_sr.PRESETS["rrdb"]
    assert swinir["batch_size"] == 32 and rrdb["batch_size"] == 48
    args = train_sr.parse_args(["--sampler", "amo", "--init", "none"])
    train_sr.resolve_args(args)
    assert args.init is None and not args.bf16
    assert args.milestones == [200_000, 250_000, 275_000, 287_500] and args.lr == 1e-4
    assert (args.steps, args.patch_size, args.ema_decay, args.tau) == (300_000, 256, 0.999, 10.0)
    assert (args.lambda_l1, args.lambda_p, args.lambda_a) == (1.0, 1.0, 0.1)
    assert args.out == "runs/swinir-amo_init-none" and args.data == "datasets/HGGT"
    args = train_sr.parse_args(["--lambda-p", "0", "--lambda-a", "0"])
    train_sr.resolve_args(args, stage_one=True)
    assert (args.sampler, args.lr, args.out) == ("origs_only", 2e-4, "runs/swinir-stage1")
    assert args.milestones == [150_000, 240_000, 270_000, 285_000]


# ------------------------------------------------------------------------ real runs


def run(script, *flags, cwd, processes=0, ok=True):
    result = run_script(script, *flags, cwd=cwd, processes=processes)
    if ok:
        assert result.returncode == 0, result.stderr[-2000:]
    return result


def call(module, *flags, cwd, monkeypatch=None):
    """As run, in this process: a second instead of five."""
    before = os.getcwd()
    try:
        os.chdir(cwd)
        module.main(module.parse_args([str(flag) for flag in flags]))
    finally:
        os.chdir(before)
        while LOCKS:  # of the run folder, which this process would hold to its end
            LOCKS.pop().close()


TINY = ("--net", "swinir_tiny", "--data", "HGGT", "--perceptual", "laplacian", "--patch-size", 32,
        "--batch-size", 2, "--num-workers", 0, "--log-every", 2, "--lr", 1e-3,
        "--iqa", "test_train:sharpness")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A working folder with data, a stage-one net and a 6-step amo run."""
    folder = tmp_path_factory.mktemp("train")
    make_hggt(folder / "HGGT", n=4, size=64)
    call(train_sr, *TINY, "--data", "HGGT/Train/images/0-4/original", "--lambda-p", 0,
        "--lambda-a", 0, "--steps", 3, "--out", "stage1", cwd=folder)
    amo = ("--sampler", "amo", "--init", "stage1/net_g_ema.pt")
    call(train_sr, *TINY, *amo, "--steps", 6, "--save-every", 2, "--sample-every", 3,
        "--out", "amo", cwd=folder)
    return folder


def read_log(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same_weights(a, b, tolerance=0.0):
    a, b = load_file(a), load_file(b)
    for part in ("params", "params_ema", "net_d"):
        for key in a[part]:
            difference = (a[part][key].double() - b[part][key].double()).abs().max()
            assert difference <= tolerance, (part, key, float(difference))


def test_run_writes_what_it_promises(base):
    net = SwinIR.from_state(read_state(base / "amo/net_g_ema.pt"))
    assert net(torch.rand(1, 3, 16, 16)).shape == (1, 3, 64, 64)
    last = load_file(base / "amo/last.pt")
    assert last["step"] == 6
    stage1 = read_state(base / "stage1/net_g_ema.pt")
    moved = [k for k in stage1 if stage1[k].is_floating_point()
             and not torch.equal(stage1[k], last["params"][k])]
    assert len(moved) > 40
    log = read_log(base / "amo/log.csv")
    assert [row["step"] for row in log] == ["2", "4", "6"]
    for row in log:
        assert abs(sum(float(row[f"share_{k}"]) for k in range(5)) - 1) < 1e-5
        assert float(row["l_pix"]) > 0 and float(row["l_adv"]) > 0 and float(row["l_d"]) > 0
    assert sorted(p.name for p in (base / "amo/samples").iterdir()) == [
        "000001.png", "000003.png", "000006.png"]
    # Contrast grows with the member, so that sharpness picks the last one, patch by patch.
    assert float(log[-1]["share_4"]) == 1.0


def test_stop_and_resume_is_bit_identical(base):
    flags = (*TINY, "--sampler", "amo", "--init", "stage1/net_g_ema.pt", "--save-every", 2,
             "--out", "resumed")
    call(train_sr, *flags, "--steps", 3, cwd=base)  # in the middle of a row's interval
    # A row after the checkpoint, as a killed run leaves it.
    with open(base / "resumed/log.csv", "a") as file:
        file.write("6,0.001,1,1,1,1,1,0,0,0,0,1\n8,0.0")
    result = run("train_sr.py", *flags, "--steps", 6, "--num-workers", 1, cwd=base)
    assert "resuming resumed at step 3" in result.stdout
    same_weights(base / "amo/last.pt", base / "resumed/last.pt")
    assert (base / "amo/log.csv").read_bytes() == (base / "resumed/log.csv").read_bytes()


@pytest.mark.slow
def test_two_processes_agree_with_one(base):
    # A low rate for net_d: Adam enlarges the rounding of gradients near zero to a share of it
    flags = (*TINY, "--lr-d", 1e-4, "--sampler", "amo", "--init", "stage1/net_g_ema.pt", "--steps",
             4)
    call(train_sr, *flags, "--out", "one", cwd=base)
    run("train_sr.py", *flags[:-1], 3, "--out", "two", cwd=base, processes=2)
    run("train_sr.py", *flags, "--out", "two", cwd=base, processes=2)  # resumed
    same_weights(base / "one/last.pt", base / "two/last.pt", tolerance=1e-5)
    one, two = read_log(base / "one/log.csv"), read_log(base / "two/log.csv")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert all(abs(float(a[k]) - float(b[k])) < 1e-4 for k in a)


@pytest.mark.slow
def test_training_and_fine_tuning_by_several_metrics(base, monkeypatch, capsys):
    """Sharpness picks the last member; with darkness weighing as much, it is no longer alone."""
    two = ("--sampler", "amo", "--init", "stage1/net_g_ema.pt", "--iqa", "test_train:sharpness",
           "test_train:darkness")
    call(train_sr, *TINY, *two, "--steps", 4, "--out", "both", cwd=base, monkeypatch=monkeypatch)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--iqa")]
    scale = load_file(base / "both/last.pt")["iqa_scale"]
    assert scale.shape == (2, 2) and len(said) == 2
    assert said[1].startswith(f"--iqa test_train:darkness: {scale[0, 1]:.4g} ± {scale[1, 1]:.4g}")
    assert float(read_log(base / "both/log.csv")[-1]["share_4"]) < 1
    assert "test_train-sharpness+test_train-darkness" in str(
        load_file(base / "both/last.pt")["settings"])
    # Stopped and resumed: the scale is that of last.pt, not computed anew
    call(train_sr, *TINY, *two, "--steps", 2, "--out", "both2", cwd=base, monkeypatch=monkeypatch)
    assert "±" in capsys.readouterr().out
    call(train_sr, *TINY, *two, "--steps", 4, "--out", "both2", cwd=base, monkeypatch=monkeypatch)
    assert "±" not in capsys.readouterr().out
    same_weights(base / "both/last.pt", base / "both2/last.pt")
    assert torch.equal(load_file(base / "both2/last.pt")["iqa_scale"], scale)
    # Fine-tuning: two processes take the scale from the first
    run("finetune_lora.py", *TINY, "--sampler", "upos", "--init", "both/net_g_ema.pt", *two[4:],
        "--steps", 2, "--lora-rank", 2, "--out", "both+FT", cwd=base, processes=2)
    folder = base / "both+FT"
    reward = [float(row["l_iqa"]) for row in read_log(folder / "log.csv")]
    assert np.isfinite(reward).all() and reward[0] != 0 and (folder / "lora.pt").is_file()


@pytest.mark.slow
def test_examples_of_your_own_quality_model(base, tmp_path, monkeypatch):
    text = (ROOT / "docs/quality-models.md").read_text()
    shutil.copy(ROOT / "train_sr.py", tmp_path)  # whose folder is searched for my_iqa.py
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "HGGT").symlink_to(base / "HGGT")
    (tmp_path / "runs/swinir-stage1").mkdir(parents=True)
    shutil.copy(base / "stage1/net_g_ema.pt", tmp_path / "runs/swinir-stage1")
    (tmp_path / "my_iqa.py").write_text(re.search(r"```python\n(# my_iqa.*?)```", text, re.S)[1])
    lines = text.replace("\\\n", "").splitlines()
    commands = [c for c in lines if c.startswith("python ") and "--iqa" in c]
    assert len(commands) == 3 and "--iqa musiq topiq_nr " in commands[2]
    tiny = (*map(str, TINY[:-2]), "--steps", "2")
    done = subprocess.run([sys.executable, *shlex.split(commands[0])[1:], *tiny], cwd=tmp_path,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    monkeypatch.syspath_prepend(tmp_path)
    call(finetune_lora, *shlex.split(commands[1])[2:], *tiny, cwd=tmp_path,
         monkeypatch=monkeypatch)
    two = commands[2].replace("musiq topiq_nr", "test_train:sharpness test_train:darkness")
    call(train_sr, *shlex.split(two)[2:], *tiny, cwd=tmp_path, monkeypatch=monkeypatch)
    runs = tmp_path / "runs"
    assert float(read_log(runs / "contrast/log.csv")[-1]["share_4"]) == 1  # grows with the member
    assert float(read_log(runs / "contrast+FT/log.csv")[-1]["l_iqa"]) < 0
    assert list(runs.glob("swinir_tiny-amo_*iqa-test_train.sharpness+test_train.darkness*"))


def test_image_level_quality_of_several_metrics(tmp_path):
    make_hggt(tmp_path / "HGGT", n=3, size=64)
    args = train_sr.parse_args(["--iqa", "test_train:sharpness", "test_train:darkness",
                                "--out", str(tmp_path / "q"), "--sampler", "sma"])
    args.rank, args.world, args.device = 0, 1, torch.device("cpu")
    sets = load_sets(tmp_path / "HGGT")
    found = image_quality(args, sets)
    single = []
    for args.iqa in (["test_train:sharpness"], ["test_train:darkness"]):
        single.append(image_quality(args, sets))
    scores = np.stack(single, -1)
    assert np.allclose(found, mean_standardised(scores, scale_of(scores, "ab"))) and found.std() > 0


def board(folder):
    """{tag: {step: value}} of TensorBoard's files, and the steps of the images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)}
               for tag in events.Tags()["scalars"]}
    settings = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"lambda_a" in settings and b"batch_size" in settings
    return scalars, [e.step for e in events.Images("samples")]


def test_tensorboard_shows_what_log_csv_holds(base):
    scalars, images = board(base / "amo")
    log = read_log(base / "amo/log.csv")
    columns = {tag: tag.replace("loss/", "").replace("share/", "share_") for tag in scalars}
    assert set(columns.values()) == set(log[0]) - {"step"} and images == [1, 3, 6]
    assert {"loss/l_pix", "share/4", "lr"} <= set(scalars)
    for tag, values in scalars.items():
        assert list(values) == [2, 4, 6]
        expected = [float(row[columns[tag]]) for row in log]
        assert np.allclose(list(values.values()), expected, rtol=1e-5)


def test_tensorboard_forgets_what_a_resume_takes_back(base, monkeypatch):
    flags = (*TINY, "--sampler", "amo", "--init", "stage1/net_g_ema.pt", "--sample-every", 2,
             "--out", "board", "--log-every", 1)
    call(train_sr, *flags, "--steps", 2, cwd=base, monkeypatch=monkeypatch)
    before = load_file(base / "board/last.pt")
    time.sleep(1.1)
    call(train_sr, *flags, "--steps", 4, cwd=base, monkeypatch=monkeypatch)
    torch.save(before, base / "board/last.pt")  # as if the second run had been killed
    time.sleep(1.1)  # files are read by name: second, process, count, of which 10 is before 9
    call(train_sr, *flags, "--steps", 6, cwd=base, monkeypatch=monkeypatch)
    scalars, images = board(base / "board")
    assert list(scalars["loss/l_pix"]) == [1, 2, 3, 4, 5, 6] and images == [1, 2, 4, 6]


def test_training_without_tensorboard(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import raises
    call(train_sr, *TINY, "--sampler", "rand", "--init", "stage1/net_g_ema.pt", "--steps", 2,
         "--sample-every", 2, "--out", "plain", cwd=base, monkeypatch=monkeypatch)
    assert sorted(p.name for p in (base / "plain").iterdir()) == [
        ".lock", "card.md", "config.json", "last.pt", "log.csv", "net_g_ema.pt",
        "net_g_ema.safetensors", "previous.pt", "samples"]  # saved after step 1, too


@pytest.mark.parametrize("sampler", ["origs_only", "rand", "upos", "sma", "smp"])
def test_every_sampler_trains(base, sampler):
    args = train_sr.parse_args([*map(str, TINY), "--sampler", sampler, "--steps", "2", "--data",
                                str(base / "HGGT"), "--out", str(base / sampler),
                                "--init", str(base / "stage1/net_g_ema.pt")])
    train_sr.main(args)
    row = read_log(base / sampler / "log.csv")[-1]
    if sampler in ("upos", "smp"):
        assert float(row["share_0"]) == 0.0
    if sampler == "origs_only":
        assert float(row["share_0"]) == 1.0
    if sampler in ("sma", "smp"):
        (cache,) = (base / "HGGT/.scores").glob("test_train-*.csv")
        assert len(read_log(cache)) == 4 * 5


def test_quality_is_scored_once(base, monkeypatch):
    args = train_sr.parse_args(["--iqa", "test_train:sharpness", "--out", str(base / "q")])
    args.rank, args.world, args.device = 0, 1, torch.device("cpu")
    sets = load_sets(base / "HGGT")
    first = image_quality(args, sets)
    assert first.shape == (4, 5) and (np.diff(first, axis=1) > 0).all()  # contrast grows
    monkeypatch.setattr(quality, "load_iqa", lambda *args: pytest.fail("scored again"))
    assert (image_quality(args, sets) == first).all()  # from the cache


@pytest.mark.slow
def test_rrdb_stage_two_and_fine_tuning(base):
    tiny = ("--net", "rrdb_tiny", *TINY[2:])
    call(train_sr, *tiny, "--sampler", "upos", "--steps", 2, "--init", "none", "--out", "rrdb",
        cwd=base)
    call(finetune_lora, *tiny, "--sampler", "upos", "--init", "rrdb/net_g_ema.pt",
        "--steps", 2, "--lora-rank", 2, "--lambda-a", 0.1, "--init-d", "rrdb/last.pt",
        "--out", "rrdb-ft", cwd=base)
    base_state, tuned = (read_state(base / f"{d}/net_g_ema.pt") for d in ("rrdb", "rrdb-ft"))
    changed = {k for k in base_state if not torch.equal(base_state[k], tuned[k])}
    assert set(tuned) == set(base_state)
    assert changed == {k for k in base_state if ".rdb" in k and k.endswith("weight")}


def test_fine_tuning_raises_the_score(base):
    flags = (*TINY, "--sampler", "amo", "--init", "amo/net_g_ema.pt", "--lora-rank", 4,
             "--lambda-q", 0.05, "--ema-decay", 0.5, "--steps", 8, "--lr", 5e-3)
    call(finetune_lora, *flags, "--out", "ft", cwd=base)
    lora = load_file(base / "ft/lora.pt")
    assert lora["rank"] == 4 and len(lora["lora"]) == 2 * 2 * 4  # A and B of fc1, fc2, 4 blocks
    before = SwinIR.from_state(read_state(base / "amo/net_g_ema.pt"))
    after = SwinIR.from_state(read_state(base / "ft/net_g_ema.pt"))
    assert sum(not torch.equal(a, b) for a, b in
               zip(before.parameters(), after.parameters(), strict=True)) == 8
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert sharpness()(after(x)).mean() > sharpness()(before(x)).mean()
    log = read_log(base / "ft/log.csv")
    assert all(float(r["l_adv"]) == 0 and float(r["l_iqa"]) < 0 for r in log)
    # Resume in one process of what was stopped: bit-identical too.
    call(finetune_lora, *flags[:-4], "--steps", 5, "--lr", 5e-3, "--out", "ft2",
        "--save-every", 4, cwd=base)
    call(finetune_lora, *flags, "--out", "ft2", cwd=base)
    assert all(torch.equal(v, load_file(base / "ft2/lora.pt")["lora"][k])
               for k, v in lora["lora"].items())


def test_reward_by_single_images_gives_the_same_step():
    calls, weights = [], []

    class Reward(torch.nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x.sigmoid().square().mean((1, 2, 3))

    for single in (False, True):
        torch.manual_seed(0)
        net = train_sr.PRESETS["swinir_tiny"]["build"]()
        optim, lq = torch.optim.SGD(net.parameters(), 0.1), torch.rand(3, 3, 16, 16)
        reward = finetune_lora.OneByOne(Reward()) if single else Reward()
        losses = train_sr.generator_losses(net(lq), torch.rand(3, 3, 64, 64), None, None, reward)
        (losses["l_pix"] + 5 * losses["l_iqa"]).backward()
        train_sr.update(optim, lr=0.1)
        weights.append([losses["l_iqa"], *net.parameters()])
    assert calls == [3, *[1] * 6]  # each image again in the backward pass
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_full_fine_tuning_moves_everything(base):
    call(finetune_lora, *TINY, "--sampler", "amo", "--init", "amo/net_g_ema.pt", "--full",
        "--steps", 2, "--out", "full", cwd=base)
    before, after = (read_state(base / f"{d}/net_g_ema.pt") for d in ("amo", "full"))
    floats = [k for k in before if before[k].is_floating_point() and "attn_mask" not in k]
    moved = [k for k in floats if not torch.equal(before[k], after[k])]
    assert len(moved) > 0.9 * len(floats) and not (base / "full/lora.pt").exists()


def test_the_discriminator_sees_real_and_fake_in_two_passes():
    torch.manual_seed(0)
    net = train_sr.UNetDiscriminatorSN(num_feat=4)
    twice = copy.deepcopy(net)
    sr, gt = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    loss = train_sr.discriminator_loss(net, sr.requires_grad_(), gt)
    real, fake = twice(gt), twice(sr.detach())  # spectral norm takes a step in each
    assert torch.equal(loss, train_sr.gan_loss_d(real, fake))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twice.buffers(), strict=True))
    loss.backward()
    assert sr.grad is None and net.conv1.weight_orig.grad.abs().sum() > 0


def test_the_quality_model_uses_no_tf32_unless_asked(monkeypatch):
    class Flag(nn.Module):
        def forward(self, x):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return x.mean((1, 2, 3))

    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default, HGGT's too
    metric, x = FrozenMetric(Flag(), "flag:flag"), torch.rand(1, 3, 8, 8)
    in_tf32(metric)(x)
    metric(x)
    assert seen == [(True, True), (False, False)] and torch.backends.cudnn.allow_tf32
    args = train_sr.parse_args(["--sampler", "amo", "--init", "none"])
    train_sr.resolve_args(args)
    assert torch.backends.cudnn.allow_tf32  # nor does it change the setting for the networks


def test_a_default_folder_tells_what_differs_from_the_paper():
    def name(script, *flags):
        args = script.parse_args(["--net", "swinir", "--init", "none", *flags])
        try:
            if script is train_sr:
                train_sr.resolve_args(args, stage_one=args.lambda_p == 0)
            else:
                script.resolve_args(args)
        except ValueError as error:
            assert "fine-tuning starts" in str(error)
        return args.out.removeprefix("runs/swinir-").replace("_init-none", "")

    amo, upos = (train_sr, "--sampler", "amo"), (finetune_lora, "--sampler", "upos")
    assert name(*amo, "--steps", "7", "--num-workers", "1", "--save-every", "3") == "amo"
    assert name(*amo, "--lr", "1e-4", "--batch-size", "32", "--data", "datasets/HGGT") == "amo"
    assert name(*amo, "--lr", "2e-4", "--milestones", "5", "6", "--seed", "1", "--bf16") == (
        "amo_lr0.0002_milestones-5+6_seed1_bf16")
    assert name(*amo, "--data", "/x/mine/", "--init-d", "runs/swinir-upos/last.pt") == (
        "amo_data-mine_init-d-swinir-upos")
    assert name(*amo, "--iqa", "musiq@w/own.pth", "a.b:c", "--ema-warmup") == (
        "amo_iqa-musiq-own+a.b.c_ema-warmup")
    assert name(*amo, "--tau", "3") == "amo_tau3"
    assert name(*amo, "--data", "datasets/HGGT/", "--lr-d", "1e-4") == "amo"
    assert name(*amo, "--data", "x/my.set1") == "amo_data-my.set1"
    assert name(*amo, "--init", "./runs/swinir-stage1/net_g_ema.pt", "--net", "swinir") == "amo"
    stage_one = (train_sr, "--lambda-p", "0", "--lambda-a", "0")
    assert name(*stage_one, "--init", "w/swinir_psnr.pth") == "stage1"
    assert name(*stage_one, "--init", "w/other.pth") == "stage1_init-other"
    assert name(train_sr, "--sampler", "rand", "--tau", "3", "--iqa", "nima") == "rand"
    assert name(*upos) == "upos+FT" and name(*upos, "--full") == "upos+FT_full"
    assert name(*upos, "--lambda-p", "2", "--lora-rank", "8") == "upos+FT_lambda-p2_lora-rank8"
    long = [name(*amo, "--milestones", *"123456789" * 9, str(i), "--seed", "1") for i in (10, 11)]
    assert all(len(f"swinir-{x}") == 100 - len("_init-none") for x in long) and long[0] != long[1]


def test_a_run_of_another_recipe_is_refused_in_one_line(base):
    flags = (*TINY, "--sampler", "rand", "--init", "stage1/net_g_ema.pt", "--out", "recipe")
    call(train_sr, *flags, "--steps", 1, cwd=base)
    state = load_file(base / "recipe/last.pt")
    del state["settings"]["recipe"]  # as before there was one
    state["settings"]["lambda_q"] = 0.0
    torch.save(state, base / "recipe/last.pt")
    bad(base, "train_sr.py", "recipe/last.pt: was trained by another version, whose recipe differs",
        *flags, "--steps", 2)


# ------------------------------------------------------------------------ bad input


def bad(base, script, message, *flags, processes=0):
    result = run(script, *flags, cwd=base, processes=processes, ok=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith(script)]
    assert lines and message in lines[0], result.stderr[-1500:]
    assert "Traceback" not in result.stderr or processes
    assert result.returncode == (1 if processes else 2)  # torchrun itself ends with 1


STAGE2 = ("--sampler", "amo", "--init", "stage1/net_g_ema.pt", "--out", "bad")


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("absent: no such folder", ("--data", "absent")),
        ("64x64 is smaller than --patch-size 128", ("--patch-size", 128)),
        ("no_such_metric", ("--iqa", "no_such_metric")),
        ("--iqa test_train:constant: gives all ground truths the same score",
         ("--iqa", "test_train:sharpness", "test_train:constant")),
        ("--iqa piqe piqe: a metric twice", ("--iqa", "piqe", "piqe")),
        ("--iqa liqe: needs images of 224 px, these are 32", ("--iqa", "piqe", "liqe")),
        ("absent.pt: no such file", ("--init", "absent.pt")),
        ("HGGT/Train/labels/0-4/A/img00.json: not a readable weight file",
         ("--init", "HGGT/Train/labels/0-4/A/img00.json")),
        ("not a RRDBNet, which --net rrdb_tiny is", ("--net", "rrdb_tiny")),
        ("of another size than --net swinir", ("--net", "swinir")),
        ("needs labels", ("--sampler", "upos", "--data", "HGGT/Train/images/0-4/original")),
        ("--sampler amo, not rand; give another --out", ("--sampler", "rand", "--out", "amo")),
    ],
)
def test_bad_input_ends_at_the_start(base, message, flags):
    argv = [*map(str, (*TINY, *STAGE2, *flags))]
    args = train_sr.parse_args(argv)
    folder = os.getcwd()
    os.chdir(base)
    try:
        with pytest.raises((ValueError, OSError)) as error:
            train_sr.main(args)
    finally:
        os.chdir(folder)
    assert message in str(error.value)
    assert not (base / "bad" / "last.pt").exists()


def test_a_refused_run_scores_nothing_and_decodes_nothing(base, tmp_path, monkeypatch):
    make_hggt(tmp_path / "data", n=2, size=64)
    flags = (*TINY, *STAGE2, "--data", tmp_path / "data", "--steps", 1, "--out", tmp_path / "run")
    call(train_sr, *flags, "--sampler", "rand", cwd=base, monkeypatch=monkeypatch)
    late = (*flags, "--cache", tmp_path / "cache", "--sampler", "sma")
    for message, more in (("was trained with", ()), ("holds no discriminator", (
            "--out", tmp_path / "other", "--init-d", base / "stage1/net_g_ema.pt"))):
        with pytest.raises(ValueError, match=message):
            call(train_sr, *late, *more, cwd=base, monkeypatch=monkeypatch)
        assert not (tmp_path / "cache").exists()
        assert {p.name for p in (tmp_path / "data/.scores").iterdir()} <= {"sha256.csv"}


def test_bad_input_is_one_line_and_exit_2(base):
    bad(base, "train_sr.py", "absent: no such folder", *TINY, *STAGE2, "--data", "absent")
    bad(base, "finetune_lora.py", "absent.pt: no such file", *TINY, *STAGE2, "--init", "absent.pt")
    result = run("train_sr.py", "--sampler", "best", cwd=base, ok=False)
    assert result.returncode == 2 and "invalid choice: 'best'" in result.stderr


@pytest.mark.parametrize(("error", "named"), [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
    (ConnectionResetError(104, "Connection reset by peer"), True), (EOFError(), True),
    (FileNotFoundError(2, "No such file or directory"), True),  # the worker's socket
    (FileNotFoundError(2, "No such file or directory", "a.png"), False),
    (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), False),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), True),
    (RuntimeError("CUDA error"), False), (PermissionError(13, "denied", "a.png"), False),
])
def test_a_killed_data_worker_is_named_and_nothing_else(error, named):
    with pytest.raises(OSError if named else type(error)) as caught, dead_worker_named():
        raise error
    assert ("a data worker was killed" in str(caught.value)) == named
    assert ("/dev/shm" in str(caught.value)) == ("shared memory" in str(error))
    assert named or caught.value is error


def test_weights_that_a_gradient_has_spoilt_are_not_saved(base, tmp_path, monkeypatch):
    """The losses of a step are computed before its weights change."""
    monkeypatch.setattr(train_sr, "discriminator_loss", spoilt_at_step_4())
    out = tmp_path / "spoilt"
    with pytest.raises(ValueError, match=r"step 4: not finite: UNetDiscriminatorSN.conv9.bias"):
        call(train_sr, *TINY, *STAGE2, "--sampler", "rand", "--save-every", 2, "--steps", 8,
             "--out", out, cwd=base, monkeypatch=monkeypatch)
    last = load_file(out / "last.pt")
    assert last["step"] == 2 and all(v.isfinite().all() for v in last["net_d"].values())


def spoilt_at_step_4():
    calls, real = [], train_sr.discriminator_loss

    def loss(net_d, sr, gt):
        calls.append(1)
        value = real(net_d, sr, gt)
        if len(calls) == 4:  # the loss is finite, its gradient is not
            net_d.conv9.bias.register_hook(lambda grad: grad * float("nan"))
        return value

    return loss


def test_workers_are_a_ranks_share_of_the_cores(monkeypatch):
    for cores, ranks, workers in ((64, 4, 8), (16, 4, 4), (2, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        args = train_sr.parse_args(["--sampler", "rand", "--init", "none"])
        train_sr.resolve_args(args)
        assert args.num_workers == workers
    args = train_sr.parse_args(["--sampler", "rand", "--init", "none", "--num-workers", "0"])
    train_sr.resolve_args(args)
    assert args.num_workers == 0


def test_batch_must_divide_among_processes(base):
    bad(base, "train_sr.py", "divisible by the 2 processes", *TINY, *STAGE2, "--batch-size", 3,
        processes=2)


def test_an_error_of_the_system_begins_with_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)
    monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
    (tmp_path / "x").touch()
    for work, line in ((lambda: (tmp_path / "x").mkdir(), f"{tmp_path}/x: file exists"),
                       (lambda: tmp_path.read_text(), f"{tmp_path}: is a directory"),
                       (lambda: os.read(-1, 1), "[Errno 9] Bad file descriptor")):  # has no name
        with pytest.raises(SystemExit) as stop, distributed.clean_exit("a.py"):
            work()
        assert (stop.value.code, capsys.readouterr().err) == (2, f"a.py: {line}\n")


def test_a_signal_while_a_message_is_reported_does_not_lose_it(tmp_path):
    """torchrun sends one to the rank that reports the death of another."""
    script = tmp_path / "report.py"
    script.write_text("""if True:
        import os
        import signal
        from models import distributed
        count = distributed._count
        def interrupted(*event):
            os.kill(os.getpid(), signal.SIGTERM)
            return count(*event)
        distributed._count = interrupted
        with distributed.clean_exit("report.py"):
            raise OSError("no such photograph")
        """)
    result = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)},
                            stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (2, "report.py: no such photograph\n")
