"""Quality models of pyiqa as frozen modules; higher is better (paper Sec. 3, 4).

    load_iqa("musiq", device)                 a no-reference (NR) metric of pyiqa; its weights come
                                              from the cache folders or are downloaded
    load_iqa("musiq@FILE.pth", device)        the same with your own weight file
    load_iqa("demo.quality:q@q.pt", device)   your own model: q(weights="q.pt") -> nn.Module
    load_fr("lpips", device)                  a full-reference (FR) metric of pyiqa, sign unchanged

The cache folders are TORCH_HOME (~/.cache/torch) and HF_HOME (~/.cache/huggingface), as set when
pyiqa is imported, at the first use of one of its metrics. HF_HUB_OFFLINE=1 forbids any connection.
Weight files may hold nothing but tensors, and their content must match a SHA-256 in their name.
Checked with pyiqa 0.1.16.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import io
import os
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

# Smallest image side in pixels that a metric of pyiqa accepts, by name or by family (measured with
# pyiqa 0.1.16 and random weights). Metrics that resize accept any size; nrqm was not measured.
MIN_SIDES = {
    "musiq": 5, "liqe": 224, "clipiqa": 32, "clipiqa+_vitL14_512": 16, "dbcnn": 16, "brisque": 16,
    "wadiqam": 48, "niqe": 96, "pi": 104, "piqe": 8, "lpips": 32, "stlpips": 24,
}  # fmt: skip
# These score a set of images or need a caption: they give no quality of one image.
NOT_PER_IMAGE = ("fid", "sfid", "fid_dinov2", "inception_score", "clipscore")
# A random forest, rounding, a histogram or PIL stops the gradient or makes it zero.
NO_GRADIENT = ("nrqm", "pi", "piqe", "entropy", "qalign", "qrealign")
# pyiqa ignores a weight file of these, or (liqe) caches its text features, which then spoil the
# official weights.
NO_WEIGHT_FILE = ("piqe", "pi", "entropy", "liqe", "arniqa", "clipiqa", "qalign", "qrealign")
# pyiqa loads these files with strict=False, so it accepts any file. The parameters with the given
# prefix come from torchvision and are not in the file.
LOOSELY_LOADED = {"topiq": (), "metaiqa": (), "stlpips": (), "lpips": "net.", "dists": "stage"}
# Files of the paper's metrics below TORCH_HOME/hub or (models--*) below huggingface_hub's cache,
# without timm's backbones: a missing one is reported before pyiqa is imported, which takes seconds.
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
# The start of the SHA-256 that pyiqa, torchvision and torch hub put into a file's name; eight
# digits without a letter are a date.
NAMED_HASH = re.compile(r"-(?!\d{8}\.)([0-9a-f]{8})\.\w+$")
ANSWER_SECONDS, STALL_SECONDS = 1.5, 10  # time limits: of the network's answer, of a download's
PREFETCH = "python -m tools.prefetch"


class MetricUnavailable(OSError):
    """The metric exists, but this machine lacks its weights or a package that it needs."""


class RefusedFile(ValueError):
    """A weight file that is damaged, does not match its name, or holds more than tensors."""


class FrozenMetric(nn.Module):
    """A frozen metric: (N, 3, H, W) float in [0, 1] (and references of that shape) -> (N,) float32.

    Always in eval mode, even inside a parent that trains (in training mode MUSIQ skips its
    normalisation and its patches), and in float32: without autocast (bf16 moves MUSIQ by up to
    0.55), without TF32 unless `tf32` is set, which moves scores in the third digit. Deterministic:
    in eval mode pyiqa's multi-crop metrics use a fixed grid.
    files: the weight files, {path: SHA-256}; `weights` lists them for the heads of tables.
    """

    def __init__(self, net: nn.Module, name: str, sign: int = 1, differentiable: bool = False,
                 files: dict[str, str] | None = None):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.name, self.sign, self.differentiable = name, sign, differentiable
        self.side = min_side(name)
        self.weights = ", ".join(f"{os.path.basename(path)} sha256 {digest[:12]}"
                                 for path, digest in sorted((files or {}).items()))
        self.one_by_one = name.startswith(("qalign", "qrealign"))  # they assert N = 1
        # pyiqa's MUSIQ makes padding and masks (95 MB for 40 patches of 256 px) on torch's default
        # device, the CPU, and copies them to the GPU, which waits. Make them on the GPU instead.
        self.sets_default_device = "musiq" in name
        self.tf32 = False
        self.eval()

    def train(self, mode: bool = True) -> "FrozenMetric":
        return super().train(False)

    def forward(self, *images: Tensor) -> Tensor:
        self._check(images)
        grad = self.differentiable and torch.is_grad_enabled()
        device = images[0].device
        with torch.set_grad_enabled(grad), torch.autocast(device.type, enabled=False), \
                precision(self.tf32), \
                device if self.sets_default_device else contextlib.nullcontext():
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
                if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails too
                    problem = f"needs images in [0, 1], these span {low:.3g} to {high:.3g}"
        if problem:
            raise ValueError(f"metric {self.name}: {problem}")


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Run with or without TF32 in convolutions (cuDNN's default) and in matrix products."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32
    cudnn.allow_tf32 = products.allow_tf32 = tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, products.allow_tf32 = before


@functools.cache
def _prepare_musiq_once() -> None:
    """Make pyiqa's MUSIQ look up positions once per size, and pad only where a sequence is short.

    pyiqa computes the positions in each call, and appends a whole sequence of zeros (3 MB for each
    256-pixel patch) to cut it off again. Scores are equal.
    """
    from pyiqa.data import multiscale_trans_util as musiq

    def pad(x: Tensor, length: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, max(0, length - x.shape[-1])))[:, :, :length]

    positions = musiq.get_hashed_spatial_pos_emb_index
    on_device = functools.lru_cache(64)(lambda device, *size: positions(*size))

    @functools.wraps(positions)
    def positions_once(*size: int) -> Tensor:
        return on_device(torch.get_default_device(), *size)

    musiq.get_hashed_spatial_pos_emb_index = positions_once
    musiq._pad_or_cut_to_max_seq_len = pad


def load_iqa(name: str, device: str | torch.device, differentiable: bool = False) -> FrozenMetric:
    """A no-reference metric Q: (N, 3, H, W) float in [0, 1] -> (N,) float32, higher is better.

    name:           an NR metric of pyiqa, or "package.module:function" where function(weights=FILE)
                    or function() returns an nn.Module with the same contract; "@FILE" may follow
    differentiable: False: scores carry no graph (ordinary tensors, not inference tensors), and
                    images on the CPU must lie in [0, 1].
                    True: gradients reach the images, for a loss (paper Eq. 5) on per-image scores.
                    The range is neither checked nor clamped: an SR image that leaves it a little is
                    scored as it is and keeps its gradient, although the saved picture is clipped.
                    Clamp first for the score of the picture.
    The sign of lower-better metrics (NIQE, BRISQUE, ...) is flipped here and nowhere else.
    Raises ValueError for a name or file that does not fit, FileNotFoundError for a missing file,
    and MetricUnavailable if weights are missing and cannot be downloaded.
    """
    name, weights = _split(name)
    if differentiable and _family(name) in NO_GRADIENT:
        raise ValueError(f"metric {name}: has no gradient; use a differentiable one such as musiq")
    if ":" in name:
        files = {weights: checked_digest(weights)} if weights else {}
        net, sign = _build_own(name, weights).to(device), 1
    else:
        _require_files(name, weights, "NR")
        sign = -1 if _pyiqa_config(name, "NR").get("lower_better") else 1
        net, files = _build_pyiqa(name, weights, device)
    metric = FrozenMetric(net, name, sign, differentiable, files)
    if differentiable:
        _probe_gradient(metric, device)
    return metric


def load_fr(name: str, device: str | torch.device) -> FrozenMetric:
    """A full-reference metric of pyiqa: two (N, 3, H, W) in [0, 1], SR first -> (N,) float32.

    The sign is pyiqa's (lower is better for LPIPS, ST-LPIPS and DISTS), and there is no gradient.
    All else is as in `load_iqa`.
    """
    name, weights = _split(name)
    _require_files(name, weights, "FR")
    _pyiqa_config(name, "FR")
    net, files = _build_pyiqa(name, weights, device)
    return FrozenMetric(net, name, files=files)


def min_side(name: str) -> int:
    """Smallest image side in pixels that a metric accepts; 1 for "module:function"."""
    name = name.partition("@")[0]
    if ":" in name:
        return 1
    return MIN_SIDES.get(name, MIN_SIDES.get(_family(name), 8))


def random_musiq(seed: int = 0) -> nn.Module:
    """MUSIQ (27 M parameters) with random weights, for tests: "models.iqa:random_musiq"."""
    from pyiqa.archs.musiq_arch import MUSIQ

    _prepare_musiq_once()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MUSIQ(pretrained=False)
    with torch.no_grad():  # its scores, within about +-1.3, move into MUSIQ's range of 0 to 100
        net.head.weight.mul_(35)
        net.head.bias.mul_(35).add_(50)
    return net


def _split(name: str) -> tuple[str, str]:
    """"NAME@FILE" -> (NAME, FILE), where FILE exists; "NAME" -> (NAME, "")."""
    name, at, file = name.partition("@")
    if at and not file:
        raise ValueError(f"metric {name}@: write NAME@FILE, with a weight file")
    if file and not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such weight file of metric {name}")
    return name, file


def _family(name: str) -> str:
    """The part before the first "-", "_" or "+": musiq of musiq-ava, clipiqa of clipiqa+."""
    return re.split(r"[-_+]", name)[0]


def _build_own(name: str, weights: str) -> nn.Module:
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


def _probe_gradient(metric: FrozenMetric, device: str | torch.device) -> None:
    """Refuse, before any training, a metric whose gradient is absent, zero or not finite."""
    side = max(128, metric.side)
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.enable_grad():
        score = metric(x.requires_grad_()).sum()
    grad = torch.autograd.grad(score, x)[0] if score.requires_grad else torch.zeros(1)
    if not grad.isfinite().all() or not grad.any():
        raise ValueError(f"metric {metric.name}: its gradient is absent, zero or not finite")


def _require_files(name: str, weights: str, mode: str) -> None:
    """Raise MetricUnavailable if a file of a paper's metric is missing and there is no network."""
    files = PAPER_FILES[mode].get(name, [])[bool(weights) :]  # your own file replaces the first
    paths = [cache_folders()[file.startswith("models--")] / file for file in files]
    missing = [path for path in paths if not path.exists()]
    if missing and not online():
        raise MetricUnavailable(f"metric {name}: no weights, {missing[0]} is missing; on a machine "
                                f"with a network, run: {PREFETCH} {name}")


def _pyiqa_config(name: str, mode: str) -> dict:
    """pyiqa's settings of a metric of single images; mode: "NR" or "FR"."""
    try:
        from pyiqa.default_model_configs import DEFAULT_CONFIGS as configs
    except ImportError as error:
        raise MetricUnavailable(f"metric {name}: {error}; see requirements.txt") from error
    names = [n for n in configs if configs[n]["metric_mode"] == mode and n not in NOT_PER_IMAGE]
    if name not in configs:
        close = difflib.get_close_matches(name, names, cutoff=0.5) or ["musiq"]
        raise ValueError(f"metric {name}: unknown to pyiqa; did you mean {', '.join(close)}?")
    if name not in names:
        kind = "no-reference" if mode == "NR" else "full-reference"
        raise ValueError(f"metric {name}: is not a {kind} metric of single images")
    return configs[name]


def _build_pyiqa(name: str, weights: str, device: str | torch.device) -> tuple[nn.Module, dict]:
    """The network of a pyiqa metric, and the files that it was built from, {path: SHA-256}.

    pyiqa's wrapper is dropped: it switches gradients on or off, averages a loss over the batch,
    makes the GPU wait for a range check, and does not flip the sign.
    """
    if weights and _family(name) in NO_WEIGHT_FILE:
        raise ValueError(f"metric {name}: takes no weight file; download its files into the cache "
                         f"folders with: {PREFETCH} {name}")
    files, options = {}, {"pretrained_model_path": weights} if weights else {}
    if weights and name == "musiq-ava":
        options["num_class"] = 10  # pyiqa sets it for its own download only
    try:
        from pyiqa.models.inference_model import InferenceModel

        # pyiqa prints to stdout, where the scripts print their tables
        with contextlib.redirect_stdout(sys.stderr if online() else io.StringIO()), _guard(files):
            net = InferenceModel(name, device=torch.device(device), **options).net
        if _family(name) == "musiq":
            _prepare_musiq_once()
    except RefusedFile:
        raise
    except Exception as error:  # urllib, huggingface_hub, timm and torch each raise their own
        raise _build_error(error, name, weights) from error
    if weights and _family(name) in LOOSELY_LOADED:
        _check_keys(net, name, weights)
    return net, files


def _build_error(error: Exception, name: str, weights: str) -> Exception:
    """What to raise where pyiqa cannot build a metric: it lacks a package or weights."""
    if isinstance(error, ImportError):
        package = "'setuptools<81'" if error.name == "pkg_resources" else error.name
        return MetricUnavailable(f"metric {name}: {error}; pip install {package}")
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    if weights and not isinstance(error, OSError):
        return ValueError(f"{weights}: does not fit metric {name} ({reason})")
    folders = " or ".join(map(str, cache_folders()))
    return MetricUnavailable(f"metric {name}: weights are missing or incomplete in {folders} and "
                             f"cannot be downloaded ({reason}); on a machine with a network, run: "
                             f"{PREFETCH} {name}")


def _check_keys(net: nn.Module, name: str, weights: str) -> None:
    """Raise ValueError unless the file has all parameters that pyiqa takes from it."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = state.get("params", state) if isinstance(state, dict) else {}
    elsewhere = LOOSELY_LOADED[_family(name)]
    needed = [k for k, _ in net.named_parameters() if not k.startswith(elsewhere)]
    missing = [k for k in needed if k not in state and f"module.{k}" not in state]
    if missing:
        raise ValueError(f"{weights}: does not fit metric {name} ({len(missing)} of {len(needed)} "
                         f"weights are missing, such as {missing[0]})")


def checked_digest(path: str | Path) -> str:
    """SHA-256 of a file. Raises RefusedFile if the file's name carries another one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    named = NAMED_HASH.search(str(path))
    if named and not digest.hexdigest().startswith(named[1]):
        raise RefusedFile(f"{path}: truncated or not the public file, its SHA-256 begins with "
                          f"{digest.hexdigest()[:8]}; delete it and prefetch it again")
    return digest.hexdigest()


@contextlib.contextmanager
def _guard(files: dict[str, str]) -> Iterator[None]:
    """While pyiqa builds a metric: check and note each file, {path: SHA-256}; offline, no download.

    torch and scipy do not report which files they read, so both loaders are wrapped meanwhile.
    """
    import scipy.io
    from huggingface_hub import constants

    def checked(load: Callable, **options: bool) -> Callable:
        def checked_load(file: object, *args: object, **kwargs: object) -> object:
            path = str(getattr(file, "name", file))
            files[path] = checked_digest(path)
            try:
                return load(file, *args, **kwargs | options)
            except Exception as error:  # a foreign file raises almost anything
                reason = " ".join(str(error).split())[:120] or "empty"
                message = f"{path}: not a weight file of plain tensors ({reason})"
                raise RefusedFile(message) from error

        return checked_load

    class Refuse(urllib.request.BaseHandler):
        def default_open(self, request: urllib.request.Request) -> None:
            raise OSError("no network, or HF_HUB_OFFLINE is set")

    before = torch.load, scipy.io.loadmat, constants.HF_HUB_OFFLINE, urllib.request._opener
    time_limit = socket.getdefaulttimeout()
    torch.load = checked(torch.load, weights_only=True)  # pyiqa loads with weights_only=False
    scipy.io.loadmat = checked(scipy.io.loadmat)
    # timm downloads through huggingface_hub, which has a switch (without it, it would retry for a
    # minute). All others use urllib, which has no switch, and by default no time limit.
    socket.setdefaulttimeout(STALL_SECONDS)
    if not online():
        constants.HF_HUB_OFFLINE = True
        urllib.request.install_opener(urllib.request.build_opener(Refuse))
    try:
        yield
    finally:
        torch.load, scipy.io.loadmat, constants.HF_HUB_OFFLINE, urllib.request._opener = before
        socket.setdefaulttimeout(time_limit)


@functools.cache
def online() -> bool:
    """Whether Hugging Face or the proxy answers; asked once, and not at all if HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url = urllib.request.getproxies().get("https") or constants.ENDPOINT
    parts = urlparse(url if "://" in url else f"http://{url}")
    address = parts.hostname, parts.port or (80 if parts.scheme == "http" else 443)
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError), socket.create_connection(address, ANSWER_SECONDS):
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answered.is_set()


def cache_folders() -> tuple[Path, Path]:
    """Download folders of torch hub (pyiqa, torchvision, CLIP) and of huggingface_hub (timm)."""
    from huggingface_hub import constants

    return Path(torch.hub.get_dir()), Path(constants.HF_HUB_CACHE)
