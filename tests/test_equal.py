"""paper/equal.py: naive fine-tuning scaled to another network's quality."""

import numpy as np
import pytest
import torch
from PIL import Image

import train_sr
from models.checkpoint import load_file, save_atomic
from models.weights import load_net
from paper import equal
from paper.equal import between, find_scale, main, parse_args


class Brightness(torch.nn.Module):
    """Mean of the image, in [0, 100]: what is scaled can be computed by hand."""

    def forward(self, x):
        return 100 * x.mean((1, 2, 3))


def test_the_scale_of_a_quality_that_rises():
    assert find_scale(lambda s: 10 + 30 * s**2, 10 + 30 * 0.25) == pytest.approx(0.5, abs=1e-3)
    assert find_scale(lambda s: 10 + s, 11.6) == pytest.approx(1.6, abs=1e-3)  # beyond naive
    assert find_scale(lambda s: 10 + s, 50) > 1.99  # out of reach: the nearest
    assert find_scale(lambda s: 10 + s, 5) < 0.01


def test_weights_between_two_networks_leave_whole_numbers_alone():
    base = {"w": torch.tensor([1.0, 2]), "index": torch.tensor([3])}
    naive = {"w": torch.tensor([3.0, 0]), "index": torch.tensor([4])}
    made = between(base, naive, 0.25)
    assert made["w"].tolist() == [1.5, 1.5] and made["index"].tolist() == [3]


@pytest.fixture
def nets(tmp_path):
    """Base, LoRA and naive, which brighten by 0, 0.05 and 0.2; and a folder of LQ images."""
    torch.manual_seed(0)
    net = train_sr.PRESETS["rrdb_tiny"]["build"]()
    state = {k: v * 0 for k, v in net.state_dict().items()}
    for name, bias in (("base", 0.3), ("lora", 0.35), ("naive", 0.5)):
        state["conv_last.bias"] = torch.full((3,), bias)
        save_atomic({"params_ema": dict(state), "settings": {"iqa": [name]}},
                    tmp_path / f"{name}.pt")
    (tmp_path / "lq").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "lq/a.png")
    return tmp_path


def flags(folder, **other):
    files = {n: folder / f"{n}.pt" for n in ("base", "naive", "lora")} | {
        "lq": folder / "lq", "out": folder / "eq.pt"} | other
    return parse_args([word for name, path in files.items() for word in (f"--{name}", str(path))])


def test_the_network_has_the_quality_of_the_other(nets, monkeypatch, capsys):
    monkeypatch.setattr(equal, "load_iqa", lambda name, device: Brightness())
    main(flags(nets))
    assert "has mean Q 34.90, LoRA 34.90; 1 images" in capsys.readouterr().out  # 89 of 255
    made = load_net(nets / "eq.pt")
    assert made.conv_last.bias.mean().item() == pytest.approx(0.35, abs=0.002)
    assert load_file(nets / "eq.pt")["settings"] == {"iqa": ["naive"]}


def test_bad_input_is_one_line(nets, monkeypatch):
    monkeypatch.setattr(equal, "load_iqa", lambda name, device: Brightness())
    other = train_sr.PRESETS["swinir_tiny"]["build"]()
    save_atomic({"params_ema": other.state_dict()}, nets / "other.pt")
    for wrong, message in (({"naive": nets / "other.pt"}, "other.pt: another kind or size"),
                           ({"lq": nets / "none"}, "none: no folder with PNG images")):
        with pytest.raises((ValueError, OSError), match=message) as error:
            main(flags(nets, **wrong))
        assert "\n" not in str(error.value) and not (nets / "eq.pt").exists()
