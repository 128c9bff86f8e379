"""What makes a step faster or smaller changes no result: AMO by TF32, --accumulate, --compile."""

import contextlib

import pytest
import torch
from make_data import make_hggt
from test_train import TINY, read_log, same_weights
from torch import nn
from torch.overrides import TorchFunctionMode

import finetune_lora
import train_sr
from models import iqa
from models.checkpoint import load_file, read_state
from models.iqa import load_iqa
from models.quality import in_tf32
from models.samplers import FastArgmax, choose_argmax


class Tf32(TorchFunctionMode):
    """Convolutions and products of inputs whose mantissas are rounded to TF32's 10 bits."""

    ROUNDED = (torch.conv2d, nn.functional.linear, torch.matmul, torch.bmm)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.ROUNDED:
            args = [self.round(x) if isinstance(x, torch.Tensor) else x for x in args]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def round(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Quality(nn.Module):
    """Two convolutions and a product, random: scores of about 50 with a deviation of some units."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU())
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return 50 + 40 * self.head(self.layers(x).mean((2, 3))).squeeze(1)


@pytest.fixture
def tf32_on_a_cpu(monkeypatch):
    """`FrozenMetric` with tf32 set rounds as a GPU would."""
    monkeypatch.setattr(iqa, "precision",
                        lambda tf32: Tf32() if tf32 else contextlib.nullcontext())


def near_ties(count, seed):
    """Patches of `count` sets: two in three have a copy of the best that differs by little."""
    generator = torch.Generator().manual_seed(seed)
    gts = torch.rand(count, 5, 3, 12, 12, generator=generator)
    step = 10.0 ** torch.empty(count, 1, 1, 1).uniform_(-7, -2, generator=generator)
    near = gts[:, 1] + step * torch.randn(gts[:, 1].shape, generator=generator)
    gts[: 2 * count // 3, 3] = near.clamp(0, 1)[: 2 * count // 3]
    return gts


def test_amo_by_tf32_chooses_as_float32_does(tf32_on_a_cpu, monkeypatch):
    metric = iqa.FrozenMetric(Quality(), "tests:quality")
    scored = []
    forward = metric.net.forward
    monkeypatch.setattr(metric.net, "forward", lambda x: (scored.append((len(x), metric.tf32)),
                                                          forward(x))[1])
    choose, flips, exact = FastArgmax(in_tf32(metric), metric), 0, 0
    for batch in range(125):  # 1,000 sets
        gts = near_ties(8, batch)
        expected = choose_argmax(gts, metric)
        flips += int((choose_argmax(gts, in_tf32(metric)) != expected).sum())
        scored.clear()
        assert torch.equal(choose(gts), expected)
        exact += sum(count for count, tf32 in scored if not tf32) // 5
    assert flips > 10  # rounding alone would have chosen otherwise
    assert choose.bound > 0 and 64 < exact < 700  # the first 64 sets and the close ones alone


def test_the_bound_is_measured_again(tf32_on_a_cpu):
    metric = iqa.FrozenMetric(Quality(), "tests:quality")
    choose = FastArgmax(in_tf32(metric), metric, renew=20)
    for batch in range(8):
        choose(near_ties(8, batch))
    bound = choose.bound.clone()
    metric.net.head.weight.data.mul_(20)
    for batch in range(8, 28):
        choose(near_ties(8, batch))
    assert choose.bound > 2 * bound


def test_amo_by_tf32_without_scores_falls_back_to_float32(tf32_on_a_cpu):
    metric = iqa.FrozenMetric(Quality(), "tests:quality", differentiable=True)  # takes NaN
    choose = FastArgmax(in_tf32(metric), metric)
    gts = near_ties(64, 0)
    choose(gts)
    gts[0, :4] = torch.nan
    gts[1] = torch.nan
    assert torch.equal(choose(gts), choose_argmax(gts, metric))


def test_musiqs_positions_and_padding_are_prepared_once(monkeypatch):
    from pyiqa.data import multiscale_trans_util as musiq

    net = load_iqa("models.iqa:random_musiq", "cpu").net
    images = [torch.rand(1, 3, 256, 256), torch.rand(1, 3, 100, 150), torch.rand(1, 3, 40, 300)]
    lean = [net(x) for x in images]
    positions = musiq.get_hashed_spatial_pos_emb_index
    assert positions(10, 7, 5) is positions(10, 7, 5)
    pyiqas = positions.__wrapped__
    assert pyiqas(10, 7, 5) is not pyiqas(10, 7, 5)

    def pad(x, length):  # pyiqa's way, in short
        return torch.cat([x, torch.zeros(*x.shape[:2], length)], -1)[:, :, :length]

    monkeypatch.setattr(musiq, "get_hashed_spatial_pos_emb_index", pyiqas)
    monkeypatch.setattr(musiq, "_pad_or_cut_to_max_seq_len", pad)
    for x, score in zip(images, lean, strict=True):
        assert torch.equal(net(x), score)


# ------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fast")
    make_hggt(path / "HGGT", n=4, size=64)
    return path


@pytest.fixture
def train(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def start(out, *flags, script=train_sr):
        own = ("--init", "none") if script is train_sr else ()
        flags = (*TINY, "--batch-size", 4, "--sampler", "amo", *own, "--steps", 3, "--sample-every",
                 0, "--log-every", 1, "--out", out, *flags)
        script.main(script.parse_args([str(flag) for flag in flags]))
        return load_file(folder / out / "last.pt")

    return start


def test_a_batch_in_parts_gives_the_same_gradients(folder, train):
    """But for the discriminator's spectral norm, which takes a step in each pass."""
    for out, count in (("whole", 1), ("parts", 4)):
        train(out, "--accumulate", count, "--lambda-a", 0)
    whole, parts = (load_file(folder / out / "last.pt")["params"] for out in ("whole", "parts"))
    assert all(torch.allclose(whole[key], parts[key], atol=1e-5) for key in whole)
    for a, b in zip(*(read_log(folder / out / "log.csv") for out in ("whole", "parts")),
                    strict=True):
        assert all(float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-6) for key in a)


def test_the_discriminator_learns_from_all_parts(folder, train):
    whole, parts = train("whole_d"), train("parts_d", "--accumulate", 4)
    moved = whole["net_d"]["conv9.weight"] - parts["net_d"]["conv9.weight"]
    assert 0 < moved.abs().max() < 1e-3  # three steps at 1e-3 move it by up to 3e-3
    for a, b in zip(*(read_log(folder / out / "log.csv") for out in ("whole_d", "parts_d")),
                    strict=True):
        assert float(a["l_d"]) == pytest.approx(float(b["l_d"]), rel=0.05)
    with pytest.raises(ValueError, match="--accumulate 3"):
        train("bad", "--accumulate", 3)


def test_accumulated_gradients_are_those_of_the_batch():
    torch.manual_seed(0)
    net, gradients = train_sr.PRESETS["rrdb_tiny"]["build"]().double(), []
    batch = {"lq": torch.rand(4, 3, 8, 8).double(), "gt": torch.rand(4, 3, 32, 32).double()}
    for count in (1, 2, 4):
        net.zero_grad()
        for part in train_sr.split(batch, count):
            loss = train_sr.generator_losses(net(part["lq"]), part["gt"], None, None, None)
            (loss["l_pix"] / count).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["swinir_tiny", "rrdb_tiny"])
def test_compiled_runs_resume_and_write_plain_checkpoints(folder, train, monkeypatch, net):
    """With a back end that only captures the graphs: what a compiler makes of them is not ours."""
    compiled, compile_module = [], nn.Module.compile

    def compile(module, **options):
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile)
    torch._dynamo.reset()
    plain = train(f"{net}_plain", "--net", net)
    assert not compiled
    train(f"{net}_compiled", "--net", net, "--compile", "--steps", 2)
    again = train(f"{net}_compiled", "--net", net, "--compile")  # resumed
    block = {"swinir_tiny": "SwinBlock", "rrdb_tiny": "ResidualDenseBlock"}[net]
    assert {block, "UNetDiscriminatorSN", "Sharpness"} <= set(compiled)
    assert again["step"] == 3
    for part in ("params", "params_ema", "net_d"):
        assert list(again[part]) == list(plain[part])  # no _orig_mod
        for key in plain[part]:
            assert torch.allclose(again[part][key].double(), plain[part][key].double(),
                                  atol=2e-4), key

    # LoRA: a generator with adapters stays as it is, the other networks are compiled
    flags = ("--net", net, "--init", f"{net}_plain/net_g_ema.pt", "--ema-decay", 0)
    for out, more in ((f"{net}_lora", ()), (f"{net}_lora_compiled", ("--compile",))):
        train(out, *flags, *more, script=finetune_lora)
    a, b = (load_file(folder / out / "lora.pt")["lora"] for out in
            (f"{net}_lora", f"{net}_lora_compiled"))
    assert all(torch.allclose(a[key], b[key], atol=2e-4) for key in a)
    assert any(value.abs().max() > 1e-3 for key, value in a.items() if key.endswith("lora_b"))


def test_a_run_with_fast_amo_equals_one_without(folder, train):
    train("plain")
    train("fast", "--fast-amo")
    same_weights(folder / "plain/last.pt", folder / "fast/last.pt")
    with pytest.raises(ValueError, match="--fast-amo: --sampler rand scores no patches"):
        train("rand", "--fast-amo", "--sampler", "rand")


def test_deterministic_kernels_are_asked_for(monkeypatch):
    for flag in (False, True):
        args = train_sr.parse_args(["--deterministic"] if flag else [])
        try:
            train_sr.set_backends(args)
            assert torch.backends.cudnn.benchmark is not flag
            assert torch.are_deterministic_algorithms_enabled() is flag
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = False


def test_a_file_of_vgg19s_weights(folder, train):
    from benchmarks.step import random_vgg19
    from models.checkpoint import save_atomic

    save_atomic(random_vgg19(), folder / "vgg.pth")
    save_atomic({"features.0.weight": torch.zeros(2)}, folder / "other.pth")
    train("vgg", "--perceptual", "vgg19@vgg.pth", "--steps", 1)
    settings = load_file(folder / "vgg/last.pt")["settings"]
    assert settings["perceptual"].startswith("vgg19-")  # by its checksum
    assert load_file(folder / "vgg/net_g_ema.pt")["settings"]["perceptual"] == "vgg19"
    assert read_state(folder / "vgg/net_g_ema.pt")
    with pytest.raises(ValueError, match="other.pth: not the weights of torchvision's VGG19"):
        train("bad_vgg", "--perceptual", "vgg19@other.pth")
    with pytest.raises(SystemExit):
        train("no_vgg", "--perceptual", "vgg19@absent.pth")
