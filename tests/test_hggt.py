"""models/hggt.py: the vote, the layouts, the index, its complaints, the draws, one's own sets."""

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from make_data import make_hggt, smooth_image, write_votes
from PIL import Image

from models import hggt
from models.dataset import MultiGTDataset
from models.hggt import check_data, index_sets, load_sets, png_size, read_rgb, vote
from models.rrdb import RRDBNet
from train_sr import PRESETS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def test_vote_table():
    expected = {  # every multiset of three labels, by hand
        "ppp": "positive", "pps": "positive", "ppn": "positive", "pss": "similar",
        "psn": "similar", "pnn": "negative", "sss": "similar", "ssn": "similar",
        "snn": "negative", "nnn": "negative",
    }
    names = {"p": "positive", "s": "similar", "n": "negative"}
    for letters, winner in expected.items():
        for order in itertools.permutations(letters):
            assert vote([names[c] for c in order]) == winner
    with pytest.raises(ValueError, match="'good'"):
        vote(["positive", "good", "similar"])
    with pytest.raises(ValueError, match="2 labels"):
        vote(["positive", "similar"])


@pytest.mark.parametrize("original", ["original", "Original"])
def test_train_layout_and_ranges(tmp_path, original):
    first = make_hggt(tmp_path, n=3, range_name="0-3", original=original)
    second = make_hggt(tmp_path, n=2, seed=1, range_name="3-5", original=original)
    sets = load_sets(tmp_path)
    assert sets.names == ["img00", "img01", "img02", "img00", "img01"]
    assert (sets.labels == np.concatenate([first, second])).all()
    assert (sets.sizes == 64).all() and all(len(row) == 5 for row in sets.paths)
    assert sets.paths[3][2].endswith("3-5/02/img00_02.png")
    # A range folder given by itself finds its labels as well.
    assert (load_sets(tmp_path / "Train" / "images" / "3-5").labels == second).all()


def test_other_layouts(tmp_path):
    labels = make_hggt(tmp_path / "test100", n=2, test=True)
    assert (load_sets(tmp_path / "test100").labels == labels).all()
    own = tmp_path / "own"
    shutil.copytree(tmp_path / "test100" / "images" / "original", own / "original")
    shutil.copytree(tmp_path / "test100" / "images" / "original", own / "restored")
    sets = load_sets(own)
    assert sets.labels is None and len(sets.paths[0]) == 2
    flat = load_sets(own / "original")
    assert flat.labels is None and [len(p) for p in flat.paths] == [1, 1]


def test_index_is_cached_and_noticed_when_stale(tmp_path, monkeypatch):
    make_hggt(tmp_path, n=2)
    fresh = load_sets(tmp_path)
    opened = []
    monkeypatch.setattr(hggt, "read_votes", lambda *a: opened.append(a) or ["positive"] * 4)
    cached = load_sets(tmp_path)
    assert not opened and cached.paths == fresh.paths
    assert (cached.labels == fresh.labels).all() and (cached.sizes == fresh.sizes).all()
    votes = tmp_path / "Train" / "labels" / "0-4" / "A" / "img00.json"
    votes.write_text(votes.read_text() + " ")
    assert (load_sets(tmp_path).labels[0, 1:] == 1).all() and len(opened) == 6


def damage_missing_member(images, labels):
    (images / "03" / "img01_03.png").unlink()
    return "img01_03.png: missing member"


def damage_missing_original(images, labels):
    (images / "original" / "img01.png").unlink()
    return "img01_01.png: has no original in"


def damage_size(images, labels):
    Image.new("RGB", (48, 64)).save(images / "02" / "img00_02.png")
    return "48x64, its original is 64x64"


def damage_truncated(images, labels):
    file = images / "04" / "img00_04.png"
    file.write_bytes(file.read_bytes()[:-40])
    return "truncated PNG"


def damage_not_png(images, labels):
    (images / "01" / "img00_01.png").write_bytes(b"GIF89a" + bytes(60))
    return "not a PNG"


def damage_grey(images, labels):
    Image.new("L", (64, 64)).save(images / "original" / "img00.png")
    return "8-bit grey PNG; convert"


def damage_json(images, labels):
    (labels / "B" / "img01.json").write_text('{"Picture_1": ')
    return "malformed label JSON"


def damage_label(images, labels):
    write_votes(labels / "C", "img00", ["Positive", "Similar", "Good", "Similar"])
    return "unknown label 'Good'"


def damage_annotator(images, labels):
    shutil.rmtree(labels / "B")
    return "annotator B is missing"


def damage_folder(images, labels):
    shutil.rmtree(images / "02")
    return "folder of enhanced GTs is missing"


@pytest.mark.parametrize(
    "damage",
    [damage_missing_member, damage_missing_original, damage_size, damage_truncated,
     damage_not_png, damage_grey, damage_json, damage_label, damage_annotator, damage_folder],
)
def test_bad_data_is_named(tmp_path, damage):
    make_hggt(tmp_path, n=2)
    message = damage(tmp_path / "Train/images/0-4", tmp_path / "Train/labels/0-4")
    with pytest.raises(ValueError) as error:
        load_sets(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / hggt.INDEX_FILE).exists()  # damage is never cached


def test_check_data_names_everything(tmp_path, capsys):
    make_hggt(tmp_path, n=6)
    images, labels = tmp_path / "Train/images/0-4", tmp_path / "Train/labels/0-4"
    damage_missing_member(images, labels)
    damage_grey(images, labels)
    damage_label(images, labels)
    broken = images / "01" / "img05_01.png"  # sound header and trailer, damaged pixels
    data = bytearray(broken.read_bytes())
    data[60:90] = bytes(30)
    broken.write_bytes(bytes(data))
    problems = check_data(tmp_path)
    text = capsys.readouterr().out
    assert len(problems) >= 4 and all(p in text for p in problems)
    for expected in ("img01_03.png", "grey", "'Good'", "img05_01.png", "64x64: 4 sets",
                     "positive: ", "4 sets of 5 images"):
        assert expected in text


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; expected Train/images"):
        load_sets(tmp_path / "absent")
    with pytest.raises(ValueError, match="no images found"):
        load_sets(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "01").mkdir()
    with pytest.raises(ValueError, match="original: no PNG images"):
        load_sets(tmp_path)


def test_png_size_is_pillow_size(tmp_path):
    Image.new("RGB", (37, 21)).save(tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (21, 37)


def stub_degrade(read, top, left, patch_size, rng):
    """Every fourth pixel plus one random number, so that the rng's state is visible."""
    image = read(top + patch_size + 8)
    patch = image[top : top + patch_size : 4, left : left + patch_size : 4].copy()
    patch[0, 0] = rng.integers(256)
    return patch


def make_draws(root, weights, **kw):
    sets, settings = load_sets(root), {"patch_size": 32, "seed": 3, "read": hggt.read_rgb}
    return MultiGTDataset(sets.paths, sets.sizes, weights, degrade=stub_degrade, **settings | kw)


def test_draw_is_a_function_of_seed_and_draw(tmp_path):
    make_hggt(tmp_path, n=4)
    weights = np.full((4, 5), 0.2)
    one, two = make_draws(tmp_path, weights), make_draws(tmp_path, weights)
    order = [7, 0, 3, 12, 5]
    first = {d: one[d] for d in order}
    for d in reversed(order):  # another object, another order
        again = two[d]
        assert again["choice"] == first[d]["choice"] and again["draw"] == d
        assert (again["lq"] == first[d]["lq"]).all() and (again["gts"] == first[d]["gts"]).all()
    other = make_draws(tmp_path, weights, seed=4)
    assert any((other[d]["lq"] != first[d]["lq"]).any() for d in order)


def test_every_sampler_sees_the_same_patches(tmp_path):
    make_hggt(tmp_path, n=3)
    rand = make_draws(tmp_path, np.full((3, 5), 0.2))
    amo = make_draws(tmp_path, None)
    for draw in range(12):
        a, b = rand[draw], amo[draw]
        assert a["gts"].shape == (1, 3, 32, 32) and b["gts"].shape == (5, 3, 32, 32)
        assert b["choice"] == -1 and (a["lq"] == b["lq"]).all()
        assert (a["gts"][0] == b["gts"][a["choice"]]).all()
        # LQ and GT are the same place and flip: the stub LQ is the original, every fourth pixel,
        # counted from the left edge of the unflipped patch.
        original = b["gts"][0]
        strided = original[:, ::4, ::4], original[:, ::4, 3::4]
        assert any((b["lq"][:, 1:, 1:-1] == s[:, 1:, 1:-1]).all() for s in strided)


def test_choice_frequencies_follow_the_weights(tmp_path):
    make_hggt(tmp_path, n=2)
    weights = np.array([[0.5, 0.0, 0.3, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0]])
    draws = make_draws(tmp_path, weights)
    assert list(draws.eligible) == [0]  # a row of zeros is dropped
    draws._read = lambda index, member, rows=None: np.zeros((64, 64, 3), np.uint8)
    counts = np.bincount([draws[d]["choice"] for d in range(4000)], minlength=5) / 4000
    assert (counts[[1, 3]] == 0).all()
    assert np.abs(counts - weights[0]).max() < 5 * np.sqrt(0.25 / 4000)


def test_epochs_cover_every_set_once(tmp_path):
    make_hggt(tmp_path, n=4)
    draws = make_draws(tmp_path, None)
    orders = [[draws.set_of(d) for d in range(4 * e, 4 * e + 4)] for e in range(6)]
    assert all(sorted(o) == [0, 1, 2, 3] for o in orders) and len({tuple(o) for o in orders}) > 1


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    make_hggt(tmp_path, n=1)
    decoded = []
    real = hggt.read_rgb
    monkeypatch.setattr(hggt, "read_rgb", lambda p, rows: decoded.append(rows) or real(p, rows))
    make_draws(tmp_path, np.eye(1, 5))[0]
    assert len(decoded) == 1 and 32 + 8 <= decoded[0] <= 64 + 8
    make_draws(tmp_path, np.eye(5)[[3]])[0]
    assert decoded[1:] == [decoded[0], decoded[0] - 8]
    make_draws(tmp_path, None)[0]
    assert len(decoded) == 1 + 2 + 5


def test_first_rows_of_a_png(tmp_path):
    image = smooth_image(np.random.default_rng(0), 48, 40)
    Image.fromarray(image).save(tmp_path / "a.png")
    for rows in (1, 17, 47, 48, 300):
        assert np.array_equal(read_rgb(tmp_path / "a.png", rows), image[:rows])
    # Interlaced, which Pillow does not write: seven passes (PNG specification, Adam7)
    data = (tmp_path / "a.png").read_bytes()
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2))
    rows = [b"\0" + row.tobytes() for x, y, dx, dy in passes for row in image[y::dy, x::dx]]
    parts = [data[12:28] + b"\1", b"IDAT" + zlib.compress(b"".join(rows)), b"IEND"]
    (tmp_path / "a.png").write_bytes(data[:8] + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts))
    assert np.array_equal(read_rgb(tmp_path / "a.png"), image)
    assert np.array_equal(read_rgb(tmp_path / "a.png", 17)[:17], image[:17])


def test_patch_must_fit(tmp_path):
    make_hggt(tmp_path, n=2)
    with pytest.raises(ValueError, match="64x64 is smaller than --patch-size 128"):
        make_draws(tmp_path, None, patch_size=128)
    with pytest.raises(ValueError, match="multiple of 4"):
        make_draws(tmp_path, None, patch_size=30)


def test_mixed_ranges_refused(tmp_path):
    make_hggt(tmp_path, n=1, range_name="a")
    rng = np.random.default_rng(0)
    for folder in ("original", "01"):
        path = tmp_path / "Train/images/b" / folder
        path.mkdir(parents=True)
        Image.fromarray(smooth_image(rng, 64, 64)).save(path / "x.png")
    _, problems = index_sets(tmp_path)
    assert any("annotator" in p or "missing" in p for p in problems)


def test_votes_by_member_name_not_by_position(tmp_path):
    pictures = {
        "Picture_5": {"Name": "x.png", "File": "original", "Label": None},
        "Picture_1": {"Name": "x_02.png", "File": "02", "Label": "negative"},
        "Picture_2": {"Name": "x_01.png", "File": "01", "Label": "Positive"},
    }
    (tmp_path / "x.json").write_text(json.dumps(pictures))
    assert hggt.read_votes(tmp_path / "x.json", ["01", "02"]) == ["positive", "negative"]
    with pytest.raises(ValueError, match="no label for member 03"):
        hggt.read_votes(tmp_path / "x.json", ["01", "03"])


# ------------------------------------------------------------------------ one's own sets


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
def mine(tmp_path, monkeypatch):
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


def test_enhanced_sets_by_hand(mine):
    sets = hggt.enhance("photos", "out", ["bright.pth", "rrdb.pt"])
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


def test_crops_cover_the_image_evenly(mine):
    hggt.enhance("photos", "out", ["bright.pth"], crop=24)
    tops_lefts = {"x": ([0, 16], [0, 16, 32]), "y": ([0, 12], [0, 24]), "z": ([0, 13], [0, 13, 26])}
    expected = {f"{n}_{t}_{left}" for n, (a, b) in tops_lefts.items() for t in a for left in b}
    assert {p.stem for p in (mine / "out/original").iterdir()} == expected
    whole = pixels("photos/x.png")
    for t, left in itertools.product(*tops_lefts["x"]):
        patch = whole[t : t + 24, left : left + 24]
        assert (pixels(f"out/original/x_{t}_{left}.png") == patch).all()
        assert (pixels(f"out/bright/x_{t}_{left}.png") == np.minimum(patch + 20, 255)).all()


def test_enhance_goes_on_and_gaps_are_noticed(mine, monkeypatch):
    real, calls = hggt._enhanced, []

    def interrupted(net, image):
        calls.append(image.shape)
        if len(calls) == 5:  # two tries of the networks, two images
            raise KeyboardInterrupt
        return real(net, image)

    both = ["bright.pth", "dark.pt"]
    monkeypatch.setattr(hggt, "_enhanced", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hggt.enhance("photos", "out", both)
    with pytest.raises(ValueError, match=r"out/dark/x.png: missing member .*and 3 more"):
        load_sets("out")
    before = {p: p.stat().st_mtime_ns for p in (mine / "out").rglob("*/*.png")}
    assert len(before) == 5
    assert len(hggt.enhance("photos", "out", both).names) == 3
    assert len(calls) == 5 + 2 + 4  # the tries, and what was missing
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())

    (mine / "out/original/x.png").unlink()
    (mine / "out/dark/y.png").unlink()
    assert len(hggt.enhance("photos", "out", both).paths[0]) == 3
    assert len(calls) == 11 + 2 + 1
    assert (pixels("out/original/x.png") == pixels("photos/x.png")).all()
    # A further checkpoint, with or without the others; a further image needs all of them.
    assert len(hggt.enhance("photos", "out", ["bright.pth", "rrdb.pt"]).paths[0]) == 4
    assert len(calls) == 14 + 2 + 3
    shutil.copy("photos/x.png", "photos/w.png")
    with pytest.raises(ValueError, match="out/dark/w.png: missing member of set w"):
        hggt.enhance("photos", "out", ["bright.pth", "rrdb.pt"])
    sets = hggt.enhance("photos", "out", [*both, "rrdb.pt"])
    assert sets.names == ["w", "x", "y", "z"] and len(calls) == 19 + 2 + 2 + 3 + 1
    assert not list((mine / "out").rglob("*.tmp"))


def test_a_folder_takes_no_files_of_another_origin(mine):
    hggt.enhance("photos", "out", ["bright.pth", "dark.pt"])
    with pytest.raises(ValueError, match="out: was made with no --crop; give the same"):
        hggt.enhance("photos", "out", ["bright.pth"], crop=24)
    with pytest.raises(ValueError, match="out/original: holds files of another origin"):
        hggt.enhance("photos", "out/original", ["bright.pth"])
    save_shift("dark.pt", -40)
    with pytest.raises(ValueError, match="out/dark: is of another checkpoint than dark.pt; rename"):
        hggt.enhance("photos", "out", ["bright.pth", "dark.pt"])
    shutil.rmtree("out/dark")  # the other fix
    hggt.enhance("photos", "out", ["bright.pth", "dark.pt"])
    original = pixels("out/original/x.png")
    assert (pixels("out/dark/x.png") == np.maximum(original - 40, 0)).all()
    Image.fromarray(smooth_image(np.random.default_rng(7), 40, 56)).save("photos/x.png")
    with pytest.raises(ValueError, match="photos/x.png: out/original/x.png is of another image"):
        hggt.enhance("photos", "out", ["bright.pth", "dark.pt"])
    Path("out/manual").mkdir()
    save_shift("manual.pth", 1)
    with pytest.raises(ValueError, match="out/manual: is of another checkpoint"):
        hggt.enhance("photos", "out", ["manual.pth"])


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
    (lambda: save_net("bright.pth", PRESETS["rrdb_tiny"]["build"]()), {}, "evaluate.py --export"),
    (lambda: save_net("bright.pth", PRESETS["swinir_tiny"]["build"]()), {}, "evaluate.py --export"),
])  # fmt: skip
def test_what_cannot_be_enhanced_is_said_before_any_work(mine, harm, kw, message):
    harm()
    arguments = {"folder": "photos", "out": "out", "checkpoints": ["bright.pth"]} | kw
    with pytest.raises((ValueError, OSError)) as error:
        hggt.enhance(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("out").exists() and len(list(Path("photos").iterdir())) < 5


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"crop": null, "checkpoints": 3}'])
def test_a_damaged_record_is_named(mine, text):
    Path("out").mkdir()
    Path("out/enhance.json").write_text(text)
    with pytest.raises(ValueError, match="out/enhance.json: is damaged; give another OUT"):
        hggt.enhance("photos", "out", ["bright.pth"])


def test_every_bad_image_is_named(mine):
    put("photos/a.png", "L")()
    put("photos/b.png", "P")()
    with pytest.raises(ValueError, match=r"a.png: mode L.*\n.*b.png: mode P"):
        hggt.enhance("photos", "out", ["bright.pth"])


def test_enhance_without_spandrel_or_memory(mine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "spandrel", None)
        with pytest.raises(ValueError, match="needs: pip install spandrel"):
            hggt.enhance("absent", "out", ["bright.pth"])
    real = hggt._enhanced

    def small_ones(net, image):
        if image.shape == (37, 50, 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n9 GiB")
        return real(net, image)

    monkeypatch.setattr(hggt, "_enhanced", small_ones)
    with pytest.raises(ValueError) as error:
        hggt.enhance("photos", "out", ["bright.pth"])
    text = str(error.value)
    assert text.startswith("out/original/z.png: bright.pth failed at 50x37 pixels") and (
        "out of memory" in text and "--crop 512 and another OUT" in text and "\n" not in text)


def test_a_folder_of_enhanced_images_follows_one_way_of_naming(tmp_path):
    """x_a.png in folder "a" is x's in HGGT's way, x_a's in the plain one."""
    for folder, names in {"original": "x x_a", "a": "x x_a", "b": "x_b x_a_b"}.items():
        (tmp_path / folder).mkdir()
        for name in names.split():
            Image.new("RGB", (32, 32)).save(tmp_path / folder / f"{name}.png")
    rows = [[os.path.relpath(p, tmp_path) for p in row] for row in load_sets(tmp_path).paths]
    assert rows == [["original/x.png", "a/x.png", "b/x_b.png"],
                    ["original/x_a.png", "a/x_a.png", "b/x_a_b.png"]]
    (tmp_path / "a/x.png").unlink()
    assert index_sets(tmp_path)[1] == [f"{tmp_path / 'a/x.png'}: missing member of set x"]


def test_readme_example_of_ones_own_ground_truths(mine):
    text = (ROOT / "README.md").read_text().split("## Bring your own")[1]
    text = re.search(r"```bash\n(python models/hggt.*?)```", text, re.S)[1]
    enhance, train = text.replace("\\\n", "").splitlines()
    enhance = enhance.replace("--crop 512", "--crop 36")
    os.rename("bright.pth", "sharpen.pth")
    os.rename("rrdb.pt", "denoise.pth")
    Path("runs/swinir-stage1").mkdir(parents=True)
    save_net("runs/swinir-stage1/net_g_ema.pt", PRESETS["swinir_tiny"]["build"]())
    train += (" --net swinir_tiny --perceptual laplacian --patch-size 32 --batch-size 2 --steps 2 "
              "--num-workers 0 --lr 1e-3 --log-every 2 --iqa test_train:sharpness")

    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def run(command):
        command = shlex.split(command)
        command[:2] = sys.executable, str(ROOT / command[1])
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)

    made = run(enhance)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout == "datasets/mine: 10 sets of 3 images\n"
    trained = run(train)
    assert trained.returncode == 0, trained.stderr[-2000:]
    with open("runs/mine/log.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert sum(float(row[f"share_{k}"]) for k in range(3)) == pytest.approx(1) and (
        "share_3" not in row and row["step"] == "2")
    refused = run(enhance.replace("--crop 36", ""))
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1] == (
        "models/hggt.py: datasets/mine: was made with --crop 36; give the same, or another OUT")
    Path("datasets/mine/sharpen/x_0_0.png").unlink()
    with pytest.raises(ValueError, match="sharpen/x_0_0.png: missing member of set x_0_0"):
        load_sets("datasets/mine")  # as train_sr.py would


def test_help_of_the_command_loads_no_torch():
    code = ("import sys; sys.argv = ['x', 'enhance', '--help']; import runpy, atexit\n"
            "atexit.register(lambda: print({'torch', 'spandrel'} & set(sys.modules)))\n"
            "runpy.run_module('models.hggt', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and "--crop N" in done.stdout and done.stdout.endswith("set()\n")
