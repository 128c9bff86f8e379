"""Damaged files: no flipped bit changes a value that is loaded."""

import random

import pytest
import torch
from test_finite import folder, train  # noqa: F401

import finetune_lora
import train_sr
from models.checkpoint import load_file, save_atomic
from models.run import load_last

FLIPS = 100


def equal(a, b):
    """Whether two loaded files hold the same values, bit by bit."""
    if isinstance(a, torch.Tensor):
        return (isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
                and a.numpy().tobytes() == b.numpy().tobytes())
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def files(folder):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        train(train_sr, folder, patch, "--out", "flips")
        train(finetune_lora, folder, patch, "--init", "flips/net_g_ema.pt", "--out", "flips-ft")
    return folder / "flips/last.pt", folder / "flips/net_g_ema.pt", folder / "flips-ft/lora.pt"


@pytest.mark.parametrize("number", range(3), ids=["last.pt", "net_g_ema.pt", "lora.pt"])
def test_no_flipped_bit_changes_a_loaded_value(files, number, tmp_path):
    intact, rng, refused = load_file(files[number]), random.Random(number), 0
    data, path = files[number].read_bytes(), tmp_path / files[number].name
    for _ in range(FLIPS):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        try:
            loaded = load_file(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
        else:  # a header's time or padding
            assert equal(loaded, intact), (at, bit)
    assert refused > FLIPS / 2


def test_a_damaged_record_is_named_and_so_is_the_checkpoint_before(files, tmp_path):
    data = bytearray(files[0].read_bytes())
    weight = load_file(files[0])["params"]["conv_last.bias"].numpy().tobytes()
    data[data.index(weight)] ^= 1
    last = tmp_path / "last.pt"
    last.write_bytes(data)
    with pytest.raises(ValueError, match=r"last.pt: damaged \(archive/data/\d+ does not match its"):
        load_last(tmp_path, {})
    (tmp_path / "previous.pt").write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match=f"checksum.; for the one before: mv .*previous.pt {last}"):
        load_last(tmp_path, {})


def test_a_tensor_marked_as_a_folder_is_refused(tmp_path):
    """One bit outside all checksums; torch would give what its memory held before."""
    path = tmp_path / "a.pt"
    save_atomic({"a": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"archive/data/0") - 8] ^= 16  # external attributes, in the zip's directory
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.pt: damaged \(archive/data/0 "):
        load_file(path)


def test_a_public_file_without_checksums_loads(tmp_path):
    try:
        torch.serialization.set_crc32_options(False)
        save_atomic({"a": torch.arange(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"a": torch.arange(3)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in "ab":
        assert load_file(tmp_path / f"{name}.pt")["a"].tolist() == [0, 1, 2]
