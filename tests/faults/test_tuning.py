"""Longer tests of training: photos to tables by tools/tune.py, and several processes."""

import json
import re

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from scripts import run_script
from test_runs import base, check_guard, pairs  # noqa: F401
from test_train import TINY, run, same_weights
from test_tune import make_photos

from models.checkpoint import load_file, read_csv, read_state, save_atomic
from models.rrdb import RRDBNet
from models.weights import load_net


def test_the_guard_on_two_processes(base, pairs):  # noqa: F811
    check_guard(base, pairs, processes=2)


def test_one_command_tunes_a_network_and_resumes(tmp_path):
    photos, work, out = make_photos(tmp_path / "photos"), tmp_path / "work", tmp_path / "out"
    Image.new("RGB", (100, 300)).save(photos / "small.png")
    torch.manual_seed(0)
    net = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)
    save_atomic({"params": net.state_dict()}, tmp_path / "public.pth")
    flags = (photos, "--init", tmp_path / "public.pth", "--out", out, "--work", work, "--q",
             "demo.photo_quality:q", "--perceptual", "laplacian", "--steps", 4, "--every", 2,
             "--patch-size", 32, "--compare")
    done = run_script("tools.tune", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{photos}: 8 PNG, 6 JPEG; 1 smaller than 256 pixels, left out" in done.stdout
    assert "5 photos to train, 4 to validate, 4 to test; RRDBNet of" in done.stdout
    rows, notes = read_csv(out / "photos.csv")
    assert [row["model"] for row in rows] == [
        "bicubic", "base", "tuned x0.5", "tuned x1", "tuned x1.5", "full", "no-reward"]
    assert all(np.isfinite(float(row[c])) for row in rows for c in ("psnr", "ssim", "q"))
    for name in ("photos.csv", "photos_per_image.csv"):  # piqe gives none on smooth images
        assert "nan" not in (out / name).read_text()
    chosen = re.search(r"chosen: scale ([\d.]+)", " ".join(notes))[1]
    per_image, _ = read_csv(out / "photos_per_image.csv")
    crops = len(list((work / "test/lq").glob("*_[01].png")))
    assert len(per_image) == 7 * crops and 4 <= crops <= 8
    # What other programs load is the base with the adapters at that scale
    tuned, lora = load_net(out / "tuned.pth"), load_file(out / "lora.pt")
    name = next(iter(lora["lora"])).removesuffix(".lora_a")
    change = lora["lora"][f"{name}.lora_b"] @ lora["lora"][f"{name}.lora_a"]
    expected = net.state_dict()[f"{name}.weight"] + float(chosen) * change.view(
        net.state_dict()[f"{name}.weight"].shape)
    torch.testing.assert_close(tuned.state_dict()[f"{name}.weight"], expected)
    assert read_state(out / "tuned.safetensors").keys() == net.state_dict().keys()
    assert list(load_file(out / "tuned.pth")) == ["params"]  # as in public.pth
    assert json.loads((out / "config.json").read_text())["flags"]["sampler"] == "origs_only"
    card = (out / "card.md").read_text()
    with safe_open(out / "tuned.safetensors", "pt") as file:
        about = file.metadata()
    assert (about["q"], about["sampler"], about["lora_scale"]) == (
        "demo.photo_quality:q", "origs_only", chosen)
    assert f"4 test photos, {crops} crops of 256 pixels" in " ".join(notes)
    assert re.search(r"full: all weights at lr 1e-05; step [24]", " ".join(notes))
    assert "Q is a stand-in for MUSIQ" in " ".join(notes)
    assert "| tuned x1 |" in card and f"scale: {chosen}" in card and "{" not in card
    assert (out / "strip.png").is_file() and (out / "report.html").stat().st_size > 1e5
    assert len(list(out.glob("*_0_*.jpg"))) == 6
    html = (out / "report.html").read_text()
    page = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    best = f"tuned x{chosen}" if float(chosen) else "base"
    assert [page["sources"][i] for i in page["open"]] == [
        "base" if float(chosen) else "bicubic", best]
    assert [image["name"].endswith("_whole") for image in page["images"]] == [
        True] * 2 + [False] * crops
    # Again: nothing is trained, equal tables
    before = (out / "photos.csv").read_bytes()
    done = run_script("tools.tune", *flags)
    assert done.returncode == 0 and done.stdout.count("resuming ") == 3, done.stderr[-2000:]
    assert (out / "photos.csv").read_bytes() == before
    # Other settings
    done = run_script("tools.tune", *flags, "--seed", 1)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(
        f"if {work} was begun with other flags, give those again, or another --work")
    # Other photos in the same work folder
    (photos / "photo00.png").unlink()
    done = run_script("tools.tune", *flags)
    assert done.returncode == 2 and "work: made of other photos" in done.stderr


DEPTH = """if True:
    import sys
    import train_sr
    train_sr.PRESETS["swinir_tiny"]["drop_path"] = 0.5
    with train_sr.clean_exit("deep.py"):
        train_sr.main(train_sr.parse_args(sys.argv[1:]))
"""


def test_stochastic_depth_is_the_same_on_1_2_and_4_processes_and_after_a_resume(base,  # noqa: F811
                                                                                tmp_path):
    (tmp_path / "deep.py").write_text(DEPTH)
    flags = (*TINY, "--batch-size", 4, "--lr-d", 1e-4, "--sampler", "rand", "--init",
             "stage1/net_g_ema.pt", "--log-every", 1, "--save-every", 1)

    def deep(out, steps, processes=0):
        run(tmp_path / "deep.py", *flags, "--steps", steps, "--out", out, cwd=base,
            processes=processes)

    deep("deep1", 3)
    run("train_sr.py", *flags, "--steps", 3, "--out", "shallow", cwd=base)
    assert (base / "deep1/log.csv").read_bytes() != (base / "shallow/log.csv").read_bytes()
    deep("deep-resumed", 2)
    deep("deep-resumed", 3)
    same_weights(base / "deep1/last.pt", base / "deep-resumed/last.pt")
    for processes in (2, 4):
        deep(f"deep{processes}", 3, processes)
        same_weights(base / "deep1/last.pt", base / f"deep{processes}/last.pt", tolerance=1e-5)
