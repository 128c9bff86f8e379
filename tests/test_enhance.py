"""tools/enhance.py: multi-GT sets from plain images."""

import csv
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from make_data import smooth_image
from PIL import Image

from models.hggt import load_sets
from models.rrdb import RRDBNet
from tools import enhance as tool
from tools.enhance import enhance
from train_sr import PRESETS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def save_shift(path, steps, channels=3):
    """A DnCNN, of scale 1, that adds `steps` / 255 to every image: x - (0 - steps / 255)."""
    state = {}
    for i in range(0, 16, 2):
        out, into = (channels if i == 14 else 4), (channels if i == 0 else 4)
        state[f"model.{i}.weight"] = torch.zeros(out, into, 3, 3)
        state[f"model.{i}.bias"] = torch.zeros(out)
    state["model.14.bias"] -= steps / 255
    torch.save(state, path)


def save_net(path, net):
    torch.save({"params_ema": net.state_dict()}, path)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working folder with three photos and three checkpoints: scale 1, 1 and 4."""
    monkeypatch.chdir(tmp_path)
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    photos.mkdir()
    images = [Image.fromarray(smooth_image(rng, *size)) for size in ((40, 56), (48, 36), (37, 50))]
    images[0].save(photos / "x.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    images[1].save(photos / "y.jpg", quality=95, exif=exif)
    images[2].save(photos / "z.WEBP", lossless=True)
    save_shift("bright.pth", 20)
    save_shift("dark.pt", -20)
    torch.manual_seed(0)
    net = RRDBNet(num_feat=8, num_block=1)
    net.requires_grad_(False).conv_last.weight.mul_(20)
    save_net("rrdb.pt", net)
    return tmp_path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_enhanced_sets_by_hand(workdir):
    sets = enhance("photos", "out", ["bright.pth", "rrdb.pt"])
    assert sets.names == ["x", "y", "z"] and sets.labels is None
    assert sets.paths[1] == ["out/original/y.png", "out/bright/y.png", "out/rrdb/y.png"]
    assert sets.sizes.tolist() == [[40, 56], [36, 48], [37, 50]]  # y stands upright
    assert (pixels("out/original/x.png") == pixels("photos/x.png")).all()
    assert (pixels("out/original/z.png") == pixels("photos/z.WEBP")).all()
    assert (pixels("out/original/y.png") == np.rot90(pixels("photos/y.jpg"), -1)).all()
    net = RRDBNet.from_state(torch.load("rrdb.pt", weights_only=True)["params_ema"])
    for name in sets.names:
        original = pixels(f"out/original/{name}.png")
        assert (pixels(f"out/bright/{name}.png") == np.minimum(original + 20, 255)).all()
        with torch.no_grad():
            sr = net(torch.tensor(original / 255).float().permute(2, 0, 1)[None])[0].clamp(0, 1)
        sr = Image.fromarray((255 * sr).round().byte().permute(1, 2, 0).numpy())
        sr = sr.resize(original.shape[1::-1], Image.Resampling.BICUBIC)
        assert np.asarray(sr).std() > 5
        assert np.abs(pixels(f"out/rrdb/{name}.png") - np.asarray(sr)).max() <= 1  # rounding


def test_crops_cover_the_image_evenly(workdir):
    enhance("photos", "out", ["bright.pth"], crop=24)
    tops_lefts = {"x": ([0, 16], [0, 16, 32]), "y": ([0, 12], [0, 24]), "z": ([0, 13], [0, 13, 26])}
    expected = {f"{n}_{t}_{left}" for n, (a, b) in tops_lefts.items() for t in a for left in b}
    assert {p.stem for p in (workdir / "out/original").iterdir()} == expected
    whole = pixels("photos/x.png")
    for t, left in itertools.product(*tops_lefts["x"]):
        patch = whole[t : t + 24, left : left + 24]
        assert (pixels(f"out/original/x_{t}_{left}.png") == patch).all()
        assert (pixels(f"out/bright/x_{t}_{left}.png") == np.minimum(patch + 20, 255)).all()


def test_enhance_resumes_and_gaps_are_noticed(workdir, monkeypatch):
    real, calls = tool.restore, []

    def interrupted(net, image):
        calls.append(image.shape)
        if len(calls) == 5:  # two tries of the networks, two images
            raise KeyboardInterrupt
        return real(net, image)

    both = ["bright.pth", "dark.pt"]
    monkeypatch.setattr(tool, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        enhance("photos", "out", both)
    with pytest.raises(ValueError, match=r"out/dark/x.png: missing member .*and 3 more"):
        load_sets("out")
    before = {p: p.stat().st_mtime_ns for p in (workdir / "out").rglob("*/*.png")}
    assert len(before) == 5
    assert len(enhance("photos", "out", both).names) == 3
    assert len(calls) == 5 + 2 + 4  # the tries, and what was missing
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())

    (workdir / "out/original/x.png").unlink()
    (workdir / "out/dark/y.png").unlink()
    assert len(enhance("photos", "out", both).paths[0]) == 3
    assert len(calls) == 11 + 2 + 1
    assert (pixels("out/original/x.png") == pixels("photos/x.png")).all()
    # A further checkpoint, with or without the others; a further image needs all of them.
    assert len(enhance("photos", "out", ["bright.pth", "rrdb.pt"]).paths[0]) == 4
    assert len(calls) == 14 + 2 + 3
    shutil.copy("photos/x.png", "photos/w.png")
    with pytest.raises(ValueError, match="out/dark/w.png: missing member of set w"):
        enhance("photos", "out", ["bright.pth", "rrdb.pt"])
    sets = enhance("photos", "out", [*both, "rrdb.pt"])
    assert sets.names == ["w", "x", "y", "z"] and len(calls) == 19 + 2 + 2 + 3 + 1
    assert not list((workdir / "out").rglob("*.tmp"))


def test_a_folder_takes_no_files_of_another_origin(workdir):
    enhance("photos", "out", ["bright.pth", "dark.pt"])
    with pytest.raises(ValueError, match="out: was made with no --crop; give the same"):
        enhance("photos", "out", ["bright.pth"], crop=24)
    with pytest.raises(ValueError, match="out/original: holds files of another origin"):
        enhance("photos", "out/original", ["bright.pth"])
    save_shift("dark.pt", -40)
    with pytest.raises(ValueError, match="out/dark: is of another checkpoint than dark.pt; rename"):
        enhance("photos", "out", ["bright.pth", "dark.pt"])
    shutil.rmtree("out/dark")  # the other fix
    enhance("photos", "out", ["bright.pth", "dark.pt"])
    original = pixels("out/original/x.png")
    assert (pixels("out/dark/x.png") == np.maximum(original - 40, 0)).all()
    Image.fromarray(smooth_image(np.random.default_rng(7), 40, 56)).save("photos/x.png")
    with pytest.raises(ValueError, match="photos/x.png: out/original/x.png is of another image"):
        enhance("photos", "out", ["bright.pth", "dark.pt"])
    Path("out/manual").mkdir()
    save_shift("manual.pth", 1)
    with pytest.raises(ValueError, match="out/manual: is of another checkpoint"):
        enhance("photos", "out", ["manual.pth"])


def put(name, mode="RGB", size=(40, 40)):
    return lambda: Image.new(mode, size).save(name)


def deep(name):
    return lambda: cv2.imwrite(name, np.zeros((40, 40, 3), np.uint16))


@pytest.mark.parametrize(("harm", "kw", "message"), [
    (put("photos/grey.png", "L"), {}, "photos/grey.png: mode L; convert it to 8-bit RGB"),
    (put("photos/a.webp", "RGBA"), {}, "photos/a.webp: mode RGBA"),
    (put("photos/deep.tif", "I;16"), {}, "photos/deep.tif: mode I;16"),
    (deep("photos/deep.png"), {}, "photos/deep.png: mode 16-bit RGB"),
    (deep("photos/deep.tif"), {}, "photos/deep.tif: mode 16-bit RGB"),
    (put("photos/x.tif"), {}, "photos/x.tif: would be x.png as photos/x.png; rename one"),
    (put("photos/old.gif"), {}, "photos/old.gif: no readable PNG, JPEG, WebP or TIFF; remove it"),
    (put("photos/small.png", size=(40, 20)), {"crop": 24}, "photos/small.png: is smaller than"),
    (lambda: None, {"folder": "absent"}, "absent: no such folder"),
    (lambda: Path("empty").mkdir(), {"folder": "empty"}, "empty: no images in it"),
    (lambda: None, {"out": "photos/out"}, "photos/out: lies in the folder of HR images"),
    (lambda: None, {"out": "photos/"}, "photos: lies in the folder of HR images"),
    (lambda: None, {"checkpoints": ["rrdb.pt", "b/rrdb.pth"]}, "rrdb.pt b/rrdb.pth: the same name"),
    (lambda: None, {"checkpoints": ["Original.pt"]}, "--with Original.pt: no name for a folder"),
    (lambda: None, {"checkpoints": ["gone.pt"]}, "--with gone.pt: no such file"),
    (lambda: Path("bright.pth").write_bytes(b"PK" + bytes(99)), {}, "bright.pth: not a network"),
    (lambda: save_shift("bright.pth", 1, channels=1), {}, "bright.pth: not a network from RGB"),
    (lambda: save_shift("bright.pth", np.nan), {}, "bright.pth: not a network"),
    (lambda: save_net("bright.pth", PRESETS["rrdb_tiny"]["build"]()), {}, "tiny presets"),
    (lambda: save_net("bright.pth", PRESETS["swinir_tiny"]["build"]()), {}, "tiny presets"),
])  # fmt: skip
def test_what_cannot_be_enhanced_is_said_before_any_work(workdir, harm, kw, message):
    harm()
    arguments = {"folder": "photos", "out": "out", "checkpoints": ["bright.pth"]} | kw
    with pytest.raises((ValueError, OSError)) as error:
        enhance(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("out").exists() and len(list(Path("photos").iterdir())) < 5


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"crop": null, "checkpoints": 3}'])
def test_a_damaged_record_is_named(workdir, text):
    Path("out").mkdir()
    Path("out/enhance.json").write_text(text)
    with pytest.raises(ValueError, match="out/enhance.json: is damaged; give another OUT"):
        enhance("photos", "out", ["bright.pth"])


def test_every_bad_image_is_named(workdir):
    put("photos/a.png", "L")()
    put("photos/b.png", "P")()
    with pytest.raises(ValueError, match=r"a.png: mode L.*\n.*b.png: mode P"):
        enhance("photos", "out", ["bright.pth"])


def test_enhance_without_spandrel_or_memory(workdir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "spandrel", None)
        with pytest.raises(ValueError, match="needs: pip install spandrel"):
            enhance("absent", "out", ["bright.pth"])
    real = tool.restore

    def small_ones(net, image):
        if image.shape == (37, 50, 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n9 GiB")
        return real(net, image)

    monkeypatch.setattr(tool, "restore", small_ones)
    with pytest.raises(ValueError) as error:
        enhance("photos", "out", ["bright.pth"])
    text = str(error.value)
    assert text.startswith("out/original/z.png: bright.pth failed at 50x37 pixels") and (
        "out of memory" in text and "--crop 512 and another OUT" in text and "\n" not in text)


@pytest.mark.slow
def test_the_readmes_example(workdir):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(p.read_text() for p in pages), re.S)
    (block,) = [b for b in blocks if "-m tools.enhance" in b and "train_sr.py" in b]
    make, train = block.replace("\\\n", "").splitlines()
    make = make.replace("--crop 512", "--crop 36")
    os.rename("bright.pth", "sharpen.pth")
    os.rename("rrdb.pt", "denoise.pth")
    Path("runs/swinir-stage1").mkdir(parents=True)
    save_net("runs/swinir-stage1/net_g_ema.pt", PRESETS["swinir_tiny"]["build"]())
    train += (" --net swinir_tiny --perceptual laplacian --patch-size 32 --batch-size 2 --steps 2 "
              "--num-workers 0 --lr 1e-3 --log-every 2 --iqa test_train:sharpness")

    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def run(command):
        _, *words = shlex.split(command)
        words = [str(ROOT / w) if w == "train_sr.py" else w for w in words]
        return subprocess.run([sys.executable, *words], capture_output=True, text=True,
                              timeout=120, env=env)

    made = run(make)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout == "datasets/mine: 10 sets of 3 images\n"
    trained = run(train)
    assert trained.returncode == 0, trained.stderr[-2000:]
    with open("runs/mine/log.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert sum(float(row[f"share_{k}"]) for k in range(3)) == pytest.approx(1) and (
        "share_3" not in row and row["step"] == "2")
    refused = run(make.replace("--crop 36", ""))
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1] == (
        "enhance.py: datasets/mine: was made with --crop 36; give the same, or another OUT")
    Path("datasets/mine/sharpen/x_0_0.png").unlink()
    with pytest.raises(ValueError, match="sharpen/x_0_0.png: missing member of set x_0_0"):
        load_sets("datasets/mine")  # as train_sr.py would


def test_help_of_the_command_loads_no_torch():
    code = ("import sys; sys.argv = ['x', '--help']; import runpy, atexit\n"
            "atexit.register(lambda: print({'torch', 'spandrel'} & set(sys.modules)))\n"
            "runpy.run_module('tools.enhance', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and "--crop N" in done.stdout and done.stdout.endswith("set()\n")
