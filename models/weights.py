"""Weight files: networks and discriminators from checkpoints, VGG19 and metrics from the caches.

A file that does not fit, or holds weights that are not finite, raises a one-line ValueError that
names it.
"""

import copy
import functools
import os
import re
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import check_finite, load_file, one_line, read_state
from models.iqa import PREFETCH, checked_digest, load_fr, load_iqa, online
from models.losses import VGG19_URL, VGG19Loss
from models.rrdb import RRDBNet, modern_name
from models.swinir import SwinIR


def load_net(path: str | Path) -> nn.Module:
    """The x4 network in a checkpoint, whose keys tell its kind and size: on the CPU, eval mode,
    frozen.

    SwinIR and RRDBNet are this project's; other networks from RGB to RGB are spandrel's, where it
    is installed. Raises ValueError for anything else, and for other scales.
    """
    state, kind = read_network(path)
    net = _build(kind, state, path) if kind else _build_other(state, path)
    return net.eval().requires_grad_(False)


def _build_other(state: dict[str, Tensor], path: str | Path) -> nn.Module:
    """A network of another architecture, by spandrel; it takes any image size."""
    what = (f"{path}: neither a SwinIR nor an RRDBNet checkpoint ({len(state)} weights, the first "
            f"{next(iter(state))})")
    for kind in (SwinIR, RRDBNet):
        further = [key for key in state if not kind.is_key(key)]
        if len(further) < len(state) / 2:
            what = (f"{path}: a {kind.__name__} but for {len(further)} further weights, as "
                    f"{further[0]}")
    try:
        found = _read_by_spandrel(state)
    except ImportError as error:
        raise ValueError(f"{what}; other networks need: pip install spandrel") from error
    except Exception as error:  # spandrel: UnsupportedModelError, and what odd shapes raise
        raise ValueError(f"{what}; spandrel does not know it ({one_line(error, 120)})") from error
    channels = found.input_channels, found.output_channels
    name = found.architecture.name
    if found.scale != 4 or channels != (3, 3):
        raise ValueError(f"{path}: {name} x{found.scale} of {channels[0]} to {channels[1]} "
                         "channels; only x4 of RGB is supported")
    # A copy: what spandrel's call keeps in its own could not be trained
    net, needs = copy.deepcopy(found.model).eval(), found.size_requirements
    check_finite(net.state_dict(), path)
    pad_inputs(net, needs.multiple_of, needs.minimum, needs.square)
    # spandrel may do more than to call the network, which training would not
    x = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            same = torch.allclose(net(x).clamp(0, 1), found(x), atol=1e-4)
        except Exception:  # whatever its code raises where it is called as others are
            same = False
    if not same:
        raise ValueError(f"{path}: spandrel runs {name} in a way of its own, which is not "
                         "supported")
    return net


def _read_by_spandrel(state: dict[str, Tensor]) -> Any:
    """spandrel's descriptor; a name that all keys begin with, as net_g., may be a trainer's."""
    import spandrel

    try:
        return spandrel.ModelLoader(device="cpu").load_from_state_dict(state)
    except spandrel.UnsupportedModelError:
        names = {key.partition(".")[0] for key in state}
        inner = {key.partition(".")[2]: value for key, value in state.items()}
        if len(names) > 1 or "" in inner:
            raise
        return _read_by_spandrel(inner)


def pad_inputs(net: nn.Module, multiple: int, minimum: int = 0, square: bool = False) -> None:
    """Make `net` pad a copy of its images right and below, and crop its output by as much.

    Padded sides are multiples of `multiple`, at least `minimum` (a multiple, too) and equal if
    `square`. The image is reflected (borders are not repeated), and where the reflection ends, its
    last row and column are repeated: spandrel's padding, to the number.
    """
    net.register_forward_pre_hook(functools.partial(_pad, multiple, minimum, square))
    net.register_forward_hook(_crop)  # hooks, as a deep copy keeps them


def _pad(multiple: int, minimum: int, square: bool, net: nn.Module, inputs: tuple[Tensor]
         ) -> Tensor:
    (lq,) = inputs
    net.lq_size = h, w = lq.shape[2:]
    if (multiple, minimum, square) == (1, 0, False):
        return lq.clone()  # RCAN writes to what it gets
    # ONNX would round a negative quotient to zero
    sides = [(side + multiple - 1) // multiple * multiple for side in (h, w)]
    if minimum:
        sides = [torch.sym_max(side, minimum) for side in sides]
    if square:
        sides = [torch.sym_max(*sides)] * 2
    for dim, size, padded in ((2, h, sides[0]), (3, w, sides[1])):
        if torch.compiler.is_compiling() or padded > size:  # an exported graph takes any size
            i = torch.arange(padded, device=lq.device)
            lq = lq.index_select(dim, torch.minimum(i, 2 * (size - 1) - i).clamp(min=0))
    return lq.clone() if lq is inputs[0] else lq


def _crop(net: nn.Module, _: tuple[Tensor], sr: Tensor) -> Tensor:
    h, w = net.lq_size
    return sr[..., : 4 * h, : 4 * w]


def read_network(path: str | Path) -> tuple[dict[str, Tensor], type | None]:
    """The weights in a file and whether they are a SwinIR's or an RRDBNet's; None: neither.

    Trainers such as Lightning put an attribute's name before each key, as net_g.conv_first.weight,
    and save other networks beside it. Averaged weights (ema in the name) are preferred. Raises
    ValueError where several networks are left to choose from, and for the last.pt of a fine-tuning
    by adapters, which are not merged there.
    """
    state, found = read_state(path), {}
    if any(key.endswith(".parametrizations.weight.0.lora_a") for key in state):
        raise ValueError(f"{path}: the state of a fine-tuning; its network is net_g_ema.pt beside "
                         "it, which is there once the run has ended")
    ends = "conv_first.weight", "model.0.weight"  # ESRGAN's old name
    for prefix in {key.removesuffix(end): None for key in state for end in ends
                   if key.endswith(end)}:
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for kind in (kind for kind in (SwinIR, RRDBNet) if kind.matches(part)):
            found[prefix] = part, kind
    averaged = {prefix: network for prefix, network in found.items()
                if re.search(r"(^|[._])ema([._]|$)", prefix)}
    candidates = averaged if len(found) > 1 and averaged else found
    if len(candidates) > 1:
        raise ValueError(f"{path}: holds several networks, {', '.join(candidates)}; save one alone")
    return next(iter(candidates.values()), (state, None))


def names_in(path: str | Path) -> dict[str, str]:
    """{this project's name of a weight: its name in a checkpoint}; ESRGAN's old files differ."""
    return {modern_name(key): key for key in read_network(path)[0]}


def load_like(net: nn.Module, path: str | Path, flag: str) -> nn.Module:
    """The network in a checkpoint, which must be of the kind and size of `net`; ready to train.

    flag: what asked for that network, for the message, as "--net swinir".
    """
    kind = type(net)
    state, found = read_network(path)
    if found is not kind:
        raise ValueError(f"{path}: not a {kind.__name__}, which {flag} is")
    loaded = _build(kind, state, path)
    # Parameters only: the stored attention masks may be for another image size
    shapes = {k: v.shape for k, v in net.named_parameters()}
    if shapes != {k: v.shape for k, v in loaded.named_parameters()}:
        raise ValueError(f"{path}: {kind.__name__} of another size than {flag}")
    return loaded


def _build(kind: type, state: dict[str, Tensor], path: str | Path) -> nn.Module:
    try:
        net = kind.from_state(state)
    except Exception as error:  # shapes that no network has make almost anything fail
        raise ValueError(f"{path}: {one_line(error, 300)}") from error
    check_finite(net.state_dict(), path)
    return net


def load_discriminator(net_d: nn.Module, path: str | Path) -> None:
    """Load a discriminator from a run's last.pt or a public net_d file into `net_d`."""
    data = load_file(path)
    state = data["net_d"] if "net_d" in data else read_state(path)
    try:
        net_d.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: holds no discriminator of this size for --init-d") from error
    check_finite(net_d.state_dict(), path)


def vgg19_state(file: str = "") -> dict[str, Tensor]:
    """torchvision's VGG19 for VGG19Loss: of a file, or from the torch hub cache or downloaded into
    it.

    Raises FileNotFoundError if it is missing and cannot be downloaded, ValueError if it is damaged
    or not VGG19's.
    """
    if file:
        state = read_state(file)
        try:
            VGG19Loss(state)
        except RuntimeError as error:
            raise ValueError(f"{file}: not the weights of torchvision's VGG19") from error
        return state
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(VGG19_URL))
    if not path.is_file():
        try:
            download(VGG19_URL, path, path.stem.split("-")[1])
        except (OSError, RuntimeError) as error:  # RuntimeError: another SHA-256
            raise FileNotFoundError(
                f"no VGG19 weights: {path} is missing and cannot be downloaded ({error}); on a "
                f"machine with a network, run: {PREFETCH} vgg19 (it fetches {VGG19_URL})"
            ) from error
    checked_digest(path)
    return load_file(path)


def download(url: str, path: Path, hash_prefix: str) -> None:
    """Download a file whose SHA-256 begins so ("": unchecked). OSError where it cannot be,
    RuntimeError for another SHA-256."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    # torch.hub has no time limit, and a cluster without a network may drop packets: ask first
    urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix or None)


def prefetch(name: str) -> None:
    """Download the weights of a pyiqa metric or of VGG19Loss ("vgg19"); check cached ones."""
    if name == "vgg19":
        vgg19_state()
    elif name == "qalign":  # 16 GB: downloaded, but not built
        from huggingface_hub import snapshot_download

        snapshot_download("q-future/one-align", local_files_only=not online())
    else:
        from pyiqa.default_model_configs import DEFAULT_CONFIGS

        full_reference = DEFAULT_CONFIGS.get(name, {}).get("metric_mode") == "FR"
        (load_fr if full_reference else load_iqa)(name, "cpu")
