"""The edge to pyiqa: image-quality predictors as frozen modules, up = better (paper Sec. 3, 4).

    load_iqa("musiq", device)                a no-reference (NR) metric of pyiqa; weights are taken
                                             from the cache folders, or downloaded
    load_iqa("musiq@FILE.pth", device)       the same with one's own weight file
    load_iqa("demo.quality:q@q.pt", device)  one's own: q(weights="q.pt") -> nn.Module,
                                             (N, 3, H, W) in [0, 1] -> (N,), up = better
    load_fr("lpips", device)                 a full-reference metric of pyiqa, its sign unchanged
    python -m models.iqa prefetch [musiq nima ...] [--into DIR]     all weights that a run needs

The cache folders are TORCH_HOME (~/.cache/torch) and HF_HOME (~/.cache/huggingface); pyiqa fixes
them at its import, which happens at the first use of a pyiqa metric. With HF_HUB_OFFLINE=1 nothing
tries to reach a network. Files are unpickled as plain tensors alone, and refused where their name
carries another SHA-256 than their content has. Checked with pyiqa 0.1.16.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import io
import os
import pickle
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

# Smallest side in pixels that pyiqa's metrics accept, by name or else by family (measured with
# pyiqa 0.1.16 and random weights; metrics that resize take any size, nrqm was not measured).
MIN_SIDES = {
    "musiq": 5, "liqe": 224, "clipiqa": 32, "clipiqa+_vitL14_512": 16, "dbcnn": 16, "brisque": 16,
    "wadiqam": 48, "niqe": 96, "pi": 104, "piqe": 8, "lpips": 32, "stlpips": 24,
}  # fmt: skip
# One score per set of images, or a caption needed: no quality of one image.
NOT_PER_IMAGE = ("fid", "sfid", "fid_dinov2", "inception_score", "clipscore")
# Random forest, rounding, histogram or PIL inside: no gradient reaches the image, or a zero one.
NO_GRADIENT = ("nrqm", "pi", "piqe", "entropy", "qalign", "qrealign")
# pyiqa would ignore the file, or (liqe) cache text features of it that spoil the official weights.
NO_WEIGHT_FILE = ("piqe", "pi", "entropy", "liqe", "arniqa", "clipiqa", "qalign", "qrealign")
# pyiqa loads these files with strict=False, so that any file passes; the parameters under the given
# prefix come from torchvision and are not in the file.
LOOSELY_LOADED = {"topiq": (), "metaiqa": (), "stlpips": (), "lpips": "net.", "dists": "stage"}
# What the paper's metrics load, below TORCH_HOME/hub or (models--*) the hub's own cache, except for
# timm's backbones: so a missing file is told without importing pyiqa, which takes seconds.
PAPER_FILES = {
    "NR": {
        "musiq": ["pyiqa/musiq_koniq_ckpt-e95806b9.pth"],
        "nima": ["pyiqa/NIMA_InceptionV2_ava-b0c77c00.pth"],
        "qalign": ["models--q-future--one-align"],
        "topiq_nr": ["pyiqa/cfanet_nr_koniq_res50-9a73138b.pth"],
        "paq2piq": ["pyiqa/P2P_RoIPoolModel-fit.10.bs.120-ca69882e.pth",
                    "checkpoints/resnet18-f37072fd.pth"],
    },
    "FR": {
        "lpips": ["pyiqa/LPIPS_v0.1_alex-df73285e.pth", "checkpoints/alexnet-owt-7be5be79.pth"],
        "stlpips": ["pyiqa/alex_shift_tolerant.pth"],
        "dists": ["pyiqa/DISTS_weights-f5e65c96.pth", "checkpoints/vgg16-397923af.pth"],
    },
}  # fmt: skip
PAPER_NAMES = (*PAPER_FILES["NR"], *PAPER_FILES["FR"], "vgg19")
VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"  # of the perceptual loss
# The start of the SHA-256 in the names of pyiqa's, torchvision's and torch hub's files; eight
# digits without a letter are taken for a date.
NAMED_HASH = re.compile(r"-(?!\d{8}\.)([0-9a-f]{8})\.\w+$")
NETWORK_SECONDS = 1.5
PREFETCH = "python -m models.iqa prefetch"


class MetricUnavailable(OSError):
    """The metric exists, but its weights (or a package it needs) cannot be had on this machine."""


class RefusedFile(ValueError):
    """A weight file that is damaged, not what its name says, or more than plain tensors."""


class FrozenMetric(nn.Module):
    """A frozen metric: (N, 3, H, W) float in [0, 1] (and references of that shape) -> (N,) float32.

    Always in eval mode, also below a parent in training (MUSIQ skips its normalisation and patches
    in training mode), and always in float32, also under autocast (bf16 moves MUSIQ by up to 0.55).
    Nothing in it is random: pyiqa's multi-crop metrics use a fixed grid of crops in eval mode.
    weights: for the heads of tables, "FILE sha256 0123456789ab" of each weight file, with commas.
    """

    def __init__(self, net: nn.Module, name: str, sign: int = 1, differentiable: bool = False,
                 weights: str = ""):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.name, self.sign, self.differentiable = name, sign, differentiable
        self.side, self.weights = min_side(name), weights
        self.one_by_one = name.startswith(("qalign", "qrealign"))  # they assert N = 1
        # pyiqa's makes padding and masks on the CPU, 95 MB for 40 patches of 256 pixels, and copies
        # them to the GPU, which has to wait
        self.made_in_place = "musiq" in name
        self.eval()

    def train(self, mode: bool = True) -> "FrozenMetric":
        return super().train(False)

    def forward(self, *images: Tensor) -> Tensor:
        self._check(images)
        grad = self.differentiable and torch.is_grad_enabled()
        device = images[0].device
        with torch.set_grad_enabled(grad), torch.autocast(device.type, enabled=False), \
                device if self.made_in_place else contextlib.nullcontext():
            images = tuple(x.float() for x in images)
            if self.one_by_one:
                single = zip(*(x.split(1) for x in images), strict=True)
                return self.sign * torch.cat([self._scores(*x) for x in single])
            return self.sign * self._scores(*images)

    def _scores(self, *images: Tensor) -> Tensor:
        scores, n = self.net(*images), len(images[0])
        scores = scores[0] if isinstance(scores, tuple | list) else scores
        if scores.numel() != n:  # pyiqa returns (N, 1), (N, 1, 1), (N,) or, for N = 1, ()
            raise ValueError(f"metric {self.name}: {tuple(scores.shape)} scores for {n} images")
        return scores.reshape(n).float()

    def _check(self, images: tuple[Tensor, ...]) -> None:
        problem = None
        for x in images:
            if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
                problem = f"needs float (N, 3, H, W), got {x.dtype} {tuple(x.shape)}"
            elif min(x.shape[2:]) < self.side:
                problem = f"needs at least {self.side} px a side, got {x.shape[3]}x{x.shape[2]}"
            elif x.device.type == "cpu" and not self.differentiable:  # a GPU would have to wait
                low, high = x.aminmax()
                if not (low >= -1e-3 and high <= 1 + 1e-3):  # so written, NaN fails too
                    problem = f"needs images in [0, 1], these span {low:.3g} to {high:.3g}"
        if problem:
            raise ValueError(f"metric {self.name}: {problem}")


def load_iqa(
    name: str, device: str | torch.device, weights: str | None = None, differentiable: bool = False
) -> FrozenMetric:
    """A no-reference predictor Q: (N, 3, H, W) float in [0, 1] -> (N,) float32, up = better.

    name:           a pyiqa NR metric, or "package.module:function" where function(weights=FILE) or
                    function() returns an nn.Module with the same contract; "@FILE" may follow
    weights:        the weight file, if it is not in the name
    differentiable: False: scores carry no graph (ordinary tensors, not inference ones), and images
                    on the CPU are checked to lie in [0, 1].
                    True: gradients reach the images, one score per image and never their mean, for
                    a loss (paper Eq. 5). The range is neither checked nor clamped then: an SR image
                    a little outside [0, 1] is scored as it is and keeps its gradient, whereas the
                    saved picture is clipped; a caller who wants the score of that clamps first.
    Lower-better metrics (NIQE, BRISQUE, ...) are negated here and nowhere else.
    Raises ValueError for a name or file that does not fit (FileNotFoundError if there is no such
    file), and MetricUnavailable where weights are missing and cannot be downloaded.
    """
    name, weights = _split(name, weights)
    if differentiable and _family(name) in NO_GRADIENT:
        raise ValueError(f"metric {name}: has no gradient; use a differentiable one such as musiq")
    if ":" in name:
        files = {weights: _checked_digest(weights)} if weights else {}
        net, sign = _build_own(name, weights).to(device), 1
    else:
        _need_files(name, weights, "NR")
        sign = -1 if _pyiqa_config(name, "NR").get("lower_better") else 1
        net, files = _build_pyiqa(name, weights, device)
    metric = FrozenMetric(net, name, sign, differentiable, _listed(files))
    if differentiable:
        _probe_gradient(metric, device)
    return metric


def load_fr(name: str, device: str | torch.device, weights: str | None = None) -> FrozenMetric:
    """A full-reference metric of pyiqa: two (N, 3, H, W) in [0, 1], SR first -> (N,) float32.

    pyiqa's own sign (LPIPS, ST-LPIPS, DISTS: lower is better), no gradient; else as `load_iqa`.
    """
    name, weights = _split(name, weights)
    _need_files(name, weights, "FR")
    _pyiqa_config(name, "FR")
    net, files = _build_pyiqa(name, weights, device)
    return FrozenMetric(net, name, weights=_listed(files))


def min_side(name: str) -> int:
    """Smallest side in pixels of the images that a metric takes; 1 for "module:function"."""
    name = name.partition("@")[0]
    if ":" in name:
        return 1
    return MIN_SIDES.get(name, MIN_SIDES.get(_family(name), 8))


def random_musiq(seed: int = 0) -> nn.Module:
    """MUSIQ (27 M parameters) with random weights, for tests, as "models.iqa:random_musiq"."""
    from pyiqa.archs.musiq_arch import MUSIQ

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MUSIQ(pretrained=False)
    with torch.no_grad():  # raw scores lie within about +-1.3; MUSIQ's own within 0..100
        net.head.weight.mul_(35)
        net.head.bias.mul_(35).add_(50)
    return net


def _split(name: str, weights: str | None) -> tuple[str, str | None]:
    bare, at, file = name.partition("@")
    if at and (weights or not file):
        raise ValueError(f"metric {name}: give one weight file, as NAME@FILE")
    weights = file or weights
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such weight file of metric {bare}")
    return bare, weights and str(weights)


def _family(name: str) -> str:
    """What stands before the first "-", "_" or "+": musiq of musiq-ava, clipiqa of clipiqa+."""
    return re.split(r"[-_+]", name)[0]


def _build_own(name: str, weights: str | None) -> nn.Module:
    module, _, function_name = name.partition(":")
    options = {"weights": weights} if weights else {}
    try:
        function = getattr(importlib.import_module(module), function_name)
        inspect.signature(function).bind(**options)
    except (ImportError, AttributeError, TypeError) as error:
        reason = f"{error}; write package.module:function, with or without @FILE"
        raise ValueError(f"metric {name}: {reason}") from error
    net = function(**options)
    if not isinstance(net, nn.Module):
        raise ValueError(f"metric {name}: returned a {type(net).__name__}, not an nn.Module")
    return net


def _need_files(name: str, weights: str | None, mode: str) -> None:
    """MetricUnavailable, without importing pyiqa, where a paper's metric cannot be had."""
    files = PAPER_FILES[mode].get(name, [])[bool(weights) :]  # one's own file stands for the first
    paths = [_caches()[file.startswith("models--")] / file for file in files]
    missing = [path for path in paths if not path.exists()]
    if missing and not _online():
        raise MetricUnavailable(f"metric {name}: no weights, {missing[0]} is missing; where there "
                                f"is a network, run: {PREFETCH} {name}")


def _pyiqa_config(name: str, mode: str | None) -> dict:
    """pyiqa's entry of a per-image metric of the given mode, "NR" or "FR" (None: either)."""
    try:
        from pyiqa.default_model_configs import DEFAULT_CONFIGS as configs
    except ImportError as error:
        raise MetricUnavailable(f"metric {name}: {error}; see requirements.txt") from error
    fitting = [n for n, c in configs.items()
               if mode in (None, c["metric_mode"]) and n not in NOT_PER_IMAGE]
    if name in fitting:
        return configs[name]
    if name in configs:
        kind = {"NR": "no-reference ", "FR": "full-reference "}.get(mode, "")
        raise ValueError(f"metric {name}: is not a {kind}metric of single images")
    close = difflib.get_close_matches(name, fitting, cutoff=0.5) or ["musiq"]
    raise ValueError(f"metric {name}: unknown to pyiqa; did you mean {', '.join(close)}?")


def _build_pyiqa(
    name: str, weights: str | None, device: str | torch.device
) -> tuple[nn.Module, dict[str, str]]:
    """pyiqa's network without pyiqa's wrapper, which switches gradients on or off, averages a loss
    over the batch, waits for the GPU to check the range, and leaves the sign alone; and the files
    that it was built from, {path: SHA-256}."""
    options, files = {}, {}
    if weights:
        if _family(name) in NO_WEIGHT_FILE:
            raise ValueError(f"metric {name}: takes no weight file; put its files into the cache "
                             f"folders with: {PREFETCH} {name}")
        options["pretrained_model_path"] = weights
        if name == "musiq-ava":
            options["num_class"] = 10  # pyiqa sets it for the download alone
    try:
        from pyiqa.models.inference_model import InferenceModel

        # pyiqa reports on stdout, which belongs to the scripts' tables.
        with contextlib.redirect_stdout(sys.stderr if _online() else io.StringIO()), _network(), \
                _guarded_loads(files):
            net = InferenceModel(name, device=torch.device(device), **options).net
    except RefusedFile:
        raise
    except Exception as error:  # urllib, huggingface_hub, timm and torch have each their own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        if isinstance(error, ImportError):
            package = "'setuptools<81'" if error.name == "pkg_resources" else error.name
            raise MetricUnavailable(f"metric {name}: {error}; pip install {package}") from error
        if weights and not isinstance(error, OSError):
            raise ValueError(f"{weights}: does not fit metric {name} ({reason})") from error
        raise MetricUnavailable(
            f"metric {name}: weights are not (whole) in {' or '.join(map(str, _caches()))} and "
            f"cannot be downloaded ({reason}); where there is a network, run: "
            f"{PREFETCH} {name}"
        ) from error
    if weights and _family(name) in LOOSELY_LOADED:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = state.get("params", state) if isinstance(state, dict) else {}
        elsewhere = LOOSELY_LOADED[_family(name)]
        needed = [k for k, _ in net.named_parameters() if not k.startswith(elsewhere)]
        missing = [k for k in needed if k not in state and f"module.{k}" not in state]
        if missing:
            raise ValueError(f"{weights}: does not fit metric {name} ({len(missing)} of "
                             f"{len(needed)} weights are absent, such as {missing[0]})")
    return net, files


def _checked_digest(path: str) -> str:
    """The SHA-256 of a file; RefusedFile if it is not the one that the file's name carries."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    named = NAMED_HASH.search(path)
    if named and not digest.hexdigest().startswith(named[1]):
        raise RefusedFile(f"{path}: truncated or not the public file, its SHA-256 is "
                          f"{digest.hexdigest()[:8]}; delete it and prefetch it again")
    return digest.hexdigest()


@contextlib.contextmanager
def _guarded_loads(files: dict[str, str]) -> Iterator[None]:
    """Check each file that is loaded meanwhile, and note it: {path: SHA-256}.

    pyiqa loads with weights_only=False; here torch.load unpickles nothing but plain tensors.
    """
    import scipy.io

    def guarded(load: Callable, **options: bool) -> Callable:
        def read(file: object, *args: object, **kwargs: object) -> object:
            path = str(getattr(file, "name", file))
            files[path] = _checked_digest(path)
            try:
                return load(file, *args, **kwargs | options)
            except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:120] or "empty"
                message = f"{path}: not a weight file of plain tensors ({reason})"
                raise RefusedFile(message) from error

        return read

    with mock.patch.object(torch, "load", guarded(torch.load, weights_only=True)), \
            mock.patch.object(scipy.io, "loadmat", guarded(scipy.io.loadmat)):
        yield


def _listed(files: dict[str, str]) -> str:
    return ", ".join(f"{os.path.basename(f)} sha256 {d[:12]}" for f, d in sorted(files.items()))


def _probe_gradient(metric: FrozenMetric, device: str | torch.device) -> None:
    """Refuse, before any training, a metric whose gradient is absent, zero or not finite."""
    side = max(128, metric.side)
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.enable_grad():
        score = metric(x.requires_grad_()).sum()
    grad = torch.autograd.grad(score, x)[0] if score.requires_grad else torch.zeros(1)
    if not grad.isfinite().all() or not grad.any():
        raise ValueError(f"metric {metric.name}: its gradient is absent, zero or not finite")


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Where there is no network, let no download be tried; caches stay readable.

    huggingface_hub (timm's backbones) would retry for a minute, and urllib (pyiqa's own files,
    torchvision, CLIP) wait for ever where packets are dropped.
    """
    if _online():
        yield
        return
    from huggingface_hub import constants

    refuse = mock.Mock(side_effect=OSError("no network, or HF_HUB_OFFLINE is set"))
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True), \
            mock.patch.object(socket, "create_connection", refuse):
        yield


@functools.cache
def _online() -> bool:
    """Whether the weight host (or the proxy on the way to it) answers; asked once per process."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    url = urllib.request.getproxies().get("https") or os.environ.get("HF_ENDPOINT")
    url = url or "https://huggingface.co"
    parts = urlparse(url if "://" in url else f"http://{url}")
    address = parts.hostname, parts.port or (80 if parts.scheme == "http" else 443)
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError), socket.create_connection(address, NETWORK_SECONDS):
            answered.set()

    # In a thread, because a name server that does not answer cannot be given a time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    return answered.is_set()


def _caches() -> list[Path]:
    """The folders that pyiqa, torchvision and CLIP, and huggingface_hub (timm) download to."""
    from huggingface_hub import constants

    return [Path(torch.hub.get_dir()), Path(constants.HF_HUB_CACHE)]


def _prefetch(name: str) -> None:
    """Download what a metric, or the perceptual loss "vgg19", loads; what is there is checked."""
    with _network():
        if name == "vgg19":
            path = _caches()[0] / "checkpoints" / os.path.basename(VGG19_URL)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.hub.download_url_to_file(VGG19_URL, str(path))
            _checked_digest(str(path))
        elif name == "qalign":  # 16 GB: downloaded, but not built
            importlib.import_module("huggingface_hub").snapshot_download("q-future/one-align")
        else:
            _pyiqa_config(name, None)
            _build_pyiqa(name, None, "cpu")


def main(argv: list[str] | None = None) -> None:
    """Let all weights of the metrics come to lie in one folder, or in the caches."""
    parser = argparse.ArgumentParser("python -m models.iqa", allow_abbrev=False)
    parser.add_argument("command", choices=["prefetch"], help="download the weights of metrics")
    parser.add_argument("names", nargs="*", metavar="NAME", help="pyiqa metrics; vgg19 is the "
                        "perceptual loss's (default: the paper's, " + " ".join(PAPER_NAMES) + ")")
    parser.add_argument("--into", metavar="DIR", help="folder for all files (default: the caches)")
    args = parser.parse_args(argv)
    if args.into:  # before huggingface_hub and pyiqa are imported, which fix their folders then
        os.environ.pop("HF_HUB_CACHE", None)
        os.environ["TORCH_HOME"] = os.path.abspath(os.path.join(args.into, "torch"))
        os.environ["HF_HOME"] = os.path.abspath(os.path.join(args.into, "huggingface"))
    problems = []
    for name in args.names or PAPER_NAMES:
        try:
            _prefetch(name)
            print(f"{name}: ready", flush=True)
        except (ValueError, OSError) as error:  # the others are fetched all the same
            problems.append(f"{name}: {' '.join(str(error).split())}")
    hub, hugging_face = _caches()
    print(f"For runs without a network: export TORCH_HOME={hub.parent} "
          f"HF_HOME={hugging_face.parent} HF_HUB_OFFLINE=1")
    if problems:
        raise ValueError("\n".join(problems))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        if os.environ.get("DEBUG"):
            raise
        for line in str(problem).splitlines():
            print(f"models/iqa.py: {line}", file=sys.stderr)
        sys.exit(2)
