"""The pyiqa edge: sign, shape, gradient, frozen and eval; weights that fit or miss; bad names.

Nothing here needs a download: PIQE has no weights, the other nets have random ones.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.iqa import FrozenMetric, MetricUnavailable, load_fr, load_iqa, min_side

ROOT = Path(__file__).resolve().parent.parent
FAKES = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, gain=1.0, shape=()):
        super().__init__()
        self.gain, self.shape = nn.Parameter(torch.tensor(gain)), shape
    def forward(self, x):
        return self.gain * x.mean((1, 2, 3)).reshape(len(x) if x.shape[0] > 1 else -1, *self.shape)

class Scalar(Mean):
    def forward(self, x):
        return self.gain * x.mean()

class Detached(Mean):
    def forward(self, x):
        return super().forward(x.detach())

class Rounded(Mean):
    def forward(self, x):
        return super().forward(x.round() * 1.0)

class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3)
        nn.init.constant_(self.conv.weight, 0.1234567)
    def forward(self, x):
        return self.conv(x).mean((1, 2, 3)), "a second output"

def mean(weights=None):
    return Mean(float(torch.load(weights)["gain"]) if weights else 1.0)
def column(): return Mean(shape=(1,))
def cube(): return Mean(shape=(1, 1))
def scalar(): return Scalar()
def detached(): return Detached()
def rounded(): return Rounded()
def conv(): return Conv()
def nothing(): return "no module"
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    (tmp_path / "fake_metrics.py").write_text(FAKES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fake_metrics", raising=False)


@pytest.fixture(scope="module")
def musiq():
    return load_iqa("models.iqa:random_musiq", "cpu", differentiable=True)


@pytest.fixture(scope="module")
def images():
    """(3, 3, 64, 64): smooth, noise, and half of each."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 64, 64, generator=generator)
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    return torch.stack([ramp, noise, (ramp + noise) / 2])


def test_lower_better_is_negated_once():
    from pyiqa.models.inference_model import InferenceModel

    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    raw = InferenceModel("piqe", device="cpu")
    assert raw.lower_better
    quality = load_iqa("piqe", "cpu")(images)
    assert quality.shape == (2,) and quality.dtype == torch.float32
    torch.testing.assert_close(quality, -raw(images), rtol=0, atol=0)


def test_higher_better_keeps_its_sign_and_takes_a_weight_file(tmp_path, images):
    from pyiqa.archs.cnniqa_arch import CNNIQA

    net = CNNIQA(pretrained=None).eval()
    torch.save({"params": net.state_dict()}, tmp_path / "own.pth")
    expected = net(images).reshape(3).detach()
    for metric in (load_iqa(f"cnniqa@{tmp_path / 'own.pth'}", "cpu"),
                   load_iqa("cnniqa", "cpu", weights=str(tmp_path / "own.pth"))):
        torch.testing.assert_close(metric(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", ["mean", "column", "cube", "conv"])
def test_every_shape_becomes_n(fakes, function, images):
    metric = load_iqa(f"fake_metrics:{function}", "cpu")
    assert metric(images).shape == (3,) and metric(images[:1]).shape == (1,)
    torch.testing.assert_close(metric(images)[1:2], metric(images[1:2]))


def test_scalar_of_one_image_becomes_n_and_of_two_is_refused(fakes, images):
    metric = load_iqa("fake_metrics:scalar", "cpu")
    assert metric(images[:1]).shape == (1,)
    with pytest.raises(ValueError, match="scores for 2 images"):
        metric(images[:2])


def test_own_function_with_and_without_weights(fakes, tmp_path, images):
    torch.save({"gain": torch.tensor(3.0)}, tmp_path / "gain.pt")
    plain = load_iqa("fake_metrics:mean", "cpu")(images)
    torch.testing.assert_close(plain, images.mean((1, 2, 3)))
    weighted = load_iqa(f"fake_metrics:mean@{tmp_path / 'gain.pt'}", "cpu")(images)
    torch.testing.assert_close(weighted, 3 * plain)


def test_musiq_gradient_is_that_of_finite_differences(musiq, images):
    images = images[1:]  # the ramp's flat patches are divided by their tiny deviations: no line
    x = images.clone().requires_grad_()
    scores = musiq(x)
    assert scores.shape == (2,) and ((scores > 0) & (scores < 100)).all()
    (grad,) = torch.autograd.grad(scores.sum(), x)
    norm = grad.flatten(1).norm(dim=1)  # a sum of per-image scores: no 1/N from a batch mean
    assert (norm > 0).all()
    step = 0.05 * grad / norm.square().view(-1, 1, 1, 1)
    change = musiq(images + step).detach() - musiq(images - step).detach()
    torch.testing.assert_close(change, torch.full((2,), 0.1), rtol=0.05, atol=0)
    assert all(not p.requires_grad and p.grad is None for p in musiq.parameters())


def test_outside_the_range_a_differentiable_metric_neither_checks_nor_clamps(fakes):
    metric = load_iqa("fake_metrics:mean", "cpu", differentiable=True)
    x = torch.full((2, 3, 8, 8), 1.2, requires_grad=True)
    score = metric(x)
    torch.testing.assert_close(score.detach(), torch.full((2,), 1.2))
    assert torch.autograd.grad(score.sum(), x)[0].gt(0).all()


def test_scores_without_gradient_are_ordinary_tensors(fakes, images):
    scores = load_iqa("fake_metrics:mean", "cpu")(images.clone().requires_grad_())
    assert not scores.requires_grad and not scores.is_inference()
    weight = torch.ones(3, requires_grad=True)
    (weight * scores).sum().backward()
    torch.testing.assert_close(weight.grad, scores)
    with torch.no_grad():
        assert not load_iqa("fake_metrics:mean", "cpu", differentiable=True)(images).requires_grad


def test_eval_and_frozen_below_a_training_parent(musiq, images):
    parent = nn.ModuleDict({"iqa": musiq}).train()
    assert parent.training and not any(m.training for m in musiq.modules())
    assert not any(p.requires_grad for p in parent.parameters())
    with torch.no_grad():  # in training mode MUSIQ would take the image for ready-made patches
        assert musiq(images[:1]).shape == (1,)


def test_musiq_batch_equals_single(musiq, images):
    with torch.no_grad():
        single = torch.cat([musiq(x[None]) for x in images])
        torch.testing.assert_close(musiq(images), single, rtol=0, atol=1e-3)


def test_float32_also_under_autocast(fakes, images):
    metric = load_iqa("fake_metrics:conv", "cpu", differentiable=True)
    plain = metric(images)
    with torch.autocast("cpu", torch.bfloat16):
        inside = metric(images)
    assert inside.dtype == torch.float32 and torch.equal(plain, inside)
    assert metric(images.bfloat16()).dtype == torch.float32


def test_one_image_at_a_time_where_the_metric_needs_it(images):
    class One(nn.Module):
        def forward(self, x):
            assert len(x) == 1
            return x.mean()

    torch.testing.assert_close(FrozenMetric(One(), "qalign")(images), images.mean((1, 2, 3)))


def test_random_musiq_is_fixed_and_leaves_the_generator_alone(musiq, images):
    state = torch.get_rng_state()
    again = load_iqa("models.iqa:random_musiq", "cpu")
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        assert torch.equal(again(images[:1]), musiq(images[:1]))


@pytest.mark.parametrize("bad, message", [
    (torch.full((1, 3, 64, 64), 2.0), "span 2 to 2"),
    (torch.full((1, 3, 64, 64), float("nan")), "span nan"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "needs float"),
    (torch.zeros(1, 1, 64, 64), "needs float"),
    (torch.zeros(3, 64, 64), "needs float"),
    (torch.zeros(1, 3, 64, 7), "at least 8 px"),
])  # fmt: skip
def test_bad_images_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        FrozenMetric(nn.Identity(), "piqe")(bad)


@pytest.mark.parametrize("name, side", [
    ("musiq", 5), ("musiq-ava", 5), ("musiq@x.pth", 5), ("liqe_mix", 224), ("niqe_matlab", 96),
    ("clipiqa+", 32), ("clipiqa+_vitL14_512", 16), ("topiq_nr", 8), ("demo.quality:q@x.pt", 1),
])  # fmt: skip
def test_min_side(name, side):
    assert min_side(name) == side


@pytest.mark.parametrize("name, message", [
    ("musik", "did you mean musiq"),
    ("lpips", "not a no-reference metric"),
    ("fid", "not a no-reference metric of single images"),
    ("musiq@nowhere.pth", "nowhere.pth: no such weight file"),
    ("musiq@", "NAME@FILE"),
    ("fake_metrics:absent", "package.module:function"),
    ("no_such_module:q", "No module named"),
    ("fake_metrics:nothing", "not an nn.Module"),
    ("fake_metrics:column@{file}", "weights"),
    ("piqe@{file}", "takes no weight file"),
    ("clipiqa@{file}", "takes no weight file"),
    ("cnniqa@{file}", "does not fit metric cnniqa"),
    ("cnniqa@{evil}", "not a weight file of plain tensors"),
])  # fmt: skip
def test_bad_names_and_files_are_refused_in_one_line(fakes, tmp_path, name, message):
    torch.save({"params": {"other.weight": torch.zeros(2)}}, tmp_path / "file.pth")
    torch.save({"params": pytest.approx}, tmp_path / "evil.pth")
    name = name.format(file=tmp_path / "file.pth", evil=tmp_path / "evil.pth")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_iqa(name, "cpu")
    assert len(str(caught.value).splitlines()) == 1
    assert not isinstance(caught.value, MetricUnavailable)


@pytest.mark.parametrize("name", ["piqe", "nrqm", "pi", "qalign", "fake_metrics:detached",
                                  "fake_metrics:rounded"])  # fmt: skip
def test_metrics_without_gradient_are_refused_as_loss(fakes, name):
    with pytest.raises(ValueError, match="gradient"):
        load_iqa(name, "cpu", differentiable=True)


def test_loosely_loaded_file_must_fit(tmp_path):
    from pyiqa.archs.stlpips_arch import STLPIPS

    torch.manual_seed(0)
    net = STLPIPS(pretrained=False).eval()
    torch.save(net.state_dict(), tmp_path / "own.pth")
    x, y = torch.rand(2, 3, 48, 48), torch.rand(2, 3, 48, 48)
    scores = load_fr(f"stlpips@{tmp_path / 'own.pth'}", "cpu")(x, y)
    torch.testing.assert_close(scores, net(x, y).reshape(2).detach(), rtol=0, atol=0)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("net.")}
    for wrong in ({"nonsense": torch.zeros(3)}, state):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match="does not fit metric stlpips"):
            load_fr(f"stlpips@{tmp_path / 'wrong.pth'}", "cpu")


def test_missing_weights_end_within_seconds_and_say_how_to_prefetch(tmp_path):
    code = """if True:
        import sys, time
        import models.iqa
        assert "pyiqa" not in sys.modules, "importing models.iqa must stay fast"
        for name in ("musiq", "topiq_nr"):  # pyiqa's own file, and timm's backbone
            models.iqa._pyiqa_config(name, "NR")  # imports pyiqa
            start = time.monotonic()
            try:
                models.iqa.load_iqa(name, "cpu")
            except models.iqa.MetricUnavailable as error:
                print(f"{time.monotonic() - start:.1f}|{error}")
    """
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"TORCH_HOME": str(tmp_path / "torch"), "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("musiq", "topiq_nr"), strict=True):
        seconds, message = line.split("|")
        assert float(seconds) < 30  # huggingface_hub alone would retry for 50 s
        assert f"python -m models.iqa prefetch {name}" in message
        assert str(tmp_path / "torch") in message and str(tmp_path / "hf") in message
