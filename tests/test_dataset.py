"""models/dataset.py: samples as a function of (seed, draw), the choice, what is decoded."""

import os

import numpy as np
import pytest
from make_data import make_hggt

from models import hggt
from models.dataset import MultiGTDataset
from models.hggt import load_sets
from models.images import read_rgb


def stub_degrade(image, top, left, patch_size, rng):
    """Every fourth pixel plus one random number, so that the rng's state is visible."""
    patch = image[top : top + patch_size : 4, left : left + patch_size : 4].copy()
    patch[0, 0] = rng.integers(256)
    return patch


def make_draws(root, weights, **kw):
    settings = {"patch_size": 32, "seed": 3, "degrade": stub_degrade}
    return MultiGTDataset(load_sets(root), weights, **settings | kw)


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
        # LQ and GT are the same place of the same mirrored image: the stub LQ is every fourth pixel
        assert (b["lq"][:, 1:, 1:] == b["gts"][0][:, 4::4, 4::4]).all()


def test_choice_frequencies_follow_the_weights(tmp_path):
    make_hggt(tmp_path, n=2)
    weights = np.array([[0.5, 0.0, 0.3, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0]])
    draws = make_draws(tmp_path, weights)
    assert list(draws.eligible) == [0]  # a row of zeros is dropped
    draws.image = lambda index, member: np.zeros((64, 64, 3), np.uint8)
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

    def read(path):
        decoded.append(os.path.basename(path))
        return read_rgb(path)

    monkeypatch.setattr(hggt, "read_rgb", read)
    make_draws(tmp_path, np.eye(1, 5))[0]
    assert decoded == ["img00.png"]
    make_draws(tmp_path, np.eye(5)[[3]])[0]
    assert decoded[1:] == ["img00.png", "img00_03.png"]
    make_draws(tmp_path, None)[0]
    assert decoded[3:] == ["img00.png"] + [f"img00_0{k}.png" for k in range(1, 5)]


def test_patch_must_fit(tmp_path):
    make_hggt(tmp_path, n=2)
    with pytest.raises(ValueError, match="64x64 is smaller than --patch-size 128"):
        make_draws(tmp_path, None, patch_size=128)
    with pytest.raises(ValueError, match="multiple of 4"):
        make_draws(tmp_path, None, patch_size=30)
