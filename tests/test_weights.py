"""Networks, discriminators and VGG19 from files: what loads, and what is refused in one line."""

import copy
import functools
import hashlib
import sys
import time
import urllib.error

import pytest
import spandrel
import torch
import torchvision
from spandrel.__helpers.size_req import pad_tensor
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from spandrel.architectures.ESRGAN import ESRGAN as PublicRRDB
from spandrel.architectures.HAT import HAT
from spandrel.architectures.MMRealSR import MMRealSR
from spandrel.architectures.RCAN import RCAN
from spandrel.architectures.SAFMN import SAFMN
from spandrel.architectures.SwinIR import SwinIR as PublicSwinIR

from models import weights
from models.checkpoint import save_atomic
from models.discriminator import UNetDiscriminatorSN
from models.export import write_onnx
from models.lora import add_lora, merge_lora
from models.losses import VGG19_URL
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.weights import load_discriminator, load_like, load_net, read_network, vgg19_state

SWINIR = dict(embed_dim=12, depths=(2,), num_heads=(2,), img_size=16)
RRDB = dict(num_feat=8, num_block=1, num_grow_ch=4)


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    assert all(str(part) in text for part in parts), text


@pytest.mark.parametrize("net", [SwinIR(**SWINIR), RRDBNet(**RRDB)], ids=["swinir", "rrdb"])
@pytest.mark.parametrize("wrapping", ["params_ema", "params", None])
def test_load_net_tells_the_kind_and_gives_a_frozen_net(net, wrapping, tmp_path):
    state = net.state_dict()
    save_atomic({wrapping: state} if wrapping else state, tmp_path / "net.pth")
    loaded = load_net(tmp_path / "net.pth")
    assert type(loaded) is type(net) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    lq = torch.rand(1, 3, 9, 14)
    with torch.no_grad():
        assert torch.equal(loaded(lq), net.eval()(lq)) and loaded(lq).shape == (1, 3, 36, 56)


def refused():
    swin, rrdb = SwinIR(**SWINIR).state_dict(), RRDBNet(**RRDB).state_dict()
    settings = dict(embed_dim=12, depths=(2,), num_heads=(2,), img_size=16, window_size=8,
                    mlp_ratio=2, resi_connection="1conv")

    def public(upscale, upsampler):
        return PublicSwinIR(upscale=upscale, upsampler=upsampler, **settings).state_dict()

    table = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"
    yield "foreign", torch.nn.Linear(2, 2).state_dict(), "neither a SwinIR nor an RRDBNet"
    yield "cut", {k: v for k, v in swin.items() if "conv_last" not in k}, '"conv_last.weight"'
    yield "more", swin | {"conv_up3.weight": torch.zeros(1)}, '"conv_up3.weight"'
    yield "shape", swin | {"conv_last.bias": torch.zeros(1)}, "for conv_last.bias"
    yield "absurd", swin | {table: torch.zeros(3)}, "index"
    yield "heads", swin | {table: torch.zeros(225, 0)}, "ZeroDivisionError"
    yield "blocks", rrdb | {"body.2.rdb1.conv1.bias": torch.zeros(8)}, '"body.1.rdb1.conv1.weight"'
    # other scales
    yield "rrdb_x2", rrdb | {"conv_first.weight": torch.zeros(8, 12, 3, 3)}, "12 input channels"
    esrgan = functools.partial(PublicRRDB, num_filters=8, num_blocks=1)
    for scale in (1, 2, 8, 16):
        yield f"rrdb_x{scale}_old_names", esrgan(scale=scale).state_dict(), f"of x{scale}; only x4"
    more = {f"conv_up3.{k}": rrdb[f"conv_up2.{k}"] for k in ("weight", "bias")}
    yield "rrdb_x8", rrdb | more, "of x8; only x4"
    yield "swinir_x2", public(2, "pixelshuffle"), "a SwinIR x2; only x4 is supported"
    yield "swinir_x3", public(3, "pixelshuffle"), "a SwinIR x3; only x4 is supported"
    yield "swinir_x8", public(8, "pixelshuffle"), "a SwinIR x8; only x4 is supported"
    yield "light_x2", public(2, "pixelshuffledirect"), "a SwinIR x2; only x4 is supported"
    compact = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=2)
    yield "compact_x2", compact.state_dict(), "RealESRGAN Compact x2 of 3 to 3 channels; only x4"


def test_other_networks_are_spandrels(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4)
    save_atomic({"params": net.state_dict()}, tmp_path / "compact.pth")
    loaded = load_net(tmp_path / "compact.pth")
    assert list(loaded.state_dict()) == list(net.state_dict())
    assert torch.equal(loaded(torch.ones(1, 3, 5, 7)), net.eval()(torch.ones(1, 3, 5, 7)))
    monkeypatch.setitem(sys.modules, "spandrel", None)  # its import raises
    with pytest.raises(ValueError) as error:
        load_net(tmp_path / "compact.pth")
    one_line(error, "compact.pth", "other networks need: pip install spandrel")


def other(kind, path, **settings):
    """A small network of another architecture in a file, as spandrel makes it."""
    torch.manual_seed(0)
    save_atomic({"params": kind(**settings).state_dict()}, path)
    return path


def test_networks_with_swinirs_or_rrdbnets_keys_and_others_are_spandrels(tmp_path):
    hat = other(HAT, tmp_path / "hat.pth", upscale=4, embed_dim=60, depths=[1], num_heads=[2],
                window_size=16, compress_ratio=3, squeeze_factor=30,
                upsampler="pixelshuffle")
    plus = other(PublicRRDB, tmp_path / "plus.pth", num_filters=8, num_blocks=1, plus=True)
    for path, net in ((hat, HAT), (plus, PublicRRDB)):
        assert isinstance(load_net(path), net) and read_network(path)[1] is None


@pytest.mark.parametrize("needs", [(4, 16, False), (8, 8, True), (1, 0, True), (3, 0, False)])
@pytest.mark.parametrize("size", [(5, 7), (16, 16), (17, 9), (1, 30)])
def test_padding_is_spandrels(needs, size):
    multiple, minimum, square = needs
    net = torch.nn.Upsample(scale_factor=4)
    weights.pad_inputs(net, multiple, minimum, square)
    got = []
    net.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    x = torch.rand(1, 3, *size)
    assert net(x).shape == (1, 3, 4 * size[0], 4 * size[1])
    required = spandrel.SizeRequirements(minimum=minimum, multiple_of=multiple, square=square)
    assert torch.equal(got[0], pad_tensor(x, required)[1])


def test_a_swinir_with_further_weights_is_called_so(tmp_path):
    state = SwinIR(**SWINIR).state_dict() | {"absolute_pos_embed": torch.zeros(1, 4, 12)}
    save_atomic({"params": state}, tmp_path / "ape.pth")
    with pytest.raises(ValueError) as error:
        load_net(tmp_path / "ape.pth")
    one_line(error, "ape.pth: a SwinIR but for 1 further weights, as absolute_pos_embed")


def test_networks_that_spandrel_calls_in_a_way_of_its_own_are_refused(tmp_path):
    path = other(MMRealSR, tmp_path / "mm.pth", num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1,
                 num_grow_ch=4, scale=4)
    with pytest.raises(ValueError) as error:
        load_net(path)
    one_line(error, "mm.pth", "spandrel runs MMRealSR in a way of its own")


def test_a_network_leaves_its_input_as_it_is(tmp_path):
    net = load_net(other(RCAN, tmp_path / "rcan.pth", scale=4, n_resgroups=1, n_resblocks=1,
                         n_feats=8, reduction=4))
    x = torch.rand(1, 3, 8, 8)
    before = x.clone()
    assert torch.equal(net(x), net(x)) and torch.equal(x, before)


def test_a_trainers_name_before_the_keys_of_another_network_is_taken_off(tmp_path):
    state = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4).state_dict()
    save_atomic({f"model.net_g.{k}": v for k, v in state.items()}, tmp_path / "lightning.pth")
    assert list(load_net(tmp_path / "lightning.pth").state_dict()) == list(state)
    rrdb = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4).state_dict()
    save_atomic({f"{name}.{k}": v for k, v in rrdb.items()
                 for name in ("model.net_g", "schema_student")}, tmp_path / "two.pth")
    with pytest.raises(ValueError) as error:  # schema is not ema
        load_net(tmp_path / "two.pth")
    one_line(error, "several networks, model.net_g., schema_student.")


@pytest.fixture
def safmn(tmp_path):
    """A small SAFMN, whose sides must be multiples of 8, and its file."""
    torch.manual_seed(0)
    net = SAFMN(dim=8, n_blocks=2).eval()
    net.to_img[0].bias.data.fill_(0.5)  # into the range to which spandrel clips
    save_atomic({"params": net.state_dict()}, tmp_path / "safmn.pth")
    return net, tmp_path / "safmn.pth"


@pytest.mark.parametrize("size", [(33, 45), (40, 45), (3, 5), (1, 9)])
def test_networks_that_take_some_sizes_alone_pad_and_crop_as_spandrels_descriptor(size, safmn):
    net, path = safmn
    loaded, theirs = load_net(path), spandrel.ModelLoader(device="cpu").load_from_file(path)
    assert list(loaded.state_dict()) == list(net.state_dict())
    lq = torch.rand(2, 3, *size)
    sr = loaded(lq)
    assert sr.shape == (2, 3, 4 * size[0], 4 * size[1]) and sr.std() > 0.01
    assert (sr.clamp(0, 1) - theirs(lq)).abs().max() < 1e-5


def test_padding_leaves_fitting_sizes_alone_and_lives_with_copies_and_adapters(safmn):
    net, loaded = safmn[0], load_net(safmn[1])
    fits, odd = torch.rand(1, 3, 24, 32), torch.rand(1, 3, 21, 30)
    assert torch.equal(loaded(fits), net(fits))
    before, twin = loaded(odd), copy.deepcopy(loaded)
    add_lora(twin, ("feats.*",), rank=2)
    assert torch.equal(twin(odd), before)  # B = 0
    twin(odd).sum().backward()
    for p in (p for p in twin.parameters() if p.requires_grad):
        assert p.grad is not None
        p.data += 0.3
    adapted = twin(odd)
    assert not torch.allclose(adapted, before) and torch.equal(loaded(odd), before)
    merge_lora(twin)
    assert twin.state_dict().keys() == net.state_dict().keys()
    assert torch.allclose(twin(odd), adapted, atol=1e-4)


def test_an_onnx_file_pads_any_size_too(safmn, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    net, file = load_net(safmn[1]), tmp_path / "net.onnx"
    write_onnx(net, file)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for size in ((16, 24), (33, 45)):  # without padding, and with it
        lq = torch.rand(1, 3, *size)
        (sr,) = session.run(None, {"lq": lq.numpy()})
        assert (net(lq) - torch.from_numpy(sr)).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # spandrel's
@pytest.mark.parametrize("name, state, part", list(refused()), ids=[name for name, *_ in refused()])
def test_load_net_refuses_in_one_line_that_names_the_file(name, state, part, tmp_path):
    save_atomic({"params": state}, tmp_path / f"{name}.pt")
    with pytest.raises(ValueError) as error:
        load_net(tmp_path / f"{name}.pt")
    one_line(error, tmp_path / f"{name}.pt", part)


def test_load_net_needs_a_file(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_net(tmp_path / "none.pt")
    one_line(error, "none.pt: no such file")
    (tmp_path / "junk.pt").write_bytes(b"<html>")
    with pytest.raises(ValueError) as error:
        load_net(tmp_path / "junk.pt")
    one_line(error, "junk.pt: not a readable weight file")


def test_load_like_takes_the_same_kind_and_size_only(tmp_path):
    path, net = tmp_path / "net.pt", SwinIR(**SWINIR)
    save_atomic({"params": net.state_dict()}, path)
    loaded = load_like(SwinIR(**SWINIR | {"img_size": 32}), path, "--net x")  # other masks
    assert loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items())
    for other, message in (
        (RRDBNet(**RRDB), "not a RRDBNet, which --net x is"),
        (SwinIR(**SWINIR | {"embed_dim": 24}), "SwinIR of another size than --net x"),
        (SwinIR(**SWINIR | {"depths": (3,)}), "SwinIR of another size than --net x"),
    ):
        with pytest.raises(ValueError) as error:
            load_like(other, path, "--net x")
        one_line(error, path, message)
    save_atomic({k: v for k, v in net.state_dict().items() if "conv_last" not in k}, path)
    with pytest.raises(ValueError) as error:
        load_like(net, path, "--net x")
    one_line(error, path, "conv_last.weight")


def test_load_like_takes_the_old_names_of_esrgan(tmp_path):
    net = RRDBNet(**RRDB)
    old = {k.replace("conv_hr", "HRconv").replace("conv_up", "upconv"): v
           for k, v in net.state_dict().items()}
    assert old.keys() != net.state_dict().keys()
    save_atomic(old, tmp_path / "old.pth")
    loaded = load_like(RRDBNet(**RRDB), tmp_path / "old.pth", "--net x").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("key", ["net_d", "params", None])
def test_load_discriminator(key, tmp_path):
    net_d, path = UNetDiscriminatorSN(num_feat=2), tmp_path / "d.pt"
    state = net_d.state_dict()
    save_atomic({key: state, "step": 3} if key == "net_d" else {key: state} if key else state, path)
    other = UNetDiscriminatorSN(num_feat=2)
    load_discriminator(other, path)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError) as error:
        load_discriminator(UNetDiscriminatorSN(num_feat=3), path)
    one_line(error, path, "holds no discriminator of this size for --init-d")


def test_load_discriminator_refuses_other_contents(tmp_path):
    for content in ({"net_d": None}, {"net_d": [1]}, {"net_d": {"conv0.weight": 3}}):
        save_atomic(content, tmp_path / "d.pt")
        with pytest.raises(ValueError) as error:
            load_discriminator(UNetDiscriminatorSN(num_feat=2), tmp_path / "d.pt")
        one_line(error, "d.pt: holds no discriminator")


# VGG19


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub/checkpoints"


def test_vgg_without_weights_or_network_fails_at_once(monkeypatch, hub):
    def offline(request, timeout):
        assert timeout <= 5
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(weights.urllib.request, "urlopen", offline)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        vgg19_state()
    assert time.perf_counter() - start < 2
    one_line(error, VGG19_URL, hub / "vgg19-dcbb9e9d.pth", "Name or service not known",
             "python -m tools.prefetch vgg19")


def test_vgg_offline_tries_no_network(monkeypatch, hub):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as with HF_HUB_OFFLINE=1 at the start
    monkeypatch.setattr(weights.urllib.request, "urlopen", None)
    with pytest.raises(FileNotFoundError) as error:
        vgg19_state()
    one_line(error, hub, "HF_HUB_OFFLINE is set", "python -m tools.prefetch vgg19")


def test_vgg_downloads_are_checked_and_kept(monkeypatch, hub, tmp_path):
    made = tmp_path / "made.pth"
    torch.save({"features.0.bias": torch.arange(3.0)}, made)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()[:8]
    good = made.rename(tmp_path / f"vgg19-{digest}.pth")
    bad = tmp_path / "vgg19-0123abcd.pth"
    bad.write_bytes(good.read_bytes())
    monkeypatch.setattr(weights, "VGG19_URL", good.as_uri())
    for _ in range(2):
        assert vgg19_state()["features.0.bias"].tolist() == [0, 1, 2]
        good.unlink(missing_ok=True)  # the second time it comes from the cache
    monkeypatch.setattr(weights, "VGG19_URL", bad.as_uri())
    with pytest.raises(FileNotFoundError) as error:
        vgg19_state()
    one_line(error, hub / bad.name, "invalid hash value")
    assert [path.name for path in hub.iterdir()] == [good.name]


def test_vgg_in_the_cache_must_be_the_public_file(monkeypatch, hub):
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
    state = {f"features.{k}": v for k, v in features.state_dict().items()}
    hub.mkdir(parents=True)
    torch.save(state, hub / "made.pth")
    digest = hashlib.sha256((hub / "made.pth").read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(weights, "VGG19_URL", f"https://example.org/vgg19-{digest}.pth")
    cached = (hub / "made.pth").rename(hub / f"vgg19-{digest}.pth")
    loaded = vgg19_state()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
    with open(cached, "ab") as file:
        file.write(b"0")
    with pytest.raises(ValueError) as error:
        vgg19_state()
    one_line(error, cached, "not the public file", "delete it")


@pytest.mark.parametrize("junk", [b"", b"<html>captive portal</html>", b"PK\x03\x04cut off"])
def test_a_damaged_vgg_without_a_hash_in_its_name_is_named(monkeypatch, hub, junk):
    monkeypatch.setattr(weights, "VGG19_URL", "https://example.org/vgg19.pth")
    hub.mkdir(parents=True)
    (hub / "vgg19.pth").write_bytes(junk)
    with pytest.raises(ValueError) as error:
        vgg19_state()
    one_line(error, hub / "vgg19.pth")
