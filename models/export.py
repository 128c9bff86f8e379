"""A network as a file for other programs: .pth, .pt and .safetensors as spandrel reads them (so
chaiNNer, ComfyUI and others), or .onnx.

    print(export(net, "out.pth"))

Also what a training run leaves beside its checkpoint: the same as .safetensors, a model card, and
adapters in PEFT's format. onnx and onnxscript are imported only where they are needed.
"""

import contextlib
import copy
import importlib.util
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import (
    check_finite,
    load_file,
    one_line,
    outer_keys,
    read_text,
    replacing,
    save_atomic,
    split_safetensors,
)
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.weights import names_in, pad_inputs


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


def write_weights(net: nn.Module, path: str | Path, like: str | Path | None = None,
                  about: dict[str, str] | None = None) -> None:
    """Write a network's weights: .pth, .pt as {"params_ema": ...}; .safetensors as bare tensors,
    with the network's name and scale as metadata.

    like: the file that the network came from, whose keys are taken, and those around them
    about: further metadata
    """
    path, names = Path(path), names_in(like) if like else {}
    state = {names.get(key, key): value.detach().cpu().clone(memory_format=torch.contiguous_format)
             for key, value in net.state_dict().items()}
    if path.suffix != ".safetensors":
        for key in reversed(outer_keys(load_file(like)) if like else ["params_ema"]):
            state = {key: state}
        save_atomic(state, path)
        return
    write_safetensors(state, path, {"architecture": type(net).__name__, "scale": "4"}
                      | (about or {}))


def write_safetensors(state: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    """Write tensors that share no memory, with metadata; equal arguments write equal files."""
    from safetensors.torch import save

    header, tensors = split_safetensors(save(state))
    about = {"format": "pt", "crc32": f"{zlib.crc32(tensors):08x}"} | about
    # The library would write the metadata in a random order
    text = json.dumps({"__metadata__": about} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def write_onnx(
    net: nn.Module, path: str | Path, size: tuple[int, int] | None = None
) -> float | None:
    """Write a network as ONNX: input "lq" (1, 3, H, W) in [0, 1], output "sr" (1, 3, 4H, 4W).

    size: (H, W) in LQ pixels of the only input that the file will take; None: any size (SwinIR: at
    least its window's side; the file pads to whole windows).
    Returns the largest difference between onnxruntime's and torch's output on random images of that
    size or of three; None without onnxruntime. Raises ValueError if a package is missing, if torch
    cannot export the network and if the outputs differ.
    """
    _need("onnx", "onnxscript")
    if not hasattr(torch.export.Dim, "DYNAMIC"):
        raise ValueError(f"{path}: torch {torch.__version__} is too old for it; 2.6 is needed")
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    window = net.window_size if isinstance(net, SwinIR) else 1
    x = torch.rand(1, 3, *(size or (3 * window + 16, 5 * window + 16)),
                   generator=torch.Generator().manual_seed(0))
    shapes, way = None, "write .safetensors"
    if size is None:
        way = f"give --onnx-size H W, or {way}"
        any_side = torch.export.Dim.DYNAMIC
        shapes = ({2: any_side, 3: any_side},)
        if window > 1:  # SwinIR's own padding has branches, which would fix the size
            pad_inputs(net, window)
    with torch.no_grad():
        net(x)
    for module in net.modules():  # SPAN sets its weights in each pass, which ends the export
        if hasattr(module, "update_params"):
            module.update_params = lambda: None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            program = torch.onnx.export(net, (x,), input_names=["lq"], output_names=["sr"],
                                        dynamo=True, dynamic_shapes=shapes, verbose=False)
    except Exception as error:  # torch's own, of many kinds, after hundreds of lines
        why = str(error.__cause__ or error).strip().partition("\n")[0][:160]
        raise ValueError(f"{path}: torch cannot export a {type(net).__name__} ({why}); {way}"
                         ) from error
    # What it will be given, also where that is not the traced size
    sizes = [size] if size else [(2 * window + 7, 3 * window + 9), (33, 17), (40, 48)]
    with replacing(path) as temporary:  # program.save would need a path that ends with .onnx
        temporary.write_bytes(program.model_proto.SerializeToString())
        if not importlib.util.find_spec("onnxruntime"):
            return None
        import onnxruntime

        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        try:
            return max(_onnx_difference(net, session, *size) for size in sizes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {way}") from error


def _onnx_difference(net: nn.Module, session: Any, h: int, w: int) -> float:
    """Largest difference of the outputs for a random image. ValueError where it is too large.

    session: onnxruntime's
    """
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x)
    try:
        sr = torch.from_numpy(session.run(None, {"lq": x.numpy()})[0])
        difference = (expected - sr).abs().max().item()
    except Exception as error:  # onnxruntime's own, and an output of another size
        raise ValueError(f"fails at {h} x {w} ({one_line(error, 160)})") from error
    if not difference < 1e-4:
        raise ValueError(f"onnxruntime's output differs by {difference:.1e} at {h} x {w}")
    return difference


def _need(*packages: str) -> None:
    if missing := [p for p in packages if not importlib.util.find_spec(p)]:
        raise ValueError(f"this file type needs: pip install {' '.join(missing)}")


# ------------------------------------------------------------------------- a run's result


def write_result(out: Path, net: nn.Module, checkpoint: dict, about: dict[str, str]) -> None:
    """Write net_g_ema.safetensors, card.md and, as the sign of a finished run, net_g_ema.pt.

    checkpoint: {"params_ema", "settings"}; net: whose weights these are, adapted or not
    about: "base", "data" and "steps" of the run. Nothing tells its folder: equal runs, equal files.
    """
    settings = checkpoint["settings"]
    write_safetensors(checkpoint["params_ema"], out / "net_g_ema.safetensors", {
        "architecture": type(net).__name__, "scale": "4"} | metadata(settings, about))
    files = "`net_g_ema.pt` and `net_g_ema.safetensors` hold the same weights"
    title = f"{type(net).__name__} x4, {settings['sampler']}"
    write_card(out / "card.md", title + ", fine-tuned" * ("lambda_q" in settings),
               type(net).__name__, f"{files}{spandrel_note(net)}.", settings, about)
    save_atomic(checkpoint, out / "net_g_ema.pt")


def metadata(settings: dict, about: dict[str, str]) -> dict[str, str]:
    """What a .safetensors file says of the run that made it."""
    return {"net": settings["net"], "sampler": settings["sampler"], "base": about["base"],
            "q": "+".join(settings["iqa"]) or "none", "steps": about["steps"]}


def write_card(path: Path, title: str, architecture: str, files: str, settings: dict,
               about: dict[str, str], results: str = "") -> None:
    """Write a model card of model_card.md.

    files: what lies beside it, in a sentence; settings: as in net_g_ema.pt; about: "base", "data",
    "steps", and of the data "licences" where they are known; results: Markdown
    """
    if "lambda_q" not in settings:
        method = "training on ground truths that a sampler chooses, Sec. 4.2"
        if not settings["lambda_p"] and not settings["lambda_a"]:
            method = "the initialisation, L1 alone, Sec. 5"
    else:
        method = "fine-tuning of all weights" if settings["full"] else (
            f"fine-tuning by adapters of rank {settings['lora_rank']}")
        method += ", Eq. 5"
    weights = {"lambda_l1": "L1", "lambda_p": f"perceptual ({settings['perceptual']})",
               "lambda_a": "GAN", "lambda_q": "Q"}
    names = ", ".join(f"`{name}`" for name in settings["iqa"])
    losses = [f"{settings[k]:g} {name}" for k, name in weights.items() if settings.get(k)]
    licences = "\n".join(f"- {line}" for line in _licences(settings, about))
    text = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8").format(
        title=title, architecture=architecture, files=files, method=method,
        sampler=settings["sampler"], losses=" + ".join(losses),
        q=f"{names}, whose score training raises, so it is no proof" if names else "none",
        results=f"\n{results}\n" if results else "",
        **about | {"licences": licences})
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _licences(settings: dict, about: dict[str, str]) -> list[str]:
    base = about["base"]
    known = ": BSD-3-Clause" * base.startswith("RealESRGAN_x4plus")
    lines = [] if base == "random weights" else [f"the base network, {base}{known}"]
    known = about.get("licences")
    lines.append("the training images" + (f": {known}" if known else ""))
    for name in settings["iqa"]:
        own = ":" in name
        known = ": EfficientNet-lite0's, Apache-2.0" * (name == "demo.photo_quality:q")
        lines.append(f"`{name}`, " + (f"its weights and what it learnt from{known}" if own else
                                      "its weights, and pyiqa: PolyForm Noncommercial"))
    if settings["lambda_p"] and settings["perceptual"] == "vgg19":
        lines.append("torchvision's VGG19, trained on ImageNet")
    return lines


# ------------------------------------------------------------------------- adapters, for PEFT


PEFT_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
PEFT_VARIANTS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias",
                 "fan_in_fan_out", "modules_to_save")


def write_adapter(folder: Path, net: nn.Module, lora: dict) -> str:
    """Write adapters as PEFT does: adapter_model.safetensors and adapter_config.json.

    net:  a network with the layers that they are for
    lora: {"lora": lora_state(), "rank", "alpha", "base_sha256"}
    Returns a report. A layer that PEFT would adapt otherwise leaves the folder unwritten.
    """
    state, names = {}, sorted({key.rpartition(".")[0] for key in lora["lora"]})
    for name in names:
        layer, a, b = net.get_submodule(name), *(lora["lora"][f"{name}.lora_{x}"] for x in "ab")
        if isinstance(layer, nn.Conv2d):  # k x k to `rank` channels, then 1 x 1
            if layer.groups > 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
                return f"{folder} is not written: PEFT has no adapters for {name}'s convolution"
            a, b = a.reshape(-1, *layer.weight.shape[1:]), b[..., None, None]
        state |= {f"base_model.model.{name}.lora_A.weight": a.contiguous(),
                  f"base_model.model.{name}.lora_B.weight": b.contiguous()}
    alpha = lora["alpha"]
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "bias": "none",
        "inference_mode": True, "r": lora["rank"], "lora_dropout": 0.0, "target_modules": names,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
    } | dict.fromkeys(PEFT_VARIANTS[:2], False)
    write_safetensors(state, folder / "adapter_model.safetensors",
                      {"base_sha256": lora["base_sha256"]})
    with replacing(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return f"wrote {folder}"


def read_adapter(path: str | Path) -> dict:
    """What lora.pt holds, from PEFT's adapter_model.safetensors and adapter_config.json beside it.

    base_sha256 is "" where another program wrote them. Raises ValueError naming a file that is not
    plain LoRA.
    """
    state, config_file = load_file(path), Path(path).with_name("adapter_config.json")
    about = split_safetensors(Path(path).read_bytes())[0].get("__metadata__", {})
    found = {key: PEFT_KEY.fullmatch(key) for key in state}
    if other := [key for key, match in found.items() if not match]:
        raise ValueError(f"{path}: {other[0]} is no weight of a LoRA adapter")
    try:
        config = json.loads(read_text(config_file))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if variants := [name for name in PEFT_VARIANTS if config.get(name)]:
            raise ValueError(f"{', '.join(variants)}: only plain LoRA is read")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config_file}: {one_line(error)}") from error
    return {
        "lora": {f"{match[1]}.lora_{match[2].lower()}": state[key].flatten(1)
                 for key, match in found.items()},
        "rank": rank, "alpha": alpha, "base_sha256": about.get("base_sha256", ""),
        "targets": sorted({match[1] for match in found.values()}),
    }
