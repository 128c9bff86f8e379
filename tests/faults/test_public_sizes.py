"""Every public x4 network, in its full size with random weights, is tuned and read by spandrel."""

import functools

import pytest
import spandrel
import torch
from make_data import make_hggt
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from test_train import TINY, call

import finetune_lora
from models.checkpoint import load_file, save_atomic
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.weights import load_net

L = dict(embed_dim=240, depths=(6,) * 9, num_heads=(8,) * 9, upsampler="nearest+conv",
         resi_connection="3conv")
S = dict(embed_dim=60, depths=(6,) * 4, num_heads=(6,) * 4, upsampler="pixelshuffledirect")
PUBLIC = {
    "RealESRGAN x4plus": RRDBNet,
    "x4plus anime 6B": functools.partial(RRDBNet, num_block=6),
    "ESRGAN, old names": RRDBNet,
    "SwinIR M": SwinIR,
    "SwinIR M GAN": functools.partial(SwinIR, upsampler="nearest+conv"),
    "SwinIR L": functools.partial(SwinIR, **L),
    "SwinIR S": functools.partial(SwinIR, **S),
    "SwinIR S, no buffers": functools.partial(SwinIR, **S),
    "Compact": functools.partial(SRVGGNetCompact, num_feat=64, num_conv=32, upscale=4),
}


def old_name(key):
    """ESRGAN's oldest name of an RRDBNet key, by hand."""
    if key.startswith("body."):
        _, block, rdb, conv, kind = key.split(".")
        return f"model.1.sub.{block}.{rdb.upper()}.{conv}.0.{kind}"
    name, kind = key.split(".")
    at = {"conv_first": "0", "conv_body": "1.sub.23", "conv_up1": "3", "conv_up2": "6",
          "conv_hr": "8", "conv_last": "10"}
    return f"model.{at[name]}.{kind}"


@pytest.mark.parametrize("kind", PUBLIC)
def test_a_tuned_file_has_the_keys_of_its_start_and_gives_spandrels_output(kind, tmp_path,
                                                                           monkeypatch):
    torch.manual_seed(0)
    state = PUBLIC[kind]().state_dict()
    if "old" in kind:
        state = {old_name(key): value for key, value in state.items()}
    if "no buffers" in kind:
        state = {key: value for key, value in state.items()
                 if not key.endswith(("attn_mask", "relative_position_index"))}
    save_atomic(state, tmp_path / "public.pth")
    make_hggt(tmp_path / "HGGT", n=2, size=64)
    flags = [f for f in TINY if f not in ("--net", "swinir_tiny")]
    call(finetune_lora, *flags, "--sampler", "rand", "--init", "public.pth", "--lora-rank", 4,
         "--steps", 1, "--batch-size", 1, "--lr", 0.01, "--ema-decay", 0, "--sample-every", 0,
         "--out", "tuned", cwd=tmp_path, monkeypatch=monkeypatch)

    tuned = load_file(tmp_path / "tuned/net_g_ema.pt")["params_ema"]
    whole = SwinIR(**S).state_dict() if "no buffers" in kind else state
    assert tuned.keys() == whole.keys()  # spandrel knows no SwinIR without its buffers
    moved = sum(not torch.equal(tuned[key], state[key]) for key in state)
    assert moved >= 30, moved
    torch.save(tuned, tmp_path / "tuned.pth")
    theirs = spandrel.ModelLoader("cpu").load_from_file(tmp_path / "tuned.pth")
    x = torch.rand(1, 3, 24, 16)
    with torch.no_grad():
        expected = load_net(tmp_path / "tuned.pth")(x)
        assert (theirs.model.eval()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
