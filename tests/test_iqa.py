"""The pyiqa edge: sign, shape, gradient, frozen and eval; weights that fit or miss; bad names.

Nothing here needs a download: PIQE has no weights, the other nets have random ones.
"""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from models import iqa, losses
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
    metric = load_iqa(f"cnniqa@{tmp_path / 'own.pth'}", "cpu")
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


def test_musiq_copies_nothing_to_the_gpu(monkeypatch):
    """On fake CUDA tensors Q makes no host-to-device copies; pyiqa's own MUSIQ makes 13."""
    from pyiqa.archs.musiq_arch import MUSIQ
    from pyiqa.data import multiscale_trans_util as util
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            found.extend([function] * (len({x.device.type for x in tensors if x.ndim}) > 1))
            return out

    # Real tensors that are kept do not go into a fake network
    positions = util.get_hashed_spatial_pos_emb_index
    monkeypatch.setattr(util, "get_hashed_spatial_pos_emb_index",
                        getattr(positions, "__wrapped__", positions))
    with FakeTensorMode():
        with torch.device("cuda"):
            net, images = MUSIQ(pretrained=False), torch.empty(4, 3, 256, 256)
        for name, copies in (("musiq", False), ("another", True)):
            found = []
            with Copies():
                assert FrozenMetric(net, name)(images).device.type == "cuda"
            assert bool(found) == copies, found


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


# Counts the attempts to reach a network. Files of random weights bear the public names, so hashes
# in names are ignored.
OFFLINE = """
import importlib, re, socket, sys, time
import models.iqa
tries = []
def refuse(*args, **kwargs):
    tries.append(args)
    raise OSError("a network attempt")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
models.iqa.NAMED_HASH = re.compile("(?!)")
"""


NO_NETWORK = {"HF_HUB_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:9"}


def run_offline(code, folder, **variables):
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"TORCH_HOME": str(folder / "torch"), "HF_HOME": str(folder / "huggingface"),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run([sys.executable, "-c", OFFLINE + code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=200)


def test_missing_weights_end_within_two_seconds_and_say_how_to_prefetch(tmp_path):
    code = """if True:
        files = models.iqa.PAPER_FILES
        for names, load in ((files["NR"], models.iqa.load_iqa), (files["FR"], models.iqa.load_fr)):
            for name in names:
                start = time.monotonic()
                try:
                    load(name, "cpu")
                except models.iqa.MetricUnavailable as error:
                    print(f"{time.monotonic() - start:.2f}|{name}|{len(tries)}|{error}")
        assert "pyiqa" not in sys.modules
    """
    for variables, most in (({}, 0), (NO_NETWORK, 1)):  # without the flag it asks once
        done = run_offline(code, tmp_path, **variables)
        assert done.returncode == 0, done.stderr
        lines = [line.split("|") for line in done.stdout.splitlines()]
        assert len(lines) == 8
        for seconds, name, tries, message in lines:
            assert float(seconds) < 2 and int(tries) <= most
            assert message.endswith(f"run: python -m tools.prefetch {name}")
            assert f"{tmp_path}/" in message


@pytest.mark.parametrize("variables, most", [({}, 0), (NO_NETWORK, 1)], ids=["flag", "no-network"])
def test_another_metrics_missing_weights_are_not_fetched_offline(tmp_path, variables, most):
    """Neither pyiqa's own file (cnniqa), torchvision's (tres) nor timm's backbone (hyperiqa)."""
    code = """if True:
        import pyiqa
        for name in ("cnniqa", "tres", "hyperiqa"):
            start = time.monotonic()
            try:
                models.iqa.load_iqa(name, "cpu")
            except models.iqa.MetricUnavailable as error:
                print(f"{time.monotonic() - start:.2f}|{name}|{len(tries)}|{error}")
    """
    done = run_offline(code, tmp_path, **variables)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [line[1] for line in lines] == ["cnniqa", "tres", "hyperiqa"], done.stderr
    for seconds, name, tries, message in lines:
        assert int(tries) <= most and float(seconds) < 20
        assert message.endswith(f"run: python -m tools.prefetch {name}")


def test_a_server_that_does_not_answer_ends_the_download(tmp_path, monkeypatch):
    """It accepts the connection, as some firewalls do, and then sends nothing."""
    from pyiqa.archs import cnniqa_arch
    from pyiqa.utils import download_util

    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(iqa, "online", lambda: True)
    monkeypatch.setattr(iqa, "STALL_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cnniqa.pth"
        monkeypatch.setitem(cnniqa_arch.default_model_urls, "koniq10k", url)
        giving_up = threading.Timer(30, server.close)  # or the test could last for ever
        giving_up.start()
        with pytest.raises(MetricUnavailable, match="timed out"):
            load_iqa("cnniqa", "cpu")
        giving_up.cancel()
    assert socket.getdefaulttimeout() is None and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def prefetched(tmp_path_factory):
    """A folder as `tools.prefetch --into` makes it, with random weights of MUSIQ and VGG19."""
    import torchvision

    folder = tmp_path_factory.mktemp("weights")
    hub = folder / "torch/hub"
    (hub / "pyiqa").mkdir(parents=True)
    (hub / "checkpoints").mkdir()
    state = iqa.random_musiq().state_dict()
    torch.save(state, hub / iqa.PAPER_FILES["NR"]["musiq"][0])
    features = torchvision.models.vgg19(weights=None).features[:35]
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()},
               hub / "checkpoints/vgg19-dcbb9e9d.pth")
    return folder


@pytest.mark.slow
def test_runs_with_the_prefetched_folder_try_no_network(prefetched, tmp_path):
    from make_data import make_hggt

    make_hggt(tmp_path / "hggt", n=2)
    (tmp_path / "lq").mkdir()
    images = tmp_path / "hggt/Train/images/0-4"
    for path in sorted((images / "original").glob("*.png")):
        with Image.open(path) as picture:
            picture.resize((16, 16)).save(tmp_path / "lq" / path.name)
    (tmp_path / "pairs.csv").write_text("image1,image2,score\n" + "".join(
        f"{images}/original/img0{i}.png,{images}/01/img0{i}_01.png,0.9\n" for i in range(2)))
    runs = [
        ("train_sr", "--net swinir_tiny --data hggt --sampler amo --steps 1 --batch-size 1 "
         "--patch-size 32 --num-workers 0 --init none --out run"),
        ("evaluate", "--models AMO=run/net_g_ema.pt --gt hggt/Train/images/0-4 --lq lq "
         "--metrics psnr musiq --out table5.csv --require-all"),
        ("analyze_iqa", "--pairs pairs.csv --metrics musiq --out analysis"),
    ]
    code = f"""if True:
        import os
        sys.path.insert(0, os.getcwd())
        os.chdir({str(tmp_path)!r})
        for script, flags in {runs!r}:
            module = importlib.import_module(script)
            module.main(module.parse_args(flags.split()))
        print("tries:", tries)
    """
    done = run_offline(code, prefetched)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("tries: []\n")
    # the heads of the tables name the file that was in the cache
    digest = hashlib.sha256((prefetched / "torch/hub/pyiqa/musiq_koniq_ckpt-e95806b9.pth")
                            .read_bytes()).hexdigest()
    weights = f"musiq_koniq_ckpt-e95806b9.pth sha256 {digest[:12]}\n"
    assert f"# column musiq: weights {weights}" in (tmp_path / "table5.csv").read_text()
    for table in ("table6", "table2"):
        head = (tmp_path / f"analysis/{table}.csv").read_text()
        assert f"# weights of musiq: {weights}" in head and "# images: RGB, 8 bit" in head
        assert "pyiqa 0." in head


def test_prefetch_keeps_what_is_there_and_names_what_is_missing(prefetched):
    code = f"""if True:
        from tools.prefetch import main, parse_args
        main(parse_args(["musiq", "vgg19", "--into", {str(prefetched)!r}]))
        try:
            main(parse_args(["lpips", "qalign", "musik", "--into", {str(prefetched)!r}]))
        except ValueError as error:
            print(error)
        try:
            main(parse_args(["lpips", "musiq", "--into", {str(prefetched)!r}]))
        except ValueError as error:
            print(error)
        assert not tries
    """
    done = run_offline(code, prefetched / "elsewhere")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["musiq: ready", "vgg19: ready"]
    export = (f"For runs without a network: export TORCH_HOME={prefetched}/torch "
              f"HF_HOME={prefetched}/huggingface HF_HUB_OFFLINE=1")
    assert lines[2] == lines[8] == export and lines.count(export) == 2  # none if all names failed
    assert lines[7] == "musiq: ready" and len(lines) == 11
    for line, name in zip(lines[3:6], ("lpips", "qalign", "musik"), strict=True):
        assert line.startswith(f"{name}: ") and "tools.prefetch" not in line
    assert lines[3] == lines[9] and "is missing" in lines[3] and lines[6] == lines[10]
    assert lines[6].startswith("https://huggingface.co does not answer, or HF_HUB_OFFLINE is set.")
    assert lines[4] == ("qalign: cannot be downloaded: no connection, or HF_HUB_OFFLINE is set")


def test_prefetch_ends_with_exit_code_2_and_a_line_per_problem(tmp_path):
    command = [sys.executable, "-m", "tools.prefetch", "vgg19", "vgg19", "--into", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and "Run the same command with --into DIR on a machine" in lines[2]
    for line in lines[:2]:
        assert line.startswith("prefetch.py: vgg19: ") and str(tmp_path) in line
        assert "is missing and cannot be downloaded" in line and "tools.prefetch" not in line


def test_paper_files_are_those_that_pyiqa_and_torchvision_load():
    import pyiqa
    import torchvision

    archs = Path(pyiqa.__file__).parent / "archs"
    source = "".join(f.read_text() for f in archs.glob("*.py"))
    source += "".join(f.read_text() for f in Path(torchvision.models.__file__).parent.glob("*.py"))
    for files in iqa.PAPER_FILES.values():
        for file in (f for f in sum(files.values(), []) if not f.startswith("models--")):
            assert f"{Path(file).name}'" in source or f"/{Path(file).name}\"" in source, file
    assert losses.VGG19_URL in source


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, monkeypatch):
    from pyiqa.archs.cnniqa_arch import CNNIQA
    from pyiqa.utils import download_util

    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    cached = tmp_path / "CNNIQA_koniq10k-e6f14c91.pth"
    torch.save({"params": CNNIQA(pretrained=None).state_dict()}, cached)
    digest = hashlib.sha256(cached.read_bytes()).hexdigest()
    own, dated = tmp_path / f"own-{digest[:8]}.pth", tmp_path / "own-20260101.pth"
    for file in (own, dated):
        shutil.copy(cached, file)
        assert load_iqa(f"cnniqa@{file}", "cpu").weights == f"{file.name} sha256 {digest[:12]}"
    own.write_bytes(own.read_bytes()[:-100])
    for name, file in (("cnniqa", cached), (f"cnniqa@{own}", own)):
        with pytest.raises(ValueError, match="truncated or not the public file") as caught:
            load_iqa(name, "cpu")
        assert str(file) in str(caught.value) and "delete it" in str(caught.value)


class Payload:
    """Unpickled in full, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pyiqa_unpickles_nothing_but_tensors_and_all_is_put_back(tmp_path, monkeypatch):
    import scipy.io
    from huggingface_hub import constants
    from pyiqa.utils import download_util

    def settings():
        return (torch.load, scipy.io.loadmat, constants.HF_HUB_OFFLINE, socket.getdefaulttimeout(),
                urllib.request._opener)

    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(iqa, "NAMED_HASH", re.compile("(?!)"))
    monkeypatch.setattr(urllib.request, "_opener", urllib.request.build_opener())
    before = settings()
    cached, made = tmp_path / "CNNIQA_koniq10k-e6f14c91.pth", tmp_path / "made"
    torch.save({"params": Payload(made)}, cached)
    with pytest.raises(ValueError, match="not a weight file of plain tensors") as caught:
        load_iqa("cnniqa", "cpu")
    assert not made.exists() and len(str(caught.value).splitlines()) == 1
    assert settings() == before
    torch.load(cached, weights_only=False)
    assert made.exists()  # so the file would have done it


def test_matlab_files_are_listed_and_checked_too(tmp_path, monkeypatch):
    import numpy as np
    import scipy.io
    from pyiqa.utils import download_util

    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    file = tmp_path / "niqe_modelparameters.mat"
    scipy.io.savemat(file, {"mu_prisparam": np.zeros((1, 36)), "cov_prisparam": np.eye(36)})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_iqa("niqe", "cpu").weights == f"{file.name} sha256 {digest[:12]}"
    file.write_bytes(b"<html>captive portal</html>")
    with pytest.raises(ValueError, match="niqe_modelparameters.mat: not a weight file"):
        load_iqa("niqe", "cpu")
