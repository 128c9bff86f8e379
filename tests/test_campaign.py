"""A sample of tests/faults/campaign.py: flipped bits, mutated images."""

from faults.campaign import flip_bits, mutate_images


def test_no_flipped_bit_changes_a_loaded_value(tmp_path):
    seen = flip_bits(20, 1, tmp_path)
    assert set(seen) <= {"refused", "made anew", "harmless"} and seen["refused"] >= 5, seen


def test_a_mutated_image_is_read_or_refused_in_one_line(tmp_path):
    seen = mutate_images(100, 1, tmp_path)
    assert set(seen) == {"read", "refused"}, seen
