"""evaluate.py --export and --lora: files that other programs read with the same output."""

import copy
import hashlib

import numpy as np
import pytest
import spandrel
import torch
from PIL import Image

import evaluate
from demo.report import curve_figure
from models import export
from models.checkpoint import file_digest, load_file, read_state, save_atomic, write_csv
from models.lora import add_lora, lora_state, merge_lora
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from train_sr import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
TARGETS = {"swinir": ("*.mlp.fc1", "*.mlp.fc2"), "rrdb": ("body.*.rdb?.conv?",)}
NETS = {
    "swinir_demo": PRESETS["swinir_tiny"]["build"],
    "rrdb_demo": PRESETS["rrdb_tiny"]["build"],
    "swinir_pixelshuffle": lambda: SwinIR(embed_dim=12, depths=(2,), num_heads=(2,), num_feat=8),
    "swinir_paper": PRESETS["swinir"]["build"],
    "rrdb_paper": PRESETS["rrdb"]["build"],
}


def randomise(net):
    """Biases, norms and position tables away from their initial zeros and ones, too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            spread = 0.1 if p.ndim == 1 else 0.5 * p[0].numel() ** -0.5
            p.add_(spread * torch.randn(p.shape))
    return net.eval().requires_grad_(False)


def saved(net, path):
    save_atomic({"params_ema": net.state_dict()}, path)
    return str(path)


def run(*args):
    return evaluate.use_checkpoint(evaluate.parse_args(["--ckpt", *map(str, args)]))


def assert_same(net, other, h=17, w=24):
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = net(x), other(x)
    assert a.std() > 0.02
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, suffix", [
    ("swinir_demo", ".pth"), ("swinir_demo", ".safetensors"), ("rrdb_demo", ".pt"),
    ("rrdb_demo", ".safetensors"), ("swinir_pixelshuffle", ".pth"), ("swinir_paper", ".pth"),
    ("rrdb_paper", ".safetensors"),
])  # fmt: skip
def test_spandrel_loads_exports_with_equal_output(name, suffix, tmp_path):
    net = randomise(NETS[name]())
    out = tmp_path / f"out{suffix}"
    run(saved(net, tmp_path / "net.pt"), "--export", out)
    found = spandrel.ModelLoader(device="cpu").load_from_file(out)
    assert found.scale == 4 and found.input_channels == found.output_channels == 3
    small = dict(h=8, w=9) if name.endswith("paper") else {}
    assert_same(net, found.model.eval(), **small)
    if name.endswith("paper"):
        state, after = net.state_dict(), read_state(out)
        assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)
    else:
        assert_same(net, evaluate.load_net(str(out)))  # we read it, too
    plain = tmp_path / "plain"
    plain.touch()
    assert out.stat().st_mode == plain.stat().st_mode  # others may read it where they may others
    if suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(out, "pt") as file:
            assert file.metadata() == {"format": "pt", "architecture": type(net).__name__,
                                       "scale": "4"}
    else:
        assert set(load_file(out)) == {"params_ema"}


def test_padding_keeps_types_and_refuses_what_is_too_wide():
    half = export.padded_state(NETS["rrdb_demo"]().half().state_dict())
    assert {v.dtype for v in half.values()} == {torch.float16}
    assert half["body.0.rdb1.conv3.weight"].shape == (32, 16 + 64, 3, 3)
    with pytest.raises(ValueError, match="40 channels where spandrel reads 32"):
        export.padded_state(RRDBNet(num_feat=8, num_block=1, num_grow_ch=40).state_dict())


# ------------------------------------------------------------------------- LoRA


@pytest.fixture(params=["swinir_demo", "rrdb_demo"])
def tuned(request, tmp_path):
    """A base network's file, its adapters' file and the fine-tuned network's."""
    kind = request.param.partition("_")[0]
    base = randomise(NETS[request.param]())
    path = saved(base, tmp_path / "base.pt")
    net = copy.deepcopy(base)
    add_lora(net, TARGETS[kind], rank=3, alpha=6.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_b" in name:
                p.add_(0.05 * torch.randn(p.shape))
    save_atomic({"lora": lora_state(net), "rank": 3, "alpha": 6.0, "targets": list(TARGETS[kind]),
                 "base_sha256": hashlib.sha256((tmp_path / "base.pt").read_bytes()).hexdigest()},
                tmp_path / "lora.pt")
    saved(merge_lora(net), tmp_path / "net_g_ema.pt")
    return base, path, str(tmp_path / "lora.pt"), net, tmp_path


def test_lora_scale_goes_from_the_base_to_the_tuned_network(tuned):
    base, path, lora, net, tmp_path = tuned
    states = {}
    for scale in (0, 0.5, 1):
        out = tmp_path / f"{scale}.pth"
        run(path, "--lora", lora, "--lora-scale", scale, "--export", out)
        states[scale] = read_state(out)
        found = spandrel.ModelLoader(device="cpu").load_from_file(out).model.eval()
        if scale != 0.5:
            assert_same(net if scale else base, found)
    moved = [k for k in states[0] if not torch.equal(states[0][k], states[1][k])]
    assert moved
    for key in states[0]:
        middle = (states[0][key].double() + states[1][key].double()) / 2
        torch.testing.assert_close(states[0.5][key].double(), middle, rtol=0, atol=1e-6)


def test_another_base_is_refused_by_name(tuned):
    _, path, lora, _, tmp_path = tuned
    merged = tmp_path / "net_g_ema.pt"  # the mistake to expect
    with pytest.raises(ValueError) as caught:
        run(merged, "--lora", lora, "--export", tmp_path / "x.pth")
    text = str(caught.value)
    assert f"{merged} is {file_digest(merged)}" in text and file_digest(path) in text
    assert not (tmp_path / "x.pth").exists()
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        run(path, "--lora", tmp_path / "nowhere.pt", "--export", tmp_path / "x.pth")


def test_the_demo_draws_the_curve(tmp_path):
    rows = [["Gold Standard", "", 9, 9], ["0", 1, 2, 3], ["0.5", 2, 3, 2], ["1.5", 4, 5, 1]]
    write_csv(tmp_path / "c.csv", ["model", "psnr", "q", "judge"], rows)
    curve_figure(tmp_path / "c.csv")
    assert Image.open(tmp_path / "c.png").size == (1350, 390)
    write_csv(tmp_path / "c.csv", ["model", "psnr"], [["0", 1]])
    with pytest.raises(ValueError, match="no column q, judge"):
        curve_figure(tmp_path / "c.csv")


# ------------------------------------------------------------------------- reading


def test_every_public_wrapping_is_read(tmp_path):
    net = randomise(NETS["rrdb_demo"]())
    state = dict(net.state_dict())

    def old(key):
        if key.startswith("body."):
            return key.replace("body.", "RRDB_trunk.").replace(".rdb", ".RDB")
        return key.replace("conv_body", "trunk_conv").replace("conv_up", "upconv").replace(
            "conv_hr", "HRconv")

    files = {"ema": {"params_ema": state}, "params": {"params": state}, "bare": state,
             "old": {old(k): v for k, v in state.items()}}
    for name, content in files.items():
        save_atomic(content, tmp_path / f"{name}.pth")
        assert_same(net, evaluate.load_net(str(tmp_path / f"{name}.pth")))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="cut.safetensors: not a readable weight file"):
        read_state(tmp_path / "cut.safetensors")


# ------------------------------------------------------------------------- ONNX


def onnx_run(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"lq": x.numpy()})[0]


@pytest.mark.parametrize("name, size, others", [
    ("rrdb_demo", None, [(9, 15), (1, 7), (32, 20)]),
    ("swinir_pixelshuffle", None, [(9, 15), (32, 16), (8, 41)]),
    ("swinir_pixelshuffle", (13, 24), [(13, 24)]),
])  # fmt: skip
def test_onnxruntime_gives_the_same(name, size, others, tmp_path, capsys):
    net = randomise(NETS[name]())
    path = saved(net, tmp_path / "net.pt")
    flags = ["--onnx-size", *size] if size else []
    run(path, "--export", tmp_path / "net.onnx", *flags)
    assert "differs from torch by" in capsys.readouterr().out
    for h, w in others:
        x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(h))
        np.testing.assert_allclose(onnx_run(tmp_path / "net.onnx", x), net(x), atol=1e-4, rtol=0)
    if size:
        with pytest.raises(Exception, match="invalid dimensions"):
            onnx_run(tmp_path / "net.onnx", torch.rand(1, 3, 16, 16))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = saved(NETS["rrdb_demo"](), tmp_path / "net.pt")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        run(path, "--export", tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="pip install safetensors"):
        run(path, "--export", tmp_path / "net.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt"]
