"""tools/upscale.py --export and --lora: files that other programs read with the same output."""

import copy
import hashlib
import json

import numpy as np
import pytest
import spandrel
import torch
from PIL import Image
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from spandrel.architectures.DRCT import DRCT
from spandrel.architectures.SPAN import SPAN

import finetune_lora
import train_sr
from demo.report import curve_figure
from models import export
from models.checkpoint import (
    file_digest,
    load_file,
    read_settings,
    read_state,
    save_atomic,
    split_safetensors,
    write_csv,
)
from models.lora import add_lora, lora_state, merge_lora
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.validation import kept_step
from models.weights import load_net
from tools.upscale import main, parse_args
from train_sr import PRESETS, ema_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
TARGETS = {"swinir": ("*.mlp.fc1", "*.mlp.fc2"), "rrdb": ("body.*.rdb?.conv?",)}
SMALL = dict(embed_dim=12, depths=(2,), num_heads=(2,))
NETS = {  # spandrel reads SwinIR with num_feat 64 and RRDBNet with num_grow_ch 32 alone
    "swinir_small": lambda: SwinIR(**SMALL),
    "swinir_nearest": lambda: SwinIR(**SMALL, upsampler="nearest+conv"),
    "rrdb_small": lambda: RRDBNet(num_feat=8, num_block=2),
    "swinir_demo": PRESETS["swinir_tiny"]["build"],
    "rrdb_demo": PRESETS["rrdb_tiny"]["build"],
    "swinir_narrow": lambda: SwinIR(**SMALL, num_feat=8),
    "swinir_paper": PRESETS["swinir"]["build"],
    "rrdb_paper": PRESETS["rrdb"]["build"],
}


def randomise(net):
    """Biases, norms and position tables away from their initial zeros and ones, too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            spread = 0.1 if p.ndim == 1 else 0.5 * p[0].numel() ** -0.5
            p.add_(spread * torch.randn(p.shape))
    return net.eval().requires_grad_(False)


def saved(net, path):
    save_atomic({"params_ema": net.state_dict()}, path)
    return str(path)


def run(*args):
    return main(parse_args(["--ckpt", *map(str, args)]))


def assert_same(net, other, h=17, w=24):
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = net(x), other(x)
    assert a.std() > 0.02
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def assert_written_as_it_is(net, path):
    state, written = net.state_dict(), read_state(path)
    assert written.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(written[key], value) and written[key].dtype == value.dtype


@pytest.mark.parametrize("name, suffix", [
    ("swinir_small", ".pth"), ("swinir_small", ".safetensors"), ("swinir_nearest", ".pt"),
    ("rrdb_small", ".pt"), ("rrdb_small", ".safetensors"), ("swinir_paper", ".pth"),
    ("rrdb_paper", ".safetensors"),
])  # fmt: skip
def test_spandrel_loads_exports_with_equal_output(name, suffix, tmp_path, capsys):
    net = randomise(NETS[name]())
    out = tmp_path / f"out{suffix}"
    run(saved(net, tmp_path / "net.pt"), "--export", out)
    assert capsys.readouterr().out == f"wrote {out}\n"  # without a note
    found = spandrel.ModelLoader(device="cpu").load_from_file(out)
    assert found.scale == 4 and found.input_channels == found.output_channels == 3
    small = dict(h=8, w=9) if name.endswith("paper") else {}
    assert_same(net, found.model.eval(), **small)
    assert_written_as_it_is(net, out)
    if not name.endswith("paper"):
        assert_same(net, load_net(str(out)))  # we read it, too
    plain = tmp_path / "plain"
    plain.touch()
    assert out.stat().st_mode == plain.stat().st_mode  # others may read it where they may others
    if suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(out, "pt") as file:
            assert file.metadata().items() >= {"format": "pt", "architecture": type(net).__name__,
                                               "scale": "4"}.items()
    else:
        assert set(load_file(out)) == {"params_ema"}


@pytest.mark.parametrize("build", [
    lambda: SwinIR(depths=(2,), embed_dim=60, num_heads=(6,), upsampler="pixelshuffledirect"),
    lambda: SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4),
], ids=["SwinIR S", "Compact"])  # fmt: skip
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_public_networks_are_exported_as_they_came(build, suffix, tmp_path, capsys):
    net, out = randomise(build()), tmp_path / f"out{suffix}"
    run(saved(net, tmp_path / "net.pt"), "--export", out)
    assert capsys.readouterr().out == f"wrote {out}\n"
    found = spandrel.ModelLoader(device="cpu").load_from_file(out).model.eval()
    assert_same(net, found)


@pytest.mark.parametrize("name, width", [
    ("swinir_demo", "num_feat is 16, not the public networks' 64"),
    ("rrdb_demo", "num_grow_ch is 8, not the public networks' 32"),
    ("swinir_narrow", "num_feat is 8, not the public networks' 64"),
])
def test_other_widths_are_written_as_they_are_with_a_note(name, width, tmp_path, capsys):
    net, out = randomise(NETS[name]()), tmp_path / "out.pth"
    run(saved(net, tmp_path / "net.pt"), "--export", out)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"wrote {out} (note: spandrel") and width in line
    assert_written_as_it_is(net, out)
    assert_same(net, load_net(str(out)))
    with pytest.raises(Exception, match="size mismatch"):  # the note is true
        spandrel.ModelLoader(device="cpu").load_from_file(out)


def test_types_are_kept(tmp_path):
    net = NETS["rrdb_small"]().half()
    export.export(net, str(tmp_path / "half.pth"))
    assert {v.dtype for v in read_state(tmp_path / "half.pth").values()} == {torch.float16}


# ------------------------------------------------------------------------- LoRA


@pytest.fixture(params=["swinir_small", "rrdb_small"])
def tuned(request, tmp_path):
    """A base network's file, its adapters' file and the fine-tuned network's."""
    kind = request.param.partition("_")[0]
    base = randomise(NETS[request.param]())
    path = saved(base, tmp_path / "base.pt")
    net = copy.deepcopy(base)
    add_lora(net, TARGETS[kind], rank=3, alpha=6.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_b" in name:
                p.add_(0.05 * torch.randn(p.shape))
    save_atomic({"lora": lora_state(net), "rank": 3, "alpha": 6.0, "targets": list(TARGETS[kind]),
                 "base_sha256": hashlib.sha256((tmp_path / "base.pt").read_bytes()).hexdigest()},
                tmp_path / "lora.pt")
    saved(merge_lora(net), tmp_path / "net_g_ema.pt")
    return base, path, str(tmp_path / "lora.pt"), net, tmp_path


def test_lora_scale_goes_from_the_base_to_the_tuned_network(tuned):
    base, path, lora, net, tmp_path = tuned
    states = {}
    for scale in (0, 0.5, 1):
        out = tmp_path / f"{scale}.pth"
        run(path, "--lora", lora, "--lora-scale", scale, "--export", out)
        states[scale] = read_state(out)
        found = spandrel.ModelLoader(device="cpu").load_from_file(out).model.eval()
        if scale != 0.5:
            assert_same(net if scale else base, found)
    moved = [k for k in states[0] if not torch.equal(states[0][k], states[1][k])]
    assert moved
    for key in states[0]:
        middle = (states[0][key].double() + states[1][key].double()) / 2
        torch.testing.assert_close(states[0.5][key].double(), middle, rtol=0, atol=1e-6)


def test_another_base_is_refused_by_name(tuned):
    _, path, lora, _, tmp_path = tuned
    merged = tmp_path / "net_g_ema.pt"  # the mistake to expect
    with pytest.raises(ValueError) as caught:
        run(merged, "--lora", lora, "--export", tmp_path / "x.pth")
    text = str(caught.value)
    assert f"{merged} is {file_digest(merged)}" in text and file_digest(path) in text
    assert not (tmp_path / "x.pth").exists()
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        run(path, "--lora", tmp_path / "nowhere.pt", "--export", tmp_path / "x.pth")


@pytest.mark.parametrize("change", [
    {"rank": 0}, {"rank": "3"}, {"rank": 2}, {"alpha": None}, {"targets": "*.mlp.fc1"},
    {"targets": [3]}, {"targets": ["nothing"]}, {"lora": [1]}, {"lora": {}},
    {"lora": {"a": "b"}}, {"base_sha256": 7},
], ids=str)  # fmt: skip
def test_a_wrong_file_of_adapters_is_one_line(tuned, change):
    _, path, lora, _, tmp_path = tuned
    save_atomic(load_file(lora) | change, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="wrong.pt: ") as error:
        run(path, "--lora", tmp_path / "wrong.pt", "--export", tmp_path / "x.pth")
    assert "\n" not in str(error.value) and not (tmp_path / "x.pth").exists()


def test_the_demo_draws_the_curve(tmp_path):
    rows = [["Gold Standard", "", 9, 9], ["0", 1, 2, 3], ["0.5", 2, 3, 2], ["1.5", 4, 5, 1]]
    write_csv(tmp_path / "c.csv", ["model", "psnr", "q", "judge"], rows)
    curve_figure(tmp_path / "c.csv")
    assert Image.open(tmp_path / "c.png").size == (2070, 600)
    write_csv(tmp_path / "c.csv", ["model", "psnr"], [["0", 1]])
    with pytest.raises(ValueError, match="no column q, judge"):
        curve_figure(tmp_path / "c.csv")


def adapter_of(tuned, **change):
    """PEFT's adapter_model.safetensors of the fixture's adapters."""
    base, _, lora, _, tmp_path = tuned
    assert export.write_adapter(tmp_path / "adapter", base, load_file(lora) | change).endswith(
        "wrote " + str(tmp_path / "adapter"))
    return tmp_path / "adapter/adapter_model.safetensors"


def test_adapters_for_peft_are_those_of_lora_pt(tuned):
    base, path, lora, net, tmp_path = tuned
    file = adapter_of(tuned)
    states = []
    for adapters in (lora, file, file.parent):
        run(path, "--lora", adapters, "--export", tmp_path / "sr.pth")
        states.append(read_state(tmp_path / "sr.pth"))
        assert all(torch.equal(value, states[0][key]) for key, value in states[-1].items())
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: no such file"):
        run(path, "--lora", tmp_path, "--export", tmp_path / "x.pth")
    config = json.loads(file.with_name("adapter_config.json").read_text())
    names = {key.rpartition(".")[0] for key in load_file(lora)["lora"]}
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert set(config["target_modules"]) == names
    for key, value in load_file(file).items():
        name = key.removeprefix("base_model.model.").rsplit(".", 2)[0]
        weight = base.get_submodule(name).weight
        a, b = (3, *weight.shape[1:]), (len(weight), 3, *[1] * (weight.ndim - 2))
        assert value.shape == (a if "lora_A" in key else b)
    run(tmp_path / "base.pt", "--lora", file, "--lora-scale", 0, "--export", tmp_path / "zero.pth")
    with pytest.raises(ValueError, match="was trained on weights of sha256"):
        run(tmp_path / "net_g_ema.pt", "--lora", file, "--export", tmp_path / "x.pth")
    adapter_of(tuned, base_sha256="")  # as PEFT itself writes it: it names no base
    run(tmp_path / "net_g_ema.pt", "--lora", file, "--export", tmp_path / "x.pth")


@pytest.mark.parametrize("text, message", [
    ("{", "adapter_config.json: "), ("[]", "adapter_config.json: "),
    ('{"r": 3}', "adapter_config.json: KeyError: 'lora_alpha'"),
    ('{"r": 3, "lora_alpha": 6, "use_dora": true}', "use_dora: only plain LoRA is read"),
    ('{"r": 2, "lora_alpha": 6}', "LoRA weights do not fit"),
    (None, "adapter_config.json"),
])
def test_a_wrong_adapter_is_one_line(tuned, text, message):
    file = adapter_of(tuned)
    config = file.with_name("adapter_config.json")
    if text is None:
        config.unlink()
    else:
        config.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(tuned[1], "--lora", file, "--export", tuned[4] / "x.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is no weight of a LoRA adapter"):
        export.write_weights(tuned[0], tuned[4] / "net.safetensors")
        run(tuned[1], "--lora", tuned[4] / "net.safetensors", "--export", tuned[4] / "x.pth")


@pytest.mark.parametrize("layer", [
    torch.nn.Conv2d(4, 4, 3, groups=2), torch.nn.Conv2d(4, 4, 3, dilation=2),
    torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")])
def test_layers_that_peft_adapts_otherwise_leave_no_folder(layer, tmp_path):
    net = torch.nn.Sequential(layer)
    add_lora(net, ["0"], rank=2)
    lora = {"lora": lora_state(net), "rank": 2, "alpha": 2.0, "base_sha256": ""}
    report = export.write_adapter(tmp_path / "adapter", merge_lora(net), lora)
    assert "is not written" in report and not (tmp_path / "adapter").exists()


def test_peft_loads_the_adapters_with_equal_output(tuned):
    """Passed with peft 0.21.2; tests/requirements.txt does not have it."""
    peft = pytest.importorskip("peft")
    base, _, _, net, tmp_path = tuned
    adapter_of(tuned)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    assert_same(net, adapted.eval())
    assert_same(net, adapted.merge_and_unload().eval())
    # What PEFT writes again, we read
    peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).save_pretrained(
        tmp_path / "again")
    run(tmp_path / "base.pt", "--lora", tmp_path / "again/adapter_model.safetensors", "--export",
        tmp_path / "sr.pth")
    assert_same(net, load_net(tmp_path / "sr.pth"))


# ------------------------------------------------------------------------- reading


def test_every_public_wrapping_is_read(tmp_path):
    net = randomise(NETS["rrdb_demo"]())
    state = dict(net.state_dict())

    def old(key):
        if key.startswith("body."):
            return key.replace("body.", "RRDB_trunk.").replace(".rdb", ".RDB")
        return key.replace("conv_body", "trunk_conv").replace("conv_up", "upconv").replace(
            "conv_hr", "HRconv")

    files = {"ema": {"params_ema": state}, "params": {"params": state}, "bare": state,
             "old": {old(k): v for k, v in state.items()}}
    for name, content in files.items():
        save_atomic(content, tmp_path / f"{name}.pth")
        assert_same(net, load_net(str(tmp_path / f"{name}.pth")))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="cut.safetensors: not a readable weight file"):
        read_state(tmp_path / "cut.safetensors")


def test_a_safetensors_file_is_always_the_same_and_its_damage_is_found(tmp_path):
    net, path = randomise(NETS["rrdb_demo"]()), tmp_path / "a.safetensors"
    about = {name: name for name in "zyxwvutsr"}
    export.write_safetensors(net.state_dict(), path, about)
    data = path.read_bytes()
    names = [name for name in split_safetensors(data)[0]["__metadata__"]]
    assert names[-9:] == [*about]  # the library's own order is random
    assert (len(data) - len(split_safetensors(data)[1])) % 8 == 0
    assert_same(net, load_net(path))
    path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    with pytest.raises(ValueError, match=r"a.safetensors: damaged \(its checksum differs\)"):
        load_file(path)
    from safetensors.torch import save_file

    save_file(net.state_dict(), path)  # without a checksum
    assert_same(net, load_net(path))


@pytest.mark.parametrize("kind", ["swinir_small", "rrdb_small"])
def test_a_training_result_has_its_settings_and_loads_everywhere(kind, tmp_path):
    net, path = randomise(NETS[kind]()), tmp_path / "net_g_ema.pt"
    (tmp_path / "q.pt").touch()
    flags = ["--init", "x.pt", "--sampler", "upos", "--lambda-a", "0.1", "--iqa",
             f"demo.quality:q@{tmp_path / 'q.pt'}", "piqe"]
    args = finetune_lora.parse_args(["--net", "swinir", *flags])
    save_atomic(ema_checkpoint(net.state_dict(), args), path)
    settings = read_settings(path)
    assert settings.items() >= {"net": "swinir", "sampler": "upos", "lambda_q": 0.05,
                                "lambda_a": 0.1, "lambda_p": 1.0, "steps": 20_000}.items()
    assert settings["iqa"] == ["demo.quality:q@q.pt", "piqe"]  # no folder of this machine
    assert read_state(path).keys() == net.state_dict().keys()
    assert_same(net, load_net(path))
    assert_same(net, spandrel.ModelLoader(device="cpu").load_from_file(path).model.eval())
    run(str(path), "--export", tmp_path / "out.pth")
    assert set(load_file(tmp_path / "out.pth")) == {"params_ema"}


ABOUT = {"base": "base.pth sha256 0123", "data": "12 photos", "steps": "40"}


@pytest.mark.parametrize("kind", ["swinir_small", "rrdb_small"])
def test_a_result_is_also_safetensors_that_load_everywhere_and_a_card(kind, tmp_path):
    net = randomise(NETS[kind]())
    args = finetune_lora.parse_args(["--net", "rrdb", "--init", "x.pt", "--sampler", "amo", "--iqa",
                                     f"demo.quality:q@{tmp_path / 'q.pt'}", "musiq"])
    args.lora_rank = 24
    for out in (tmp_path / "a", tmp_path / "b"):
        args.out = str(out)
        export.write_result(out, net, ema_checkpoint(net.state_dict(), args), ABOUT)
    for file in sorted((tmp_path / "a").iterdir()):  # equal runs write equal files
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [
        "card.md", "net_g_ema.pt", "net_g_ema.safetensors"]
    path = tmp_path / "a/net_g_ema.safetensors"
    assert_written_as_it_is(net, path)
    assert_same(net, load_net(path))
    assert_same(net, spandrel.ModelLoader(device="cpu").load_from_file(path).model.eval())
    assert split_safetensors(path.read_bytes())[0]["__metadata__"].items() >= {
        "architecture": type(net).__name__, "scale": "4", "net": "rrdb", "sampler": "amo",
        "q": "demo.quality:q@q.pt+musiq", "base": ABOUT["base"], "steps": "40"}.items()
    card = (tmp_path / "a/card.md").read_text()
    for text in (f"# {type(net).__name__} x4, amo, fine-tuned", "adapters of rank 24, Eq. 5",
                 "`demo.quality:q@q.pt`, its weights and what", "12 photos", "Steps: 40",
                 "`musiq`, its weights, and pyiqa: PolyForm Noncommercial",
                 "1 L1 + 1 perceptual (vgg19) + 0.05 Q", "VGG19",
                 "the base network, base.pth sha256 0123"):
        assert text in card, text
    assert "{" not in card and "}" not in card


def test_a_card_names_what_was_used_alone(tmp_path):
    flags = ["--sampler", "rand", "--lambda-p", "0"]
    settings = ema_checkpoint({}, train_sr.parse_args(flags))["settings"]
    settings["net"] = "rrdb"
    about = ABOUT | {"base": "random weights"}
    export.write_card(tmp_path / "card.md", "T", "RRDBNet", "Files.", settings, about, "RESULTS")
    card = (tmp_path / "card.md").read_text()
    assert "Quality model: none" in card and "ground truths that a sampler chooses" in card
    assert "1 L1 + 0.1 GAN\n" in card and "\nRESULTS\n" in card
    assert card.split("bind it.")[1].split() == ["-", "the", "training", "images"]
    for change, method in (({"lambda_a": 0.0}, "L1 alone"),
                           ({"lambda_q": 0.1, "full": True}, "fine-tuning of all weights, Eq. 5")):
        export.write_card(tmp_path / "card.md", "T", "RRDBNet", "", settings | change, about)
        assert method in (tmp_path / "card.md").read_text()


def test_a_result_with_a_guard_is_of_the_last_step_that_passed(tmp_path):
    write_csv(tmp_path / "log.csv", ["step", "l_pix"], [[30, 1]])
    assert kept_step(tmp_path, 30) == 30
    write_csv(tmp_path / "log.csv", ["step", "l_pix", "val_psnr", "val_passed"], [
        [0, "", 20, 1], [10, 1, 20, 1], [15, 1, "", ""], [20, 1, 18, 0], [30, 1, 17, 0]])
    assert kept_step(tmp_path, 30) == 10
    write_csv(tmp_path / "log.csv", ["step", "l_pix", "val_psnr", "val_passed"], [
        [0, "", 20, 1], [10, 1, 20, 1], [40, 1, "", ""]])  # validated no longer
    assert kept_step(tmp_path, 40) == 40


def test_only_a_quality_model_that_was_used_is_recorded(tmp_path):
    net = torch.nn.Linear(1, 1)
    for sampler, iqa in (("upos", []), ("amo", ["musiq"])):
        args = train_sr.parse_args(["--sampler", sampler])
        settings = ema_checkpoint(net.state_dict(), args)["settings"]
        assert (settings["sampler"], settings["iqa"]) == (sampler, iqa)
        assert "lambda_q" not in settings  # not fine-tuned
    for content in ({"params_ema": net.state_dict()}, net.state_dict(),
                    {"params": net.state_dict(), "settings": torch.ones(1)}):
        save_atomic(content, tmp_path / "public.pth")
        assert read_settings(tmp_path / "public.pth") == {}


# ------------------------------------------------------------------------- ONNX


def onnx_run(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"lq": x.numpy()})[0]


@pytest.mark.parametrize("name, size, others", [
    ("rrdb_demo", None, [(9, 15), (1, 7), (32, 20)]),
    ("swinir_narrow", None, [(9, 15), (32, 16), (8, 41)]),
    ("swinir_narrow", (13, 24), [(13, 24)]),
])  # fmt: skip
def test_onnxruntime_gives_the_same(name, size, others, tmp_path, capsys):
    net = randomise(NETS[name]())
    path = saved(net, tmp_path / "net.pt")
    flags = ["--onnx-size", *size] if size else []
    run(path, "--export", tmp_path / "net.onnx", *flags)
    assert "differs from torch by" in capsys.readouterr().out
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "net.onnx").stat().st_mode == plain.stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.pt", "plain"]
    for h, w in others:
        x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(h))
        np.testing.assert_allclose(onnx_run(tmp_path / "net.onnx", x), net(x), atol=1e-4, rtol=0)
    if size:
        with pytest.raises(Exception, match="invalid dimensions"):
            onnx_run(tmp_path / "net.onnx", torch.rand(1, 3, 16, 16))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = saved(NETS["rrdb_demo"](), tmp_path / "net.pt")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        run(path, "--export", tmp_path / "net.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt"]


def test_a_network_that_sets_its_weights_as_it_runs_is_exported(tmp_path):
    torch.manual_seed(0)
    net = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=4)
    save_atomic({"params": net.state_dict()}, tmp_path / "span.pth")
    net = load_net(tmp_path / "span.pth")
    net.conv_1.sk.weight.data.add_(0.1)  # what the last pass set is out of date
    assert export.write_onnx(net, tmp_path / "span.onnx") < 1e-4
    assert "update_params" not in vars(net.conv_1)  # the network itself is as it was
    x = torch.rand(1, 3, 9, 14)
    np.testing.assert_allclose(onnx_run(tmp_path / "span.onnx", x), net(x), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_network_with_windows_of_its_own_is_not_padded_twice(tmp_path):
    """It had SwinIR's padding around spandrel's, and then cut nothing off."""
    torch.manual_seed(0)
    net = DRCT(upscale=4, embed_dim=24, depths=[2], num_heads=[2], window_size=8, gc=8,
               upsampler="pixelshuffle")
    save_atomic({"params": net.state_dict()}, tmp_path / "drct.pth")
    net = load_net(tmp_path / "drct.pth")
    assert net.window_size == 8 and export.write_onnx(net, tmp_path / "net.onnx") < 1e-4
    x = torch.rand(1, 3, 33, 17)
    np.testing.assert_allclose(onnx_run(tmp_path / "net.onnx", x), net(x), atol=1e-4, rtol=0)


def test_an_export_that_differs_at_another_size_is_refused_and_not_written(tmp_path):
    class FixesSize(torch.nn.Module):
        def forward(self, x):
            wide = torch.nn.functional.interpolate(x, scale_factor=4)
            return wide + (0.5 if x.shape[2] > 30 else 0)  # true of one size that is tried

    with pytest.raises(ValueError, match="net.onnx: .* 33 x 17.*give --onnx-size|cannot export"):
        export.write_onnx(FixesSize(), tmp_path / "net.onnx")
    assert not any(tmp_path.iterdir())


def test_what_torch_cannot_export_is_refused_in_one_line(tmp_path, monkeypatch, capfd):
    def fail(*_, **__):
        print("hundreds\nof\nlines")
        raise RuntimeError("step 1/3\nof") from ValueError("u0 is not known\n\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"cannot export a RRDBNet \(u0 is not known\); give"):
        export.write_onnx(NETS["rrdb_demo"](), tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "") and not any(tmp_path.iterdir())
