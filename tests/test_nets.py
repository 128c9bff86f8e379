"""The three networks: names and shapes of the public checkpoints, and outputs that equal spandrel's
independent implementations of SwinIR and ESRGAN."""

import copy
import math
import re

import numpy as np
import pytest
import spandrel
import torch
from torch.overrides import TorchFunctionMode

from models import discriminator, swinir
from models.discriminator import UNetDiscriminatorSN
from models.rrdb import RRDBNet
from models.swinir import SwinIR

SWINIR_DEMO = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 2), upsampler="nearest+conv")
RRDB_DEMO = dict(num_feat=16, num_block=2, num_grow_ch=8)
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # spandrel's


def randomise(net):
    """Weights away from the initial ones: biases, LayerNorms and position tables count as well."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            spread = 0.7 if "bias_table" in name else 0.1 if p.ndim == 1 else p[0].numel() ** -0.5
            p.add_(spread * torch.randn(p.shape, generator=generator))
    return net.eval()


def image(h, w, batch=1):
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(h * 100 + w))


def independent(net):
    """spandrel's network with this one's weights; spandrel also infers the settings anew."""
    found = spandrel.ModelLoader(device="cpu").load_from_state_dict(dict(net.state_dict()))
    assert found.scale == 4
    return found.model.eval()


def layout(net):
    return [(k, tuple(v.shape), v.dtype) for k, v in net.state_dict().items()]


@torch.no_grad()
def assert_same_output(net, other, sizes):
    for h, w in sizes:
        a, b = net(image(h, w, 2)), other(image(h, w, 2))
        assert a.shape == b.shape == (2, 3, 4 * h, 4 * w)
        assert b.std() > 0.05  # the weights do something
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# SwinIR


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "nearest+conv"])
def test_swinir_full_has_the_public_keys_and_shapes(upsampler):
    net = SwinIR(upsampler=upsampler)
    other = independent(net)
    assert type(other).__module__.startswith("spandrel.architectures.SwinIR")
    assert layout(net) == layout(other)
    buffers = [name for name, _ in net.named_buffers() if name != "mean"]
    assert sum(name.endswith(".relative_position_index") for name in buffers) == 36
    assert sum(name.endswith(".attn_mask") for name in buffers) == 18 == len(buffers) - 36
    for name in buffers:
        assert torch.equal(net.get_buffer(name), other.get_buffer(name))
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert round(millions, 2) == (11.90 if upsampler == "pixelshuffle" else 11.72)


@pytest.mark.parametrize("settings", [
    dict(depths=(6,) * 4, embed_dim=60, num_heads=(6,) * 4, upsampler="pixelshuffledirect"),
    dict(depths=(6,) * 9, embed_dim=240, num_heads=(8,) * 9, upsampler="nearest+conv",
         resi_connection="3conv"),
], ids=["S", "L"])  # fmt: skip
def test_the_public_small_and_large_networks(settings):
    net = randomise(SwinIR(**settings))
    other = independent(net)
    assert layout(net) == layout(other)
    assert_same_output(net, other, [(17, 9)])
    state = {k: v for k, v in net.state_dict().items()
             if not k.endswith(("attn_mask", "relative_position_index"))}
    again = SwinIR.from_state(state).eval()  # files without the buffers, too
    assert layout(again) == layout(net)
    with torch.no_grad():
        assert torch.equal(again(image(9, 8)), net(image(9, 8)))


def test_swinir_full_output():
    net = randomise(SwinIR())
    assert_same_output(net, independent(net), [(16, 9)])


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "nearest+conv"])
def test_swinir_output(upsampler):
    net = randomise(SwinIR(img_size=16, **{**SWINIR_DEMO, "upsampler": upsampler}))
    # One window; img_size itself; multiples of 8; sides that need padding on either or both.
    assert_same_output(net, independent(net), [(8, 8), (16, 16), (24, 16), (13, 24), (9, 15)])


def test_swinir_window_4_and_other_settings():
    settings = dict(img_size=8, window_size=4, depths=(3, 1), embed_dim=12, num_heads=(3, 2))
    net = randomise(SwinIR(mlp_ratio=3, **settings))
    assert_same_output(net, independent(net), [(8, 8), (11, 6)])


def test_swinir_tiny_inputs():
    net = randomise(SwinIR(**SWINIR_DEMO))
    with torch.no_grad():
        for h, w in [(1, 1), (3, 5), (2, 9)]:
            lq = image(h, w)
            reflected = np.pad(lq.numpy(), ((0, 0), (0, 0), (0, -h % 8), (0, -w % 8)), "reflect")
            sr = net(lq)
            assert sr.shape == (1, 3, 4 * h, 4 * w)
            assert torch.equal(sr, net(torch.from_numpy(reflected))[..., : 4 * h, : 4 * w])


def test_shifted_window_mask_by_hand():
    # 2 x 4 pixels, windows of 2, shift 1: row 1 and column 3 are the wrapped ones.
    no = swinir.MASKED
    left = [[0, 0, no, no], [0, 0, no, no], [no, no, 0, 0], [no, no, 0, 0]]
    right = [[0 if i == j else no for j in range(4)] for i in range(4)]
    assert swinir.shifted_window_mask(2, 4, 2).tolist() == [left, right]


def test_masked_pairs_get_no_weight_and_no_denormal_one_yet_the_public_output():
    net, lq = randomise(SwinIR(**SWINIR_DEMO)), image(24, 32)
    with torch.no_grad():
        fast = net(lq)
        public = swinir.shifted_window_mask(24, 32, 8, masked=-100.0)
        assert torch.tensor([swinir.MASKED, -100.0]).exp().tolist()[0] == 0.0
        assert 0 < public.exp().min() < torch.finfo(torch.float32).tiny
        net._masks = dict.fromkeys(net._masks, public)
        assert torch.equal(fast, net(lq))
    assert net.layers[0].residual_group.blocks[1].attn_mask.min() == -100


def test_relative_position_index_by_hand():
    # Window 2: rows (dy + 1) * 3 + dx + 1 for the tokens (0, 0), (0, 1), (1, 0), (1, 1).
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert swinir.relative_position_index(2).tolist() == expected


def test_masks_are_built_once_per_size(monkeypatch):
    net = randomise(SwinIR(**SWINIR_DEMO))
    built = []
    build = swinir.shifted_window_mask

    def counted(h, w, *rest, **named):
        built.append((h, w))
        return build(h, w, *rest, **named)

    monkeypatch.setattr(swinir, "shifted_window_mask", counted)
    with torch.no_grad():
        first = net(image(16, 24))
        assert built == [(16, 24)]  # once for both shifted blocks
        net(image(11, 20))  # padded to the same size
        assert built == [(16, 24)]
        net(image(24, 16))
        assert built == [(16, 24), (24, 16)]
        assert torch.equal(net(image(16, 24)), first)
        assert torch.equal(copy.deepcopy(net)(image(16, 24)), first)
        assert len(built) == 2
        for n in range(1, 8):
            net(image(8, 8 * n))
        assert len(net._masks) == swinir.CACHED_MASKS
        assert torch.equal(net(image(16, 24)), first)
        monkeypatch.setattr(swinir, "LARGEST_KEPT_MASK", 4 * 64**2)
        net._masks.clear()
        for side in (16, 24):  # 4 windows, and 9, which are too many
            net(image(side, side))
            assert [key[:2] for key in net._masks] == [(16, 16)]
    assert layout(net) == layout(SwinIR(**SWINIR_DEMO))


def test_swinir_follows_device_and_dtype():
    net, lq = randomise(SwinIR(**SWINIR_DEMO)), image(8, 16)
    with torch.no_grad():
        single = net(lq)
        torch.testing.assert_close(net.double()(lq.double()).float(), single)
        half = net.bfloat16()(lq.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), single, rtol=0, atol=0.1)
        assert net.to("meta")(lq.bfloat16().to("meta")).shape == (1, 3, 32, 64)


def test_a_traced_swinir_builds_its_mask_for_any_size():
    """In a traced graph of any size nothing is cached, and the output is the same."""
    net = randomise(SwinIR(**SWINIR_DEMO))

    class Any(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            h, w = x.shape[2:]
            return self.net._mask(h, w, x.device)

    sides = torch.export.Dim("h", min=2, max=8), torch.export.Dim("w", min=2, max=8)
    shapes = ({2: 8 * sides[0], 3: 8 * sides[1]},)
    traced = torch.export.export(Any(), (image(24, 40),), dynamic_shapes=shapes, strict=False)
    assert not net._masks
    for h, w in ((24, 40), (16, 64)):
        mask = swinir.shifted_window_mask(h, w, 8)
        assert torch.equal(traced.module()(image(h, w)), mask)
        assert torch.equal(net._mask(h, w, torch.device("cpu")), mask)


def test_swinir_trains_after_inference_mode():
    net = SwinIR(**SWINIR_DEMO)
    with torch.inference_mode():
        net(image(8, 8))
    net(image(8, 8)).sum().backward()


@pytest.mark.parametrize(
    "settings",
    [
        dict(upscale=2),
        dict(resi_connection="2conv"),
        dict(upsampler="pixel"),
        dict(window_size=7),
        dict(img_size=60),
        dict(img_size=8),
        dict(depths=(2,)),
        dict(num_heads=(7,) * 6),
    ],
)
def test_swinir_refuses_settings(settings):
    with pytest.raises(ValueError, match="^SwinIR: [^\n]*$"):
        SwinIR(**settings)


# RRDBNet


def test_rrdb_full_has_the_public_keys_and_shapes():
    net = RRDBNet()
    convs = {"conv_first": (64, 3), "conv_last": (3, 64)}
    convs |= {name: (64, 64) for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr")}
    for n in range(23):
        for m in (1, 2, 3):
            for k in (1, 2, 3, 4, 5):
                convs[f"body.{n}.rdb{m}.conv{k}"] = (64 if k == 5 else 32, 64 + 32 * (k - 1))
    expected = {f"{name}.weight": (*c, 3, 3) for name, c in convs.items()}
    expected |= {f"{name}.bias": c[:1] for name, c in convs.items()}
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == expected
    assert sum(p.numel() for p in net.parameters()) == 16_697_987
    assert len(independent(net).state_dict()) == len(expected)


def test_rrdb_output():
    net = randomise(RRDBNet(num_feat=16, num_block=2))  # spandrel knows num_grow_ch 32 alone
    assert_same_output(net, independent(net), [(8, 8), (7, 12), (3, 5), (1, 1)])


def test_rrdb_initialisation():
    net = RRDBNet(num_block=1)
    conv = net.body[0].rdb2.conv3
    assert conv.weight.std().item() == pytest.approx(0.1 * math.sqrt(2 / (128 * 9)), rel=0.05)
    assert not conv.bias.any()


def old_esrgan_names(state):
    """ESRGAN's repository: RRDB_trunk and the like."""
    names = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2"}
    names["conv_hr"] = "HRconv"
    old = {}
    for key, value in state.items():
        key = re.sub(r"body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2", key)
        module, leaf = key.rsplit(".", 1)
        old[f"{names.get(module, module)}.{leaf}"] = value
    return old


def oldest_esrgan_names(state, num_block):
    """The first ESRGAN models: one nn.Sequential called model."""
    names = {"conv_first": "model.0", "conv_body": f"model.1.sub.{num_block}"}
    names |= {"conv_up1": "model.3", "conv_up2": "model.6", "conv_hr": "model.8"}
    names["conv_last"] = "model.10"
    old = {}
    for key, value in state.items():
        module, leaf = key.rsplit(".", 1)
        module = re.sub(r"body\.(\d+)\.rdb(\d)\.(conv\d)", r"model.1.sub.\1.RDB\2.\3.0", module)
        old[f"{names.get(module, module)}.{leaf}"] = value
    return old


def test_rrdb_loads_old_names():
    net = randomise(RRDBNet(**RRDB_DEMO))
    state = net.state_dict()
    # spandrel keeps the oldest names, so this checks the renaming above.
    first = independent(RRDBNet(num_feat=16, num_block=2))
    assert set(oldest_esrgan_names(state, 2)) == set(first.state_dict())
    for old in (old_esrgan_names(state), oldest_esrgan_names(state, 2)):
        assert not any(key.startswith("body.") for key in old)
        assert RRDBNet.matches(old)
        loaded = RRDBNet.from_state(old).state_dict()
        assert list(loaded) == list(state)
        assert all(torch.equal(loaded[k], state[k]) for k in state)


# Discriminator


def test_discriminator_has_the_public_keys_and_shapes():
    expected = {
        "conv0.weight": (64, 3, 3, 3),
        "conv0.bias": (64,),
        "conv1.weight_orig": (128, 64, 4, 4),
        "conv1.weight_u": (128,),
        "conv1.weight_v": (64 * 16,),
        "conv2.weight_orig": (256, 128, 4, 4),
        "conv2.weight_u": (256,),
        "conv2.weight_v": (128 * 16,),
        "conv3.weight_orig": (512, 256, 4, 4),
        "conv3.weight_u": (512,),
        "conv3.weight_v": (256 * 16,),
        "conv4.weight_orig": (256, 512, 3, 3),
        "conv4.weight_u": (256,),
        "conv4.weight_v": (512 * 9,),
        "conv5.weight_orig": (128, 256, 3, 3),
        "conv5.weight_u": (128,),
        "conv5.weight_v": (256 * 9,),
        "conv6.weight_orig": (64, 128, 3, 3),
        "conv6.weight_u": (64,),
        "conv6.weight_v": (128 * 9,),
        "conv7.weight_orig": (64, 64, 3, 3),
        "conv7.weight_u": (64,),
        "conv7.weight_v": (64 * 9,),
        "conv8.weight_orig": (64, 64, 3, 3),
        "conv8.weight_u": (64,),
        "conv8.weight_v": (64 * 9,),
        "conv9.weight": (1, 64, 3, 3),
        "conv9.bias": (1,),
    }
    state = UNetDiscriminatorSN().state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == expected


@pytest.mark.parametrize("skip_connection", [True, False])
def test_discriminator_by_hand(skip_connection):
    """All weights one, conv0 a constant one: far from the border each layer is one factor.

    A convolution of ones from i to o channels over t taps gives i * t, and its spectral norm is
    sqrt(i * o * t): 2 sqrt(2) for the halvings, 3 sqrt(2) for conv4 to conv6, 3 for conv7, conv8.
    """
    net = UNetDiscriminatorSN(num_feat=1, skip_connection=skip_connection)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
        net.conv0.weight.zero_()
        logits = net(image(128, 136))
    down, up, skip = 8**0.5, 18**0.5, float(skip_connection)
    x4 = up * down**3 + skip * down**2
    x6 = up * (up * x4 + skip * down) + skip
    assert logits.shape == (1, 1, 128, 136)
    assert float(logits[0, 0, 64, 68]) == pytest.approx(9 * 3 * 3 * x6 + 1, rel=1e-5)


def test_discriminator_upsampling_by_hand():
    doubled = discriminator.upsample2(torch.tensor([[[[0.0, 1.0]]]]))
    assert doubled.tolist() == [[[[0.0, 0.25, 0.75, 1.0]] * 2]]


def test_discriminator_needs_sides_that_divide_by_8():
    net = UNetDiscriminatorSN(num_feat=2)
    with pytest.raises(ValueError, match="32x36 px; sides must divide by 8"):
        net(image(32, 36))


def test_discriminator_state_round_trip():
    net = UNetDiscriminatorSN(num_feat=2)
    net(image(16, 16)).sum().backward()  # moves u and v
    other = UNetDiscriminatorSN(num_feat=2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(image(16, 24)), net.eval()(image(16, 24)))


# All


@pytest.mark.parametrize(
    "net, size",
    [
        (SwinIR(**SWINIR_DEMO), (3, 5)),
        (SwinIR(**{**SWINIR_DEMO, "upsampler": "pixelshuffle"}), (9, 16)),
        (RRDBNet(**RRDB_DEMO), (3, 5)),
        (UNetDiscriminatorSN(num_feat=12), (16, 24)),
    ],
    ids=["swinir", "swinir-pixelshuffle", "rrdb", "discriminator"],
)
def test_gradients_reach_every_parameter(net, size):
    # Two forwards before one backward, as a discriminator step does.
    (net(image(*size)).square().mean() - net(1 - image(*size)).mean()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize(
    "net",
    [
        SwinIR(**SWINIR_DEMO),
        SwinIR(img_size=24, window_size=4, depths=(1, 3, 2), embed_dim=12, num_heads=(1, 2, 3)),
        SwinIR(depths=(1,), embed_dim=6, num_heads=(3,), mlp_ratio=1.5, num_feat=12),
        RRDBNet(**RRDB_DEMO),
    ],
    ids=["swinir-demo", "swinir-window-4", "swinir-unshifted", "rrdb"],
)
def test_from_state_round_trip(net):
    state = randomise(net).state_dict()
    kind, other_kind = (SwinIR, RRDBNet) if isinstance(net, SwinIR) else (RRDBNet, SwinIR)
    assert kind.matches(state) and not other_kind.matches(state)
    again = kind.from_state(state).eval()
    assert layout(again) == layout(net)
    with torch.no_grad():
        assert torch.equal(again(image(7, 9)), net(image(7, 9)))


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def test_from_state_refuses_what_does_not_fit():
    swin, rrdb = SwinIR(**SWINIR_DEMO).state_dict(), RRDBNet(**RRDB_DEMO).state_dict()
    shuffle = SwinIR(embed_dim=12, depths=(2,), num_heads=(2,), num_feat=8).state_dict()
    other_kind = [
        (SwinIR, {}, "not a SwinIR state dict: 0 keys"),
        (SwinIR, rrdb, "not a SwinIR state dict: .*'conv_first.weight'"),
        (RRDBNet, swin, "not an RRDBNet state dict: .*'conv_first.weight'"),
        (SwinIR, without(swin, "conv_before_upsample.0.weight"), "missing 'conv_before_upsample"),
        (SwinIR, without(swin, "conv_up2.weight"), "a SwinIR x2; only x4 is supported"),
        (SwinIR, without(shuffle, "upsample.2.weight"), "a SwinIR x2; only x4 is supported"),
        (SwinIR, shuffle | {"upsample.4.weight": torch.zeros(1)}, "a SwinIR x8; only x4"),
        (RRDBNet, without(rrdb, "conv_up2.weight"), "of x2; only x4 is supported"),
        (RRDBNet, rrdb | {"conv_up3.weight": torch.zeros(1)}, "of x8; only x4 is supported"),
        (RRDBNet, rrdb | {"conv_first.weight": torch.zeros(16, 12, 3, 3)}, "12 input channels"),
    ]
    for kind, state, message in other_kind:
        with pytest.raises(ValueError, match=message) as error:
            kind.from_state(state)
        assert "\n" not in str(error.value)
    no_norm1 = {k: v for k, v in swin.items() if ".norm1." not in k}
    other_keys = [
        (SwinIR, without(swin, "norm.bias"), 'SwinIR:.*Missing key.*: "norm.bias"'),
        (SwinIR, swin | {"conv_up3.weight": torch.zeros(1)}, 'Unexpected key.*"conv_up3.weight"'),
        (SwinIR, swin | {"conv_last.bias": torch.zeros(1)}, r"for conv_last.bias:.*\[1\].*\[3\]"),
        (SwinIR, no_norm1, 'Missing key.*"layers.0.residual_group.blocks.0.norm1.weight"'),
        (RRDBNet, without(rrdb, "conv_hr.bias"), 'RRDBNet:.*Missing key.*: "conv_hr.bias"'),
        (RRDBNet, rrdb | {"body.2.rdb1.conv1.bias": torch.zeros(8)}, 'Missing key.*"body.2.rdb1'),
    ]
    for kind, state, message in other_keys:
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            kind.from_state(state)


def test_rrdb_refuses_other_scales():
    with pytest.raises(ValueError, match="scale 2; only 4"):
        RRDBNet(scale=2)


def test_spectral_norm_is_torchs_and_its_sigma_is_float32_under_autocast(monkeypatch):
    torch.manual_seed(0)
    conv = discriminator.SpectralConv2d(6, 8, kernel=4, stride=2)
    torch.manual_seed(0)
    theirs = torch.nn.utils.spectral_norm(torch.nn.Conv2d(6, 8, 4, 2, 1, bias=False))
    for _ in range(3):  # each training pass takes a step of power iteration
        x = torch.rand(2, 6, 16, 16)
        assert torch.equal(conv(x), theirs(x))
    assert list(conv.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(conv.state_dict().values(),
                                                 theirs.state_dict().values(), strict=True))
    assert torch.equal(conv.eval()(x), theirs.eval()(x))
    # Under autocast on a GPU torch.mv would be bfloat16
    seen, mv = [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda *args: (
        seen.append((args[0].dtype, torch.is_autocast_enabled("cpu"))), mv(*args))[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.train()(x).dtype == torch.bfloat16
    assert seen == [(torch.float32, False)] * 3


def test_stochastic_depth_drops_whole_branches_as_often_as_it_should():
    branches = swinir.stochastic_depth(0, range(4000), (6,) * 6)
    assert branches.shape == (4000, 36, 2) and branches.dtype == torch.float32
    rate = torch.linspace(0, 0.1, 36, dtype=torch.float64)[:, None]
    dropped = (branches == 0).double().mean(0)
    assert ((dropped - rate).abs() <= 4 * (rate * (1 - rate) / 4000).sqrt()).all()
    assert (dropped[0] == 0).all()
    kept = branches.double().where(branches > 0, torch.nan)
    assert torch.allclose(kept.nanmean(0), (1 / (1 - rate)).expand(36, 2))
    again = swinir.stochastic_depth(0, [7, 3], (6,) * 6)
    assert torch.equal(again, branches[[7, 3]])  # a function of the draw alone
    assert not torch.equal(swinir.stochastic_depth(1, [7, 3], (6,) * 6), again)


def test_a_dropped_branch_adds_nothing_and_a_kept_one_is_scaled():
    torch.manual_seed(0)
    net = SwinIR(embed_dim=12, depths=(2, 2), num_heads=(2, 2), num_feat=8)
    x, ones = torch.rand(3, 3, 16, 16), torch.ones(3, 4, 2)
    assert torch.equal(net(x, ones), net(x))
    block = net.layers[1].residual_group["blocks"][0]
    branches = ones.clone()
    branches[1, 2] = torch.tensor([0.0, 1.25])  # second sample, third block
    mixed = net(x, branches)
    assert torch.equal(mixed[[0, 2]], net(x)[[0, 2]]) and not torch.equal(mixed[1], net(x)[1])
    with torch.no_grad():  # the same by hand: no attention, 1.25 times the MLP
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.zero_()
        block.mlp.fc2.weight.mul_(1.25)
        block.mlp.fc2.bias.mul_(1.25)
        torch.testing.assert_close(net(x)[1], mixed[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_equals_the_plain_one(dtype, masked):
    generator = torch.Generator().manual_seed(0)
    b, n, h, t, d = 2, 4, 3, 64, 30  # heads of 30 channels, as the paper's SwinIR
    q, k, v = (torch.randn(b, n, h, t, d, generator=generator) for _ in range(3))
    bias = torch.randn(h, t, t, generator=generator)
    mask = swinir.shifted_window_mask(16, 16, 8).to(dtype) if masked else None
    results = {}
    for function in (swinir.plain_attention, swinir.fused_attention):
        inputs = [x.to(dtype).requires_grad_() for x in (0.2 * q, k, v, bias)]
        output = function(*inputs, mask)
        (output.float() * torch.linspace(-1, 1, d)).sum().backward()
        results[function] = output.float(), *(x.grad.float() for x in inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for plain, fused in zip(*results.values(), strict=True):
        assert plain.shape == fused.shape
        assert (plain - fused).abs().max() <= tolerance * max(1, plain.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_adds_the_mask_in_its_inputs_type(dtype):
    q = torch.rand(2, 4, 3, 64, 30, dtype=dtype)
    bias, mask, added = torch.randn(3, 64, 64), swinir.shifted_window_mask(16, 16, 8), []

    class Additions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.Tensor.add:
                added.append(result)
            return result

    with Additions():
        swinir.fused_attention(q, q, q, bias, mask)
    (result,) = added
    assert result.dtype == dtype
    near = (mask == 0)[:, None].expand_as(result)
    assert torch.equal(result[near], (bias + mask[:, None]).to(dtype)[near])
    assert result[~near].max() < -900


@pytest.mark.parametrize("device, expected", [("cpu", "plain_attention"),
                                              ("cuda", "fused_attention")])
def test_a_gpu_takes_the_fused_attention(monkeypatch, device, expected):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **_: x)  # looks at values
    monkeypatch.setattr(swinir, ({"plain_attention", "fused_attention"} - {expected}).pop(), None)
    monkeypatch.setattr(swinir, expected, lambda q, k, v, bias, mask: 0 * v)
    mode = FakeTensorMode()
    with mode, torch.device(device):
        attention = swinir.WindowAttention(60, 8, 2)
        x = attention(torch.rand(2, 4, 64, 60), swinir.shifted_window_mask(16, 16, 8))
    assert x.shape == (2, 4, 64, 60)
    # More blocks than a kernel can start in one dimension: a photo of a megapixel
    monkeypatch.setattr(swinir, "plain_attention", lambda q, k, v, bias, mask: 0 * v)
    monkeypatch.setattr(swinir, "fused_attention", None)
    with mode, torch.device(device):
        assert attention(torch.rand(1, 2**15, 64, 60), None).shape == (1, 2**15, 64, 60)
