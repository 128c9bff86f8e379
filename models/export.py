"""A network as a file for other programs: .pth, .pt and .safetensors as spandrel reads them (so
chaiNNer, ComfyUI and others), or .onnx.

    print(export(net, "out.pth"))

safetensors, and onnx with onnxscript, are imported only here, where they are needed.
"""

import copy
import importlib.util
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SWINIR_TAIL, RRDB_GROWTH = 64, 32  # channels that spandrel 0.4 assumes, whatever the file holds


def export(net: nn.Module, path: str, onnx_size: tuple[int, int] | None = None) -> str:
    """Write a SwinIR or an RRDBNet in the format that the file's suffix names; returns a report.

    onnx_size: (H, W) in LQ pixels, the only input size that an .onnx will take; None: any.
    Raises ValueError for another suffix, for a missing package and for a network that does not fit.
    """
    suffix = Path(path).suffix
    if suffix == ".onnx":
        difference = write_onnx(net, path, onnx_size)
        if difference is None:
            return f"wrote {path} (not run: onnxruntime is not installed)"
        return f"wrote {path} (run by onnxruntime, it differs from torch by {difference:.0e})"
    if suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"--export {path}: write .pth, .pt, .safetensors or .onnx")
    write_weights(net, path)
    return f"wrote {path}"


def padded_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network in the widths that spandrel can read: SwinIR's tail, RRDBNet's dense blocks.

    The channels added have zero weights and biases, so they stay zero through every leaky ReLU, and
    what reads them has zero weights for them: the output is equal up to the rounding of sums.
    state: of a SwinIR or an RRDBNet in the new spelling; the tensors' types are kept.
    Raises ValueError for a network that is wider than spandrel assumes.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    if "conv_before_upsample.0.weight" in state:
        now, then = len(state["conv_before_upsample.0.weight"]), SWINIR_TAIL
        layers = {"conv_before_upsample.0": [], "upsample.0": [(now, then)],
                  "upsample.2": [(now, then)], "conv_up1": [(now, then)],
                  "conv_up2": [(now, then)], "conv_hr": [(now, then)]}  # name: groups of inputs
        last = {"conv_last": [(now, then)]}  # its outputs stay
    else:
        now, then = len(state["body.0.rdb1.conv1.weight"]), RRDB_GROWTH
        feat = len(state["conv_first.weight"])
        blocks = sorted({k.rsplit(".", 2)[0] for k in state if ".rdb" in k})
        groups = {i: [(feat, feat)] + [(now, then)] * (i - 1) for i in range(1, 6)}
        layers = {f"{b}.conv{i}": groups[i] for b in blocks for i in range(1, 5)}
        last = {f"{b}.conv5": groups[5] for b in blocks}
    if now > then:
        raise ValueError(f"{now} channels where spandrel reads {then} at most; export to .onnx")
    if now == then:
        return state
    for name, inputs in (layers | last).items():
        if f"{name}.weight" not in state:  # of the other upsampler
            continue
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if inputs:
            parts = weight.split([a for a, _ in inputs], 1)
            weight = torch.cat([_grow(p, b - a, 1) for p, (a, b) in
                                zip(parts, inputs, strict=True)], 1)
        if name in layers:
            # Pixel shuffle's outputs run channel by channel, four places each: the last are new
            more = len(weight) // now * (then - now)
            weight, bias = _grow(weight, more, 0), _grow(bias, more, 0)
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
    return state


def _grow(x: Tensor, more: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = more
    return torch.cat([x, x.new_zeros(shape)], dim)


def write_weights(net: nn.Module, path: str | Path) -> None:
    """Write a SwinIR or an RRDBNet for spandrel: .pth, .pt as {"params_ema": ...}, .safetensors as
    bare tensors, with the network's name and scale as metadata."""
    path, state = Path(path), padded_state(net.state_dict())
    if path.suffix != ".safetensors":
        buffer = io.BytesIO()
        torch.save({"params_ema": state}, buffer)  # to a path, the file's bytes would hold its name
        _write(path, lambda temporary: Path(temporary).write_bytes(buffer.getbuffer()))
        return
    _need("safetensors")
    from safetensors.torch import save

    about = {"format": "pt", "architecture": type(net).__name__, "scale": "4"}
    data = save(state, metadata=about)  # its save_file makes a file that others may not read
    _write(path, lambda temporary: Path(temporary).write_bytes(data))


def write_onnx(
    net: nn.Module, path: str | Path, size: tuple[int, int] | None = None
) -> float | None:
    """Write a network as ONNX: input "lq" (1, 3, H, W) in [0, 1], output "sr" (1, 3, 4H, 4W).

    size: (H, W) in LQ pixels of the only input that the file will take; None: any size (SwinIR:
    from its window's side on; it is padded within the file).
    Returns the largest difference to torch on one random image, as onnxruntime computes it; None
    where that is not installed. Raises ValueError where a package is missing or the outputs differ.
    """
    _need("onnx", "onnxscript")
    if not hasattr(torch.export.Dim, "DYNAMIC"):
        raise ValueError(f"{path}: torch {torch.__version__} is too old for it; 2.6 is needed")
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    window = getattr(net, "window_size", 1)
    if window > 1:
        make_mask = net._mask.__globals__["shifted_window_mask"]
        net._mask = lambda h, w, device: make_mask(h, w, window, device)  # no cache by size
    x = torch.rand(1, 3, *(size or (3 * window + 16, 5 * window + 16)),
                   generator=torch.Generator().manual_seed(0))
    shapes = None
    if size is None:
        any_side = torch.export.Dim.DYNAMIC
        net, shapes = _PadsItself(net, window).eval(), ({2: any_side, 3: any_side},)
    program = torch.onnx.export(net, (x,), input_names=["lq"], output_names=["sr"], dynamo=True,
                                dynamic_shapes=shapes, verbose=False)
    _write(Path(path), program.save)
    if not importlib.util.find_spec("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = x if size else x[..., : 2 * window + 7, : 3 * window + 9]  # another than the traced size
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


def _write(path: Path, save: Callable[[str], object]) -> None:
    """save(temporary file), so that `path` is at every moment the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        save(str(temporary))
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
