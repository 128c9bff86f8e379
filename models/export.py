"""A network as a file for other programs: .pth, .pt and .safetensors as spandrel reads them (so
chaiNNer, ComfyUI and others), or .onnx.

    print(export(net, "out.pth"))

safetensors, and onnx with onnxscript, are imported only where they are needed.
"""

import copy
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import check_finite, replacing, save_atomic
from models.rrdb import RRDBNet
from models.swinir import SwinIR


def export(net: nn.Module, path: str, onnx_size: tuple[int, int] | None = None) -> str:
    """Write an x4 network in the format that the file's suffix names; returns a report.

    onnx_size: (H, W) in LQ pixels, the only input size that an .onnx will take; None: any.
    Raises ValueError for another suffix, a missing package and weights that are not finite.
    """
    check_finite(net.state_dict(), f"--export {path}")
    suffix = Path(path).suffix
    if suffix == ".onnx":
        difference = write_onnx(net, path, onnx_size)
        if difference is None:
            return f"wrote {path} (not run: onnxruntime is not installed)"
        return f"wrote {path} (run by onnxruntime, it differs from torch by {difference:.0e})"
    if suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"--export {path}: write .pth, .pt, .safetensors or .onnx")
    write_weights(net, path)
    return f"wrote {path}{spandrel_note(net)}"


def spandrel_note(net: nn.Module) -> str:
    """What to tell of a network that spandrel 0.4 cannot read; "" for one that it can.

    spandrel takes the width of SwinIR's tail and of RRDBNet's dense blocks for granted.
    """
    if isinstance(net, RRDBNet):
        setting, width, expected = "num_grow_ch", net.body[0].rdb1.conv1.out_channels, 32
    elif isinstance(net, SwinIR) and net.upsampler != "pixelshuffledirect":
        setting, width, expected = "num_feat", net.conv_last.in_channels, 64
    else:  # spandrel's own, or without such a tail
        return ""
    if width == expected:
        return ""
    return (f" (note: spandrel, and so chaiNNer and ComfyUI, will not read it: its {setting} is "
            f"{width}, not the public networks' {expected}; an .onnx file works)")


def write_weights(net: nn.Module, path: str | Path) -> None:
    """Write a network's weights: .pth, .pt as {"params_ema": ...}; .safetensors as bare tensors,
    with the network's name and scale as metadata."""
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    if path.suffix != ".safetensors":
        save_atomic({"params_ema": state}, path)
        return
    _need("safetensors")
    from safetensors.torch import save

    about = {"format": "pt", "architecture": type(net).__name__, "scale": "4"}
    with replacing(path) as temporary:  # safetensors' save_file makes a file only its owner reads
        temporary.write_bytes(save(state, metadata=about))


def write_onnx(
    net: nn.Module, path: str | Path, size: tuple[int, int] | None = None
) -> float | None:
    """Write a network as ONNX: input "lq" (1, 3, H, W) in [0, 1], output "sr" (1, 3, 4H, 4W).

    size: (H, W) in LQ pixels of the only input that the file will take; None: any size (SwinIR: at
    least its window's side; the file pads to whole windows).
    Returns the largest difference between onnxruntime's and torch's output on one random image;
    None without onnxruntime. Raises ValueError if a package is missing or the outputs differ.
    """
    _need("onnx", "onnxscript")
    if not hasattr(torch.export.Dim, "DYNAMIC"):
        raise ValueError(f"{path}: torch {torch.__version__} is too old for it; 2.6 is needed")
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    window = getattr(net, "window_size", 1)
    x = torch.rand(1, 3, *(size or (3 * window + 16, 5 * window + 16)),
                   generator=torch.Generator().manual_seed(0))
    shapes = None
    if size is None:
        any_side = torch.export.Dim.DYNAMIC
        net, shapes = _PadsItself(net, window).eval(), ({2: any_side, 3: any_side},)
    program = torch.onnx.export(net, (x,), input_names=["lq"], output_names=["sr"], dynamo=True,
                                dynamic_shapes=shapes, verbose=False)
    with replacing(path) as temporary:  # program.save would need a path that ends with .onnx
        temporary.write_bytes(program.model_proto.SerializeToString())
    if not importlib.util.find_spec("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = x if size else x[..., : 2 * window + 7, : 3 * window + 9]  # not the traced size
    with torch.no_grad():
        difference = (net(x) - torch.from_numpy(session.run(None, {"lq": x.numpy()})[0])).abs()
    if not difference.max() < 1e-4:
        raise ValueError(f"{path}: onnxruntime's output differs by {difference.max():.1e}")
    return difference.max().item()


class _PadsItself(nn.Module):
    """Pads to whole windows as SwinIR does, but without the branches that would fix the size."""

    def __init__(self, net: nn.Module, window: int):
        super().__init__()
        self.net, self.window = net, window

    def forward(self, lq: Tensor) -> Tensor:
        h, w = lq.shape[2:]
        if self.window == 1:
            return self.net(lq)
        for dim, size in ((2, h), (3, w)):
            i = torch.arange((size + self.window - 1) // self.window * self.window)
            lq = lq.index_select(dim, torch.minimum(i, 2 * (size - 1) - i))
        return self.net(lq)[:, :, : 4 * h, : 4 * w]


def _need(*packages: str) -> None:
    if missing := [p for p in packages if not importlib.util.find_spec(p)]:
        raise ValueError(f"this file type needs: pip install {' '.join(missing)}")
