"""NaN and infinity: in no weight that is loaded or written, no picture, no table."""

import csv

import pytest
import torch
from make_data import make_hggt
from PIL import Image
from test_train import TINY

import evaluate
import finetune_lora
import train_sr
from models.checkpoint import load_file, save_atomic, sha256
from models.discriminator import UNetDiscriminatorSN
from models.export import export
from models.lora import add_lora, lora_state
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.weights import load_discriminator, load_like, load_net
from tools import upscale

NETS = {"swinir": (SwinIR, dict(embed_dim=12, depths=(2,), num_heads=(2,), img_size=16)),
        "rrdb": (RRDBNet, dict(num_feat=8, num_block=1, num_grow_ch=4))}  # fmt: skip


def spoilt(state, key, value):
    """A copy of a state with one value of one weight replaced."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    state[key].view(-1)[-1] = value
    return state


@pytest.fixture
def overflowing(tmp_path):
    """A checkpoint of finite weights whose output is not."""
    torch.manual_seed(0)
    net = RRDBNet(**NETS["rrdb"][1])
    with torch.no_grad():
        for layer in (net.conv_first, net.conv_hr, net.conv_last):
            layer.weight.mul_(1e30)
    save_atomic({"params": net.state_dict()}, tmp_path / "huge.pt")
    return str(tmp_path / "huge.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", NETS)
def test_a_network_is_refused_by_the_name_of_its_weight(kind, value, tmp_path):
    build, settings = NETS[kind]
    net, path = build(**settings), tmp_path / "net.pt"
    for wrapping in ("params_ema", "params"):
        save_atomic({wrapping: spoilt(net.state_dict(), "conv_last.bias", value)}, path)
        for load in (load_net, lambda p: load_like(net, p, "--net x")):
            with pytest.raises(ValueError) as error:
                load(path)
            assert str(error.value) == f"{path}: conv_last.bias is not finite"


@pytest.mark.parametrize("key", ["conv9.bias", "conv4.weight_u"])
def test_a_discriminator_is_refused_by_the_name_of_its_weight(key, tmp_path):
    net_d, path = UNetDiscriminatorSN(num_feat=2), tmp_path / "d.pt"
    save_atomic({"net_d": spoilt(net_d.state_dict(), key, float("nan"))}, path)
    with pytest.raises(ValueError, match=f"d.pt: {key} is not finite"):
        load_discriminator(net_d, path)


def test_adapters_are_refused_and_so_is_what_they_merge_to(tmp_path):
    base, lora = str(tmp_path / "base.pt"), str(tmp_path / "lora.pt")
    net = RRDBNet(**NETS["rrdb"][1])
    save_atomic({"params": net.state_dict()}, base)
    targets = ["body.*.rdb?.conv?"]
    add_lora(net, targets, 2)
    state = lora_state(net)
    saved = {"lora": state, "rank": 2, "alpha": 2.0, "targets": targets,
             "base_sha256": sha256(base)}
    key = "body.0.rdb1.conv1.lora_b"
    save_atomic(saved | {"lora": spoilt(state, key, float("nan"))}, lora)
    with pytest.raises(ValueError, match=f"lora.pt: {key} is not finite"):
        upscale.apply_lora(load_net(base), lora, base)
    save_atomic(saved | {"lora": spoilt(state, key, 1e38)}, lora)
    upscale.apply_lora(load_net(base), lora, base, 0.0)
    for scale, alpha in ((1e9, 2.0), (1.0, float("nan"))):
        save_atomic(saved | {"alpha": alpha, "lora": spoilt(state, key, 1e38)}, lora)
        with pytest.raises(ValueError, match="lora.pt, merged with --lora-scale .* is not finite"):
            upscale.apply_lora(load_net(base), lora, base, scale)


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors", "onnx"])
def test_export_writes_no_such_network(suffix, tmp_path):
    net = RRDBNet(**NETS["rrdb"][1])
    net.load_state_dict(spoilt(net.state_dict(), "conv_hr.weight", float("nan")))
    path = tmp_path / f"net.{suffix}"
    with pytest.raises(ValueError, match="--export .*: conv_hr.weight is not finite"):
        export(net, str(path))
    assert not path.exists()


def test_a_photo_whose_result_is_not_finite_has_failed(overflowing, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (12, 9), "white").save(tmp_path / "photos/a.png")
    out = tmp_path / "sr"
    assert upscale.main(upscale.parse_args([
        "--ckpt", overflowing, "--lq", str(tmp_path / "photos"), "--out", str(out), "--metrics"]))
    assert f"{tmp_path}/photos/a.png: the network's output is not finite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["scores.csv"]
    lines = [line for line in (out / "scores.csv").read_text().splitlines() if line[0] != "#"]
    assert [row["status"] for row in csv.DictReader(lines)] == ["failed"]


def not_a_number():
    """A metric without a score."""

    class Metric(torch.nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3)) * torch.nan

    return Metric()


def test_a_photos_score_that_is_not_finite_is_empty(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = upscale.upscale_photos(
        [tmp_path / "a.png"], tmp_path / "sr", lambda x: (torch.zeros(1, 3, 32, 32), 0),
        {"m": lambda x: x.mean((1, 2, 3)) * torch.nan}, quiet=True)
    assert rows[0]["status"] == "made" and "m_lq" not in rows[0] and "m_sr" not in rows[0]
    assert "a.png: no score (m gave nan)" in capsys.readouterr().err


@pytest.fixture
def flags(tmp_path):
    make_hggt(tmp_path / "gt", n=2, test=True)
    (tmp_path / "lq").mkdir()
    for path in (tmp_path / "gt/images/original").glob("*.png"):
        with Image.open(path) as image:
            image.resize((16, 16)).save(tmp_path / "lq" / path.name)
    return ["--gt", str(tmp_path / "gt"), "--lq", str(tmp_path / "lq"), "--out",
            str(tmp_path / "t.csv")]


def test_no_table_has_a_row_of_nan(overflowing, flags, tmp_path):
    def run(checkpoint, *more):
        with pytest.raises(ValueError) as error:
            evaluate.main(evaluate.parse_args(
                ["--models", f"Mine={checkpoint}", *flags, *more]))
        assert not (tmp_path / "t.csv").exists()
        return str(error.value)

    text = run(overflowing, "--metrics", "psnr", "--save-sr", str(tmp_path / "sr"))
    assert text == "Mine/img00: the network's output is not finite"
    assert not (tmp_path / "sr").exists()
    save_atomic({"params": RRDBNet(**NETS["rrdb"][1]).state_dict()}, tmp_path / "net.pt")
    text = run(tmp_path / "net.pt", "--metrics", "--extra", "m=test_finite:not_a_number")
    assert "img00.png: metric test_finite:not_a_number gave nan" in text  # of the Gold Standard


# ------------------------------------------------------------------------- training

FLAGS = (*map(str, TINY), "--seed", "3", "--steps", "2", "--init", "none", "--sampler", "rand")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finite")
    make_hggt(folder / "HGGT", n=2, size=64)
    return folder


def train(script, folder, monkeypatch, *flags):
    monkeypatch.chdir(folder)
    script.main(script.parse_args([*FLAGS, *flags]))


def test_an_average_that_is_not_finite_is_not_saved(folder, monkeypatch):
    def update(net_ema, net, decay):
        next(net_ema.parameters())[0] = torch.inf

    monkeypatch.setattr(train_sr, "ema_update", update)
    with pytest.raises(ValueError, match="step 1: not finite: SwinIR.conv_first.weight"):
        train(train_sr, folder, monkeypatch, "--out", "ema")
    assert not list((folder / "ema").glob("*.pt"))


def test_moments_that_are_not_finite_are_not_saved(folder, monkeypatch):
    """An infinite second moment stops a weight for ever, which stays finite."""
    real = train_sr.update

    def update(optim, lr):
        real(optim, lr)
        next(iter(optim.state.values()))["exp_avg_sq"].fill_(torch.inf)

    monkeypatch.setattr(train_sr, "update", update)
    with pytest.raises(ValueError, match=r"step 1: not finite: Adam.state.0.exp_avg_sq"):
        train(train_sr, folder, monkeypatch, "--out", "moments")
    assert not list((folder / "moments").glob("*.pt"))


def test_a_run_does_not_resume_from_what_is_not_finite(folder, monkeypatch):
    """Nor does one that has come to its end write its result from it."""
    train(train_sr, folder, monkeypatch, "--out", "run", "--save-every", "1")
    last = folder / "run/last.pt"
    state = load_file(last)
    (folder / "run/net_g_ema.pt").unlink()
    state["params_ema"]["conv_last.bias"][0] = torch.nan
    save_atomic(state, last)
    with pytest.raises(ValueError) as error:
        train(train_sr, folder, monkeypatch, "--out", "run")
    assert str(error.value) == (
        "run/last.pt: params_ema.conv_last.bias is not finite; for the one before: "
        "mv run/previous.pt run/last.pt")
    assert not (folder / "run/net_g_ema.pt").exists()


def test_a_fine_tuning_writes_no_result_that_is_not_finite(folder, monkeypatch):
    train(train_sr, folder, monkeypatch, "--out", "base")
    real = train_sr.fit

    def fit(*args, **more):
        net = real(*args, **more)
        for name, values in net.named_parameters():
            if "lora_" in name:  # finite, their product is not
                values.data.fill_(1e30)
        return net

    monkeypatch.setattr(train_sr, "fit", fit)
    with pytest.raises(ValueError, match="tuned: the averaged network is not written: .* finite"):
        train(finetune_lora, folder, monkeypatch, "--init", "base/net_g_ema.pt", "--out", "tuned")
    assert sorted(path.name for path in (folder / "tuned").glob("*.pt")) == [
        "last.pt", "previous.pt"]
