"""The edge to pyiqa: image-quality predictors as frozen modules, up = better (paper Sec. 3, 4).

    load_iqa("musiq", device)                a no-reference (NR) metric of pyiqa; weights are taken
                                             from the cache folders, or downloaded
    load_iqa("musiq@FILE.pth", device)       the same with one's own weight file
    load_iqa("demo.quality:q@q.pt", device)  one's own: q(weights="q.pt") -> nn.Module,
                                             (N, 3, H, W) in [0, 1] -> (N,), up = better
    load_fr("lpips", device)                 a full-reference metric of pyiqa, its sign unchanged
    python -m models.iqa prefetch musiq nima      downloads weights, for machines without a network

The cache folders are TORCH_HOME (~/.cache/torch) and HF_HOME (~/.cache/huggingface); pyiqa fixes
them at its import, which happens at the first use of a pyiqa metric. Checked with pyiqa 0.1.16.
"""

import argparse
import contextlib
import difflib
import functools
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
from collections.abc import Iterator
from pathlib import Path
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
NETWORK_SECONDS = 3.0


class MetricUnavailable(OSError):
    """The metric exists, but its weights (or a package it needs) cannot be had on this machine."""


class FrozenMetric(nn.Module):
    """A frozen metric: (N, 3, H, W) float in [0, 1] (and references of that shape) -> (N,) float32.

    Always in eval mode, also below a parent in training (MUSIQ skips its normalisation and patches
    in training mode), and always in float32, also under autocast (bf16 moves MUSIQ by up to 0.55).
    Nothing in it is random: pyiqa's multi-crop metrics use a fixed grid of crops in eval mode.
    """

    def __init__(self, net: nn.Module, name: str, sign: int = 1, differentiable: bool = False):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.name, self.sign, self.differentiable = name, sign, differentiable
        self.side = min_side(name)
        self.one_by_one = name.startswith(("qalign", "qrealign"))  # they assert N = 1
        self.eval()

    def train(self, mode: bool = True) -> "FrozenMetric":
        return super().train(False)

    def forward(self, *images: Tensor) -> Tensor:
        self._check(images)
        grad = self.differentiable and torch.is_grad_enabled()
        with torch.set_grad_enabled(grad), torch.autocast(images[0].device.type, enabled=False):
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
        net, sign = _build_own(name, weights).to(device), 1
    else:
        config = _pyiqa_config(name, "NR")
        net, sign = _build_pyiqa(name, weights, device), -1 if config.get("lower_better") else 1
    metric = FrozenMetric(net, name, sign, differentiable)
    if differentiable:
        _probe_gradient(metric, device)
    return metric


def load_fr(name: str, device: str | torch.device, weights: str | None = None) -> FrozenMetric:
    """A full-reference metric of pyiqa: two (N, 3, H, W) in [0, 1], SR first -> (N,) float32.

    pyiqa's own sign (LPIPS, ST-LPIPS, DISTS: lower is better), no gradient; else as `load_iqa`.
    """
    name, weights = _split(name, weights)
    _pyiqa_config(name, "FR")
    return FrozenMetric(_build_pyiqa(name, weights, device), name)


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


def _build_pyiqa(name: str, weights: str | None, device: str | torch.device) -> nn.Module:
    """pyiqa's network without pyiqa's wrapper, which switches gradients on or off, averages a loss
    over the batch, waits for the GPU to check the range, and leaves the sign alone."""
    options = {}
    if weights:
        if _family(name) in NO_WEIGHT_FILE:
            raise ValueError(f"metric {name}: takes no weight file; put its files into the cache "
                             f"folders with: python -m models.iqa prefetch {name}")
        state = None if weights.endswith(".mat") else _read_weights(weights)
        options["pretrained_model_path"] = weights
        if name == "musiq-ava":
            options["num_class"] = 10  # pyiqa sets it for the download alone
    try:
        from pyiqa.models.inference_model import InferenceModel

        # pyiqa reports on stdout, which belongs to the scripts' tables.
        with contextlib.redirect_stdout(sys.stderr if _online() else io.StringIO()), _network():
            net = InferenceModel(name, device=torch.device(device), **options).net
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
            f"python -m models.iqa prefetch {name}"
        ) from error
    if weights and _family(name) in LOOSELY_LOADED:
        state = state.get("params", state) if isinstance(state, dict) else {}
        elsewhere = LOOSELY_LOADED[_family(name)]
        needed = [k for k, _ in net.named_parameters() if not k.startswith(elsewhere)]
        missing = [k for k in needed if k not in state and f"module.{k}" not in state]
        if missing:
            raise ValueError(f"{weights}: does not fit metric {name} ({len(missing)} of "
                             f"{len(needed)} weights are absent, such as {missing[0]})")
    return net


def _read_weights(path: str) -> object:
    """What pyiqa will unpickle from a weight file; refused if that is more than plain data."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "empty"
        raise ValueError(f"{path}: not a weight file of plain tensors ({reason})") from error


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
    """Let downloads fail within seconds where there is no network; caches stay readable.

    huggingface_hub (timm's backbones) would retry for a minute, and urllib (pyiqa's own files,
    torchvision, CLIP) wait for ever where packets are dropped.
    """
    if _online():
        yield
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    constants.HF_HUB_OFFLINE = True
    socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        socket.setdefaulttimeout(before[1])


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
    thread.join(2 * NETWORK_SECONDS)
    return answered.is_set()


def _caches() -> list[Path]:
    """The folders that pyiqa, torchvision and CLIP, and huggingface_hub (timm) download to."""
    from huggingface_hub import constants

    return [Path(torch.hub.get_dir()), Path(constants.HF_HUB_CACHE)]


def main(argv: list[str] | None = None) -> None:
    """Build each metric once, so that all its weights come to lie in the caches."""
    parser = argparse.ArgumentParser("python -m models.iqa", allow_abbrev=False)
    parser.add_argument("command", choices=["prefetch"], help="download the weights of metrics")
    parser.add_argument("names", nargs="+", metavar="NAME", help="pyiqa metrics, e.g. musiq lpips")
    for name in parser.parse_args(argv).names:
        _pyiqa_config(name, None)
        _build_pyiqa(name, None, "cpu")
        print(f"{name}: ready in {' and '.join(map(str, _caches()))}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        if os.environ.get("DEBUG"):
            raise
        print(f"models/iqa.py: {problem}", file=sys.stderr)
        sys.exit(2)
