"""A run's folder, any public network, validation and the guard."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from make_data import make_hggt
from PIL import Image
from scripts import ROOT, environment
from test_train import TINY, call, read_log, run

import finetune_lora
import train_sr
from models import validation
from models.checkpoint import load_file, read_csv, read_state, save_atomic
from models.hggt import load_sets
from models.rrdb import RRDBNet
from models.run import TrainingRun
from models.swinir import SwinIR
from models.validation import read_pairs

# ------------------------------------------------------------------------ the folder of a run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A working folder with data, a stage-one net and a 6-step amo run."""
    folder = tmp_path_factory.mktemp("runs")
    make_hggt(folder / "HGGT", n=4, size=64)
    with pytest.MonkeyPatch.context() as patch:
        call(train_sr, *TINY, "--data", "HGGT/Train/images/0-4/original", "--lambda-p", 0,
             "--lambda-a", 0, "--steps", 3, "--out", "stage1", cwd=folder, monkeypatch=patch)
        call(train_sr, *TINY, "--sampler", "amo", "--init", "stage1/net_g_ema.pt", "--steps", 6,
             "--out", "amo", cwd=folder, monkeypatch=patch)
    return folder


RAND = (*TINY, "--sampler", "rand", "--init", "stage1/net_g_ema.pt", "--lambda-a", 0)


def test_samples_are_the_averaged_networks(base, monkeypatch):
    for out, decay in (("frozen", 0.999999), ("followed", 0.0)):
        call(train_sr, *RAND, "--steps", 4, "--lr", 0.05, "--ema-decay", decay, "--sample-every", 4,
             "--out", out, cwd=base, monkeypatch=monkeypatch)
    frozen, followed = (np.asarray(Image.open(base / out / "samples/000004.png")).astype(int)
                        for out in ("frozen", "followed"))
    sr = slice(32, 64)  # the middle column
    assert (frozen[:, :32] == followed[:, :32]).all() and (frozen[:, 64:] == followed[:, 64:]).all()
    assert abs(frozen[:, sr] - frozen[:, 64:]).mean() < abs(followed[:, sr]
                                                            - followed[:, 64:]).mean()


def test_a_short_run_is_warned_of_its_average(base, monkeypatch, capsys):
    flags = (*RAND, "--steps", 1, "--lr", 1e-4)
    for more, warned in (((), True), (("--ema-warmup",), False), (("--ema-decay", 0), False)):
        out = f"warned-{'-'.join(map(str, more))}"
        call(train_sr, *flags, *more, "--out", out, cwd=base, monkeypatch=monkeypatch)
        assert ("warning: --steps 1 are few for --ema-decay" in capsys.readouterr().err) == warned


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_nothing(base):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from models.run import open_run\n"
            "from pathlib import Path\nopen_run(Path('locked'), {}); print('locked', flush=True)\n"
            "time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], cwd=base, text=True,
                              stdout=subprocess.PIPE, env=environment())
    assert holder.stdout.readline() == "locked\n"
    result = run("train_sr.py", *RAND, "--steps", 1, "--out", "locked", cwd=base, ok=False)
    assert result.returncode == 2
    assert "locked: another run is writing to it; wait for its end, or give another --out" in (
        result.stderr)
    holder.kill()
    holder.wait()
    (base / "locked/.1a2b3c4d.99.tmp").touch()  # of the killed run's last.pt
    run("train_sr.py", *RAND, "--steps", 1, "--out", "locked", cwd=base)
    assert not list((base / "locked").glob("**/*.tmp"))


def test_a_damaged_log_is_made_again_from_the_checkpoint(base, monkeypatch):
    flags = (*RAND, "--log-every", 1, "--out", "logged")
    call(train_sr, *flags, "--steps", 3, cwd=base, monkeypatch=monkeypatch)
    log = base / "logged/log.csv"
    before = log.read_bytes()
    for damage in (b"\xff\x00" + before, before.replace(b"0.", b"9.", 1), b""):
        log.write_bytes(damage)
        call(train_sr, *flags, "--steps", 3, cwd=base, monkeypatch=monkeypatch)
        assert log.read_bytes() == before
    call(train_sr, *RAND, "--log-every", 2, "--out", "logged2", "--steps", 3, cwd=base,
         monkeypatch=monkeypatch)
    rows = (base / "logged2/log.csv").read_bytes()
    call(train_sr, *RAND, "--log-every", 2, "--out", "logged2", "--steps", 3, cwd=base,
         monkeypatch=monkeypatch)
    assert (base / "logged2/log.csv").read_bytes() == rows  # a rerun drops no last row
    log.unlink()
    call(train_sr, *flags, "--steps", 4, cwd=base, monkeypatch=monkeypatch)
    assert log.read_bytes().startswith(before)


@pytest.mark.parametrize("change", ["pixels", "labels"])
def test_changed_data_of_equal_size_and_time_is_another_setting(change, base, tmp_path,
                                                                monkeypatch):
    """Inverted pixels, and other labels, were resumed without a word."""
    make_hggt(tmp_path / "HGGT", n=2)
    path = tmp_path / "HGGT/Train/images/0-4/02/img01_02.png"
    image = np.asarray(Image.open(path))
    Image.fromarray(image).save(path, compress_level=0)
    flags = (*RAND, "--data", "HGGT", "--init", base / "stage1/net_g_ema.pt", "--out", "run")
    call(train_sr, *flags, "--steps", 1, cwd=tmp_path, monkeypatch=monkeypatch)
    call(train_sr, *flags, "--steps", 2, cwd=tmp_path, monkeypatch=monkeypatch)
    stat = os.stat(path)
    if change == "pixels":
        Image.fromarray(255 - image).save(path, compress_level=0)
        assert os.stat(path).st_size == stat.st_size
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for votes in (tmp_path / "HGGT").rglob("img01.json") if change == "labels" else ():
        stat = os.stat(votes)
        votes.write_text(votes.read_text().replace("Positive", "Negative"))
        os.utime(votes, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="was trained with --data of sha256 .*, not of sha256"):
        call(train_sr, *flags, "--steps", 3, cwd=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_the_default_start_is_what_the_stage_before_wrote(base, tmp_path):
    tiny = (*TINY, "--data", base / "HGGT", "--steps", 1)
    result = run("train_sr.py", *tiny, "--sampler", "rand", cwd=tmp_path, ok=False)
    assert result.returncode == 2 and "runs/swinir_tiny-stage1/net_g_ema.pt: not there" in (
        result.stderr)
    (tmp_path / "runs/swinir_tiny-stage1").mkdir(parents=True)
    shutil.copy(base / "stage1/net_g_ema.pt", tmp_path / "runs/swinir_tiny-stage1")
    run("train_sr.py", *tiny, "--sampler", "rand", cwd=tmp_path)
    run("finetune_lora.py", *tiny, "--sampler", "rand", "--lora-rank", 2, cwd=tmp_path)
    assert len(list((tmp_path / "runs").glob("swinir_tiny-rand+FT_*/lora.pt"))) == 1
    # Several: the choice is the user's
    first = tmp_path / "runs/swinir_tiny-stage1"
    shutil.copytree(first, first.with_name("swinir_tiny-stage1_seed1"))
    result = run("train_sr.py", *tiny, "--sampler", "upos", cwd=tmp_path, ok=False)
    assert result.returncode == 2 and (
        "--init is missing; choose one of runs/swinir_tiny-stage1/net_g_ema.pt "
        "runs/swinir_tiny-stage1_seed1/net_g_ema.pt" in result.stderr)


# ------------------------------------------------------------------------ any public network


def compact():
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    return SRVGGNetCompact(num_feat=8, num_conv=3, upscale=4)


@pytest.mark.parametrize(("build", "net", "adapted"), [
    (compact, "other", 3),
    (lambda: RRDBNet(num_block=1), "rrdb", 15),
    (lambda: SwinIR(depths=(2, 2), embed_dim=60, num_heads=(6, 6),
                    upsampler="pixelshuffledirect"), "swinir", 8),
], ids=["Compact", "RRDB of 1 block", "SwinIR S"])
def test_any_x4_network_is_tuned_and_loads_where_it_came_from(build, net, adapted, base, tmp_path,
                                                              monkeypatch):
    import spandrel

    torch.manual_seed(0)
    public = build()
    save_atomic({"params": public.state_dict()}, tmp_path / "public.pth")
    flags = [f for f in TINY if f not in ("--net", "swinir_tiny")]
    call(finetune_lora, *flags, "--data", base / "HGGT", "--sampler", "rand", "--init",
         "public.pth", "--lora-rank", 2, "--steps", 2, "--num-workers", 0, "--lr", 0.05,
         "--ema-decay", 0, "--out", "tuned", cwd=tmp_path, monkeypatch=monkeypatch)
    tuned = load_file(tmp_path / "tuned/net_g_ema.pt")
    assert tuned["settings"]["net"] == net
    assert tuned["params_ema"].keys() == public.state_dict().keys()
    found = spandrel.ModelLoader(device="cpu").load_from_file(tmp_path / "tuned/net_g_ema.pt")
    assert type(found.model).__name__ == type(public).__name__ and found.scale == 4
    moved = [k for k, v in public.state_dict().items()
             if not torch.equal(v, tuned["params_ema"][k])]
    assert len(moved) == len(load_file(tmp_path / "tuned/lora.pt")["lora"]) // 2 == adapted
    # Adapters on layers of your choice, and another scale
    with pytest.raises(ValueError, match="LoRA target 'none.*' matches no linear or convolution"):
        call(finetune_lora, *flags, "--data", base / "HGGT", "--sampler", "rand", "--init",
             "public.pth", "--lora-targets", "none.*", "--out", "x", cwd=tmp_path,
             monkeypatch=monkeypatch)


def test_auto_needs_a_file_and_an_x4_network(base, tmp_path, monkeypatch):
    state = RRDBNet(num_block=1, num_feat=8, num_grow_ch=4).state_dict()
    state["conv_first.weight"] = torch.zeros(8, 12, 3, 3)
    save_atomic(state, tmp_path / "x2.pth")
    for more, message in ((("--init", "none", "--net", "auto"), "--net auto: takes the network"),
                          (("--init", tmp_path / "x2.pth"), "of x2; only x4 is supported")):
        with pytest.raises(ValueError, match=message):
            call(train_sr, "--sampler", "rand", "--data", base / "HGGT", *more, cwd=tmp_path,
                 monkeypatch=monkeypatch)


# ------------------------------------------------------------------------ validation


@pytest.fixture(scope="module")
def pairs(base):
    (base / "val/lq").mkdir(parents=True)
    (base / "val/gt").mkdir()
    for path in (base / "HGGT/Train/images/0-4/original").glob("*.png"):
        shutil.copy(path, base / "val/gt")
        small = Image.open(path).resize((16, 16), Image.Resampling.BICUBIC)
        small.save(base / "val/lq" / path.name)
    return ("--val", "val/lq", "val/gt", "--val-every", 2)


def read_validations(out):
    return [row for row in read_log(out / "log.csv") if row["val_passed"]]


def test_validation_scores_the_averaged_network_as_the_tables_do(base, pairs, monkeypatch):
    call(train_sr, *RAND, *pairs, "--steps", 5, "--out", "valid", cwd=base,
         monkeypatch=monkeypatch)
    rows = read_validations(base / "valid")
    assert [row["step"] for row in rows] == ["0", "2", "4", "5"] and list(rows[0])[-4:] == [
        "val_psnr", "val_ssim", "val_q", "val_passed"]  # Q, too, which rand does not use
    best = max(rows[1:], key=lambda row: float(row["val_psnr"]))
    call(train_sr, *RAND, *pairs, "--steps", best["step"], "--out", "best", cwd=base,
         monkeypatch=monkeypatch)
    a, b = (read_state(base / name) for name in ("valid/net_g_best.pt", "best/net_g_ema.pt"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    run("evaluate.py", "--models", "A=valid/net_g_ema.pt", "--gt", "val/gt", "--lq",
        "val/lq", "--metrics", "psnr", "ssim", "--out", "valid/t.csv", cwd=base)
    (table,), _ = read_csv(base / "valid/t.csv")
    for column in ("psnr", "ssim"):
        assert float(rows[-1][f"val_{column}"]) == pytest.approx(float(table[column]), abs=1e-4)
    call(train_sr, *RAND, "--steps", 5, "--out", "plain5", cwd=base, monkeypatch=monkeypatch)
    rows, plain = (read_log(base / f"{name}/log.csv") for name in ("valid", "plain5"))
    assert [{key: row[key] for key in plain[0]} for row in rows if row["lr"]] == plain
    for steps in (4, 5):  # resumed, it is the same file
        call(train_sr, *RAND, *pairs, "--steps", steps, "--out", "valid2", cwd=base)
    assert (base / "valid/log.csv").read_bytes() == (base / "valid2/log.csv").read_bytes()


def test_each_validation_is_told_in_a_line(base, pairs):
    result = run("train_sr.py", *RAND, *pairs, "--steps", 2, "--out", "told", cwd=base)
    told = re.findall(r"^told: step (\d): val_psnr (\S+), val_ssim \S+, val_q \S+$", result.stderr,
                      re.M)
    assert told == [(row["step"], f"{float(row['val_psnr']):.4g}")
                    for row in read_validations(base / "told")] and len(told) == 2


@pytest.mark.slow
def test_the_guard_goes_back_to_the_last_step_of_equal_fidelity(base, pairs):
    check_guard(base, pairs, processes=0)


def check_guard(base, pairs, processes):
    """Two processes are tried among the fault tests."""
    flags = (*TINY, "--sampler", "rand", "--init", "amo/net_g_ema.pt", "--lora-rank", 4, "--lr",
             0.02, "--lambda-q", 5, "--ema-decay", 0, "--steps", 40, "--save-every", 4, *pairs,
             "--guard", 0.01)
    out = base / f"guarded{processes}"
    result = run("finetune_lora.py", *flags, "--out", out.name, cwd=base, processes=processes)
    rows = read_validations(out)
    psnr = [float(row["val_psnr"]) for row in rows]
    passed = [value >= psnr[0] - 0.01 for value in psnr]
    assert [row["val_passed"] == "1" for row in rows] == passed
    assert passed[0] and not passed[-1] and not passed[-2] and passed[-3] and len(rows) < 21
    kept = int(rows[-3]["step"])
    assert (f"stopped at step {rows[-1]['step']}, as fidelity fell; the result is that of step "
            f"{kept}" in result.stderr + result.stdout)
    # The result is the network of that step, and a rerun goes no further
    short = [*flags[:-2], "--guard", 0]
    short[short.index("--steps") + 1] = kept or 1
    before = (out / "net_g_ema.pt").read_bytes(), (out / "log.csv").read_bytes()
    if kept:
        run("finetune_lora.py", *short, "--out", f"short{processes}", cwd=base,
            processes=processes)
        a, b = (read_state(f / "net_g_ema.pt") for f in (out, base / f"short{processes}"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    run("finetune_lora.py", *flags, "--out", out.name, cwd=base, processes=processes)
    assert before == ((out / "net_g_ema.pt").read_bytes(), (out / "log.csv").read_bytes())


def test_images_are_held_out_of_a_flat_folder(base, monkeypatch):
    flat = (*TINY, "--data", "HGGT/Train/images/0-4/original", "--init", "stage1/net_g_ema.pt",
            "--lambda-a", 0, "--val-every", 2, "--log-every", 1)
    call(train_sr, *flat, "--val", 1, "--steps", 4, "--out", "held", cwd=base)
    rows = read_validations(base / "held")
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert json.loads((base / "held/config.json").read_text())["flags"]["val"] == "[1]"
    # Which one is its content's matter: under other names, it is the same one
    other = base / "renamed"
    other.mkdir()
    for i, path in enumerate(sorted((base / "HGGT/Train/images/0-4/original").glob("*.png"))):
        shutil.copy(path, other / f"{9 - i}.png")
    call(train_sr, *flat, "--data", "renamed", "--val", 1, "--steps", 2, "--out", "held2", cwd=base)
    again = read_validations(base / "held2")
    assert again[0] == rows[0]
    # It is not trained on, and its centre is what is scored
    args = train_sr.parse_args([str(flag) for flag in (*flat, "--data", "renamed", "--val", 1)])
    monkeypatch.chdir(base)
    train_sr.resolve_args(args)
    sets, [(lq, gt)] = train_sr.load_data(args)
    held_out, = {path.stem for path in other.glob("*.png")} - set(sets.names)
    assert len(sets.names) == 3 and lq.shape == (8, 8, 3)
    with Image.open(other / f"{held_out}.png") as image:
        assert (np.asarray(image)[16:48, 16:48] == gt).all()
    with pytest.raises(ValueError, match="--val 4: .*original has 4 different images"):
        call(train_sr, *flat, "--val", 4, "--steps", 2, "--out", "held", cwd=base)
    with pytest.raises(ValueError, match="--val 1: HGGT is no flat folder; give --val LQ GT"):
        call(train_sr, *RAND, "--val", 1, "--steps", 2, "--out", "held5", cwd=base)
    with pytest.raises(ValueError, match="--val HGGT 1: give two folders"):
        call(train_sr, *RAND, "--val", "HGGT", 1, "--steps", 2, "--out", "held5", cwd=base)


def test_samples_show_the_same_crops_after_every_step(base, pairs, monkeypatch):
    for more in ((), pairs):
        out = f"shown{len(more)}"
        call(train_sr, *RAND, *more, "--steps", 4, "--sample-every", 2, "--out", out, cwd=base)
        files = sorted((base / out / "samples").glob("*.png"))
        assert [file.stem for file in files] == ["000001", "000002", "000004"]
        first, *others = (np.asarray(Image.open(file)) for file in files)
        for image in others:
            for columns in (slice(0, 32), slice(64, 96)):  # LQ, ground truth
                assert (image[:, columns] == first[:, columns]).all()
            assert (image[:24, 32:64] != first[:24, 32:64]).any()  # the caption has the step
        if more:
            (lq, gt), *_ = read_pairs(*(str(base / f) for f in more[1:3]))
            assert (first[24 : 24 + 32, 64:96] == gt[16:48, 16:48]).all()
            assert (first[24 : 24 + 32, 0:32] == lq[4:12, 4:12].repeat(4, 0).repeat(4, 1)).all()


def test_validation_may_begin_at_a_resume_but_not_with_a_guard(base, pairs, monkeypatch):
    guarded = (*RAND, "--out", "guarded", "--guard", 1, "--val-every", 2)
    call(train_sr, *guarded, "--steps", 2, cwd=base)
    with pytest.raises(ValueError, match="guarded: --guard compares with the start, which this"):
        call(train_sr, *guarded, *pairs, "--steps", 4, cwd=base)
    flags = (*RAND, "--out", "later", "--val-every", 2)
    call(train_sr, *flags, "--steps", 2, cwd=base)
    call(train_sr, *flags, *pairs, "--steps", 4, cwd=base)
    assert [row["step"] for row in read_validations(base / "later")] == ["4"]
    assert (base / "later/net_g_best.pt").is_file()
    # Without validation the run goes on, keeps the rows, and ends with the last step's network
    call(train_sr, *flags, "--steps", 5, cwd=base)
    call(train_sr, *RAND, "--steps", 5, "--out", "unvalidated", cwd=base)
    assert [row["step"] for row in read_validations(base / "later")] == ["4"]
    a, b = (read_state(base / name / "net_g_ema.pt") for name in ("later", "unvalidated"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert "Steps: 5" in (base / "later/card.md").read_text()
    # Columns that come later would not compare
    monkeypatch.setattr(validation, "SECOND", {"piqe": "piqe"})
    with pytest.raises(ValueError, match="later: was validated by psnr,ssim,q, not psnr,ssim,"):
        call(train_sr, *flags, *pairs, "--steps", 6, cwd=base)


def test_a_longer_run_forgets_the_validation_of_a_shorter_ones_end(base, pairs, monkeypatch):
    """It was one of the guard's two in a row: the longer run ended where one in one go did not."""
    def go(out, steps, psnr):
        monkeypatch.setattr(validation.Validation, "__call__", lambda self, net: [
            psnr[go.step], *[0.0] * (len(self.columns) - 1)])
        validate = TrainingRun.validate

        def noting(self, step, *rest):
            go.step = step
            validate(self, step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingRun, "validate", noting)
            call(train_sr, *RAND, *pairs, "--guard", 0.3, "--steps", steps, "--out", out, cwd=base)

    for name, psnr, stop in (("dip", {0: 20, 2: 20, 4: 19, 5: 19, 6: 20, 8: 20}, 8),
                             ("dips", {0: 20, 2: 20, 4: 19, 5: 19, 6: 19, 8: 20}, 6),
                             ("fall", {0: 20, 2: 20, 4: 20, 5: 20, 6: 19, 8: 19}, 8)):
        go(name, 8, psnr)
        go(f"{name}2", 5, psnr)
        assert read_validations(base / f"{name}2")[-1]["step"] == "5"
        go(f"{name}2", 8, psnr)
        assert read_validations(base / name)[-1]["step"] == str(stop)
        for file in ("log.csv", "net_g_ema.pt", "card.md"):
            assert (base / name / file).read_bytes() == (base / f"{name}2" / file).read_bytes()


def test_the_best_network_stays_that_of_a_shorter_runs_end(base, pairs, monkeypatch):
    for steps, psnr in ((3, 25.0), (6, 21.0)):
        monkeypatch.setattr(validation.Validation, "__call__", lambda self, net, psnr=psnr: [
            psnr, *[0.0] * (len(self.columns) - 1)])
        call(train_sr, *RAND, *pairs, "--steps", steps, "--out", "bests", cwd=base)
        if steps == 3:
            before = (base / "bests/net_g_best.pt").read_bytes()
    assert (base / "bests/net_g_best.pt").read_bytes() == before


def test_dropout_is_the_same_after_a_resume(base, monkeypatch):
    build = train_sr.PRESETS["swinir_tiny"]["build"]
    monkeypatch.setitem(train_sr.PRESETS["swinir_tiny"], "build",
                        lambda: torch.nn.Sequential(build(), torch.nn.Dropout(0.5)))
    flags = (*TINY, "--sampler", "rand", "--init", "none", "--out")
    for out, ends in (("dropped", [4]), ("dropped2", [2, 4])):
        for steps in ends:
            call(train_sr, *flags, out, "--steps", steps, cwd=base)
    call(train_sr, *flags, "dropped3", "--seed", 1, "--steps", 4, cwd=base)
    a, b, c = ((base / out / "log.csv").read_text() for out in ("dropped", "dropped2", "dropped3"))
    assert a == b != c


def test_a_run_that_has_more_steps_is_refused(base):
    call(train_sr, *RAND, "--steps", 3, "--out", "three", cwd=base)
    before = (base / "three/log.csv").read_bytes()
    with pytest.raises(ValueError, match="three: has 3 steps, more than --steps 2; give 3 or more"):
        call(train_sr, *RAND, "--steps", 2, "--out", "three", cwd=base)
    assert (base / "three/log.csv").read_bytes() == before


def test_a_run_is_validated_on_the_same_images_throughout(base, pairs):
    shutil.copytree(base / "val", base / "val2")
    sorted((base / "val2/gt").glob("*.png"))[0].unlink()
    flags = (*RAND, "--val-every", 2, "--out", "same-images")
    call(train_sr, *flags, *pairs, "--steps", 2, cwd=base)
    with pytest.raises(ValueError, match="same-images: was validated on other images than --val's"):
        call(train_sr, *flags, "--val", "val2/lq", "val2/gt", "--steps", 4, cwd=base)


def test_no_twin_of_a_held_out_image_is_trained_on(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, value in (("a", 0), ("b", 0), ("c", 90), ("d", 90), ("e", 30)):
        Image.new("RGB", (64, 64), (value, 0, 0)).save(photos / f"{name}.png")
    sets = load_sets(photos)
    for count in (1, 2):
        rest, held_out = validation.hold_out(sets, count, str(tmp_path / "run"))
        held, kept = ({(photos / f"{name}.png").read_bytes() for name in part.names}
                      for part in (held_out, rest))
        assert len(held_out.names) == len(held) == count and not held & kept
        assert len(held | kept) == 3
    with pytest.raises(ValueError, match="--val 3: .*photos has 3 different images; hold out"):
        validation.hold_out(sets, 3, str(tmp_path / "run"))


def test_shrunk_photos_can_be_held_out(base):
    sets = load_sets(base / "HGGT/Train/images/0-4/original").subset(np.arange(4), 2)
    rest, held_out = validation.hold_out(sets, 1, str(base))
    for part, count in ((rest, 3), (held_out, 1)):
        assert part.sizes.tolist() == [[32, 32]] * count
        assert part.read(part.paths[0][0]).shape == (32, 32, 3)


def test_bad_validation_data_are_refused_at_the_start(base, pairs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such LQ image"):
        call(train_sr, *RAND, "--val", tmp_path, "val/gt", "--steps", 1, "--out", "badval",
             cwd=base, monkeypatch=monkeypatch)
    assert not (base / "badval/last.pt").exists()


# ------------------------------------------------------------------------ what a run says


def test_a_run_says_what_it_is_and_off_a_terminal_how_far_it_has_come(base):
    result = run("train_sr.py", *TINY, "--sampler", "amo", "--init", "stage1/net_g_ema.pt",
                 "--steps", 5, "--log-every", 2, "--out", "said", cwd=base)
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"said: SwinIR of 4\d,\d{3} parameters, 4\d,\d{3} of them trained, from "
                        r"stage1/net_g_ema.pt; on cpu, 1 processes, \d+ GiB of memory free",
                        lines[0])
    assert lines[1] == ("  data: HGGT, 4 sets of 5; sampler amo; Q: test_train:sharpness")
    assert lines[2] == "  losses: 1 l_pix, 1 l_percep, 0.1 l_adv; perceptual: laplacian"
    assert lines[3].startswith("  5 steps of 2 patches of 32 pixels; lr 0.001, halved after 200000")
    assert lines[-1] == "wrote said/net_g_ema.pt"
    steps = re.findall(r"^said: step (\d) of 5, [\d.e-]+ s each, 0:00:\d\d left: l_pix 0.\d+, ",
                       result.stderr, re.M)
    assert steps == ["2", "4", "5"] and "\r" not in result.stderr
    config = json.loads((base / "said/config.json").read_text())
    assert config["flags"]["steps"] == "5" and "--log-every 2" in config["command"]
    assert config["settings"]["data"].startswith("of sha256 ") and config["packages"]["torch"]
