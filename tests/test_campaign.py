"""A sample of tests/faults/campaign.py: flipped bits, mutated images; how kill_loop.py compares."""

import math

import pytest
import torch
from faults.campaign import flip_bits, mutate_images
from faults.kill_loop import difference, result

from models.checkpoint import save_atomic, write_csv


@pytest.mark.slow
def test_no_flipped_bit_changes_a_loaded_value(tmp_path):
    seen = flip_bits(20, 1, tmp_path)
    assert set(seen) <= {"refused", "made anew", "harmless"} and seen["refused"] >= 5, seen


def test_a_mutated_image_is_read_or_refused_in_one_line(tmp_path):
    seen = mutate_images(100, 1, tmp_path)
    assert set(seen) == {"read", "refused"}, seen


def test_the_kill_loop_finds_the_largest_difference():
    """Of two results: (last.pt, rows of log.csv)."""
    def made(weight=1.0, moment=0.5, loss=0.25, step=8, name="a"):
        optimiser = {"state": {0: {"exp_avg": torch.tensor([moment])}}}
        return ({"params": {"w": torch.tensor([2.0, weight])}, "optim_g": optimiser, "step": step,
                 "settings": {"iqa": name}}, [{"step": 2.0, "l_pix": loss}])

    assert difference(made(), made()) == 0
    for change in ({"weight": 1.125}, {"moment": 0.625}, {"loss": 0.375}):
        assert difference(made(), made(**change)) == 0.125
    assert difference(made(), made(weight=1.125, loss=0.5)) == 0.25
    for change in ({"step": 9}, {"name": "b"}, {"weight": math.nan}, {"weight": math.inf},
                   {"loss": math.nan}):
        assert difference(made(), made(**change)) == difference(made(**change), made()) == math.inf
    assert difference(torch.zeros(2), torch.zeros(3)) == math.inf
    assert difference({"a": 1}, {"b": 1}) == difference([1], [1, 2]) == math.inf
    assert difference(torch.zeros(1), torch.zeros(1).double()) == math.inf


def test_the_kill_loop_compares_rows_without_a_validation(tmp_path):
    save_atomic({"step": 4}, tmp_path / "last.pt")
    results = []
    for score in ("", "", "30.5", "30.75"):
        write_csv(tmp_path / "log.csv", ["step", "val_psnr"], [["2", ""], ["4", score]])
        results.append(result(tmp_path))
    assert difference(*results[:2]) == 0 and difference(*results[2:]) == 0.25
    assert difference(*results[1:3]) == math.inf
