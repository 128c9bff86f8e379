"""Damaged files: no flipped bit changes a value that is loaded."""

import random
import time
import zipfile

import numpy as np
import pytest
import torch
from test_finite import folder, train  # noqa: F401

import finetune_lora
import train_sr
from models import checkpoint
from models.checkpoint import (
    load_file,
    printable,
    read_csv,
    read_state,
    read_text,
    replacing,
    save_atomic,
    write_csv,
)
from models.rrdb import RRDBNet
from models.run import load_last
from models.weights import load_like, load_net

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


# ------------------------------------------------------------------------- checkpoints in the wild


def small_net():
    torch.manual_seed(0)
    return RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)


STATE = small_net().state_dict()


@pytest.mark.parametrize("content", [
    {"params": STATE, "psnr": np.float64(27.1), "step": np.int64(3), "lr": np.float32(1e-4)},
    {"state_dict": {f"net_g.{k}": v for k, v in STATE.items()} | {"net_d.weight": torch.ones(2)}},
    {"state_dict": {f"net_g.{k}": v + 1 for k, v in STATE.items()}
     | {f"net_g_ema.{k}": v for k, v in STATE.items()}},
    {f"_orig_mod.module.{k}": v for k, v in STATE.items()},
    {"state_dict": {f"model._orig_mod.{k}": v for k, v in STATE.items()}, "epoch": 3},
    {"model": {"params": STATE | {"epoch": 3}}},
    {f"net_g.{k}": v + 1 for k, v in STATE.items()}
    | {f"ema_model.module.{k}": v for k, v in STATE.items()},
], ids=["numpy numbers", "Lightning", "Lightning EMA", "compiled, DataParallel",
        "compiled, Lightning", "two wrappings", "AveragedModel"])  # fmt: skip
def test_what_trainers_write_loads(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    for net in (load_net(tmp_path / "a.pth"),
                load_like(small_net(), tmp_path / "a.pth", "--net tiny")):
        assert all(torch.equal(v, STATE[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("content", "reason"), [
    ({"epoch": 1, "iter": 3, "optimizers": [{}], "schedulers": []}, "state without weights; give"),
    ({k: v.long() for k, v in STATE.items()}, "conv_first.weight is a strided int64 tensor; save"),
    ({k: v.to(torch.complex64) for k, v in STATE.items()}, "is a strided complex64 tensor"),
    ({k: v.to("meta") for k, v in STATE.items()}, "conv_first.weight is a meta float32 tensor"),
    ({k: v.to_sparse() for k, v in STATE.items()}, "is a sparse_coo float32 tensor"),
    ({"params": {k: v.numpy() for k, v in STATE.items()}}, "holds more than tensors and numbers"),
    ({"params": {0: torch.ones(3)}}, "neither a SwinIR nor an RRDBNet"),
    ({"params": {"net": STATE}}, "no weights found"),
    ({f"{n}.{k}": v for n in ("teacher", "student") for k, v in STATE.items()},
     "holds several networks, teacher., student.; save one alone"),
    ([STATE], "holds a list"),
])
def test_what_cannot_be_loaded_safely_is_one_line_with_the_fix(content, reason, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: .*{reason}") as error:
        load_net(tmp_path / "a.pth")
    assert "\n" not in str(error.value) and str(error.value).isprintable()


def test_a_zip_with_a_weight_file_inside_is_named_as_such(tmp_path):
    torch.save({"params": STATE}, tmp_path / "a.pth")
    for name in ("a.pth", "nets/a.pth"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(tmp_path / "a.pth", name)
        with pytest.raises(ValueError) as error:
            load_net(tmp_path / "a.zip")
        assert str(error.value) == (
            f"{tmp_path}/a.zip: not a readable weight file (a zip archive without PyTorch weights; "
            "unpack it and give the file inside)")


def test_the_state_of_a_fine_tuning_is_no_network(files):
    last = files[2].with_name("last.pt")
    for load in (load_net, lambda path: load_like(small_net(), path, "--net tiny")):
        with pytest.raises(ValueError, match="last.pt: the state of a fine-tuning; its network is "
                                             "net_g_ema.pt beside it"):
            load(last)
    load_net(files[2].with_name("net_g_ema.pt"))


def test_no_object_is_unpickled_with_numpys_numbers(tmp_path):
    torch.save({"params": STATE, "x": np.array([random.Random(1)], object)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_state(tmp_path / "a.pth")


# ------------------------------------------------------------------------- text files


def test_text_of_other_systems_is_read(tmp_path):
    path, text = tmp_path / "a.csv", "# note\r\na,b\r\n1,é\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
        path.write_bytes(mark + text.encode(encoding))
        assert read_csv(path) == ([{"a": "1", "b": "é"}], ["note"]), encoding
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="a.csv: not a text file in UTF-8"):
        read_text(path)


def test_comments_stand_above_the_header_alone_and_no_name_is_cut(tmp_path):
    """A row of a model #C vanished; a line separator in a name ended its row."""
    names = ["#C", "a\u2028b", "new\nline", 'quo"te', "caf\udce9", "=1+1"]
    write_csv(tmp_path / "a.csv", ["model", "x"], [[name, 1] for name in names],
              ["a note\nin two lines", "#"])
    rows, comments = read_csv(tmp_path / "a.csv")
    assert [row["model"] for row in rows] == names
    assert comments == ["a note in two lines", "#"]
    assert b"caf\xe9" in (tmp_path / "a.csv").read_bytes()


def test_temporary_files_have_short_names_and_abandoned_ones_go(tmp_path, monkeypatch):
    longest = tmp_path / ("x" * 251 + ".csv")  # 255 bytes
    write_csv(longest, ["a"], [["1"]])
    with replacing(longest) as temporary:
        temporary.touch()
        abandoned = temporary.with_name(temporary.name.replace(".tmp", "1.tmp"))
    abandoned.touch()
    write_csv(longest, ["a"], [["2"]])
    assert abandoned.exists()  # perhaps of another process
    now = time.time()
    monkeypatch.setattr(checkpoint.time, "time", lambda: now + 3700)
    write_csv(longest, ["a"], [["3"]])
    assert [p.name for p in tmp_path.iterdir()] == [longest.name]


def test_control_characters_reach_no_terminal():
    assert printable("a\x1b[31mb\u009bc\udce9\nd é") == "a\\x1b[31mb\\x9bc\\udce9\nd é"
