"""models/hggt.py: the vote, the layouts, the index and its complaints; models/dataset.py."""

import itertools
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from make_data import make_hggt, smooth_image, write_votes
from PIL import Image

from models import hggt
from models.hggt import check_data, index_sets, load_sets, vote
from models.images import png_size, read_rgb


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


def test_index_is_cached_and_noticed_when_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(hggt, "is_settled", lambda *a: True)
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


def test_an_interlaced_png_is_read(tmp_path):
    image = smooth_image(np.random.default_rng(0), 48, 40)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(read_rgb(tmp_path / "a.png"), image)
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


def test_mixed_ranges_refused(tmp_path):
    make_hggt(tmp_path, n=1, range_name="a")
    rng = np.random.default_rng(0)
    for folder in ("original", "01"):
        path = tmp_path / "Train/images/b" / folder
        path.mkdir(parents=True)
        Image.fromarray(smooth_image(rng, 64, 64)).save(path / "x.png")
    _, problems = index_sets(tmp_path)
    assert any("annotator" in p or "missing" in p for p in problems)


def test_ranges_that_differ_are_named(tmp_path):
    make_hggt(tmp_path, n=2, range_name="a")
    make_hggt(tmp_path, n=2, range_name="b")
    shutil.rmtree(tmp_path / "Train/images/b/02")
    sets, problems = index_sets(tmp_path)
    assert sets.names == ["img00", "img01"] * 2 and sets.labels is None
    assert problems == [f"{tmp_path}/Train/images/b/02: folder of enhanced GTs is missing",
                        f"{tmp_path}: range folders differ in their number of GTs ([4, 5])"]
    shutil.rmtree(tmp_path / "Train/labels")
    for folder in ("a", "b"):
        shutil.rmtree(tmp_path / f"Train/images/{folder}/01")
    assert index_sets(tmp_path)[1] == [
        f"{tmp_path}: range folders differ in their number of GTs ([3, 4])"]


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


@pytest.mark.parametrize("odd", [
    "[1]", "null", "7", "{}", '{"listing": null}', "[" * 5000, '{"names": 1}', "", "\xe9",
])
def test_an_odd_index_is_made_anew(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(hggt, "is_settled", lambda *a: True)
    labels = make_hggt(tmp_path, n=2)
    load_sets(tmp_path)
    index = tmp_path / hggt.INDEX_FILE
    intact = index.read_bytes()
    for text in (odd, f"{hggt._checksum(odd.replace(chr(233), ''))}\n{odd}"):
        index.write_text(text, encoding="latin-1")
        assert (load_sets(tmp_path).labels == labels).all()
        assert index.read_bytes() == intact
    # Labels that no vote gives, with or without their checksum
    text = intact.decode().partition("\n")[2].replace('"labels": [[0, 1', '"labels": [[0, 7')
    assert "[0, 7" in text
    index.write_text(f"{intact.decode()[:8]}\n{text}")
    assert (load_sets(tmp_path).labels == labels).all()


def test_labels_of_other_systems_are_read(tmp_path):
    """A mark at the start, UTF-16, Windows line ends."""
    labels = make_hggt(tmp_path, n=3)
    for i, encoding in enumerate(("utf-8-sig", "utf-16", "utf-8")):
        path = tmp_path / f"Train/labels/0-4/B/img0{i}.json"
        path.write_bytes(path.read_text().replace(",", ",\r\n").encode(encoding))
    assert (load_sets(tmp_path).labels == labels).all()
