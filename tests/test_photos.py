"""evaluate.py --ckpt on photographs: what a file holds comes out again; tiles equal the whole."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_data import smooth_image
from PIL import Image, ImageOps
from torch import nn

import evaluate
from models import tiles
from models.checkpoint import save_atomic
from models.photos import read_photo, write_photo
from models.rrdb import RRDBNet
from models.swinir import SwinIR

ROOT = Path(__file__).resolve().parent.parent
PROFILE = b"not a real profile, but kept" * 8


def enlarge(x):
    """Each pixel four times a side: what comes out is known."""
    return x.repeat_interleave(4, 2).repeat_interleave(4, 3)


def through(path, out):
    photo = read_photo(path)
    write_photo(photo, enlarge(photo.rgb), out)
    return photo, np.asarray(Image.open(path)), Image.open(out)


def pixels(mode, h=9, w=14):
    """An image of a mode whose every channel differs."""
    channels = {"1": 1, "L": 1, "LA": 2, "P": 3, "RGB": 3, "RGBA": 4}[mode]
    x = np.random.default_rng(0).integers(0, 256, (h, w, channels), np.uint8)
    if mode == "P":
        return Image.fromarray(x).quantize(16)
    if mode == "1":
        return Image.fromarray(x[..., 0]).convert("1")
    return Image.fromarray(x[..., 0] if channels == 1 else x)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_comes_out_again(mode, suffix, tmp_path):
    source = pixels(mode)
    source.save(tmp_path / f"a.{suffix}", icc_profile=PROFILE)
    _, _, result = through(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    then = {"1": "L", "P": "RGB"}.get(mode, mode)
    assert (result.mode, result.format) == (then, {"png": "PNG", "tif": "TIFF"}[suffix])
    assert result.info["icc_profile"] == PROFILE
    expected = np.asarray(source.convert(then)).repeat(4, 0).repeat(4, 1)
    colours = (..., slice(0, -1)) if then.endswith("A") else ...
    np.testing.assert_array_equal(np.asarray(result)[colours], expected[colours])
    if then.endswith("A"):  # bicubic, so smoother than the colours, with the same mean
        alpha, before = np.asarray(result)[..., -1].astype(float), expected[..., -1].astype(float)
        assert abs(alpha.mean() - before.mean()) < 4 and (alpha != before).any()


def test_alpha_is_enlarged_bicubically_and_transparent_palettes_become_rgba(tmp_path):
    flat = np.full((8, 8, 4), 200, np.uint8)
    flat[:, 4:, 3] = 0
    Image.fromarray(flat).save(tmp_path / "a.png")
    alpha = np.asarray(through(tmp_path / "a.png", tmp_path / "b.png")[2])[16, :, 3] / 200
    assert (alpha[:10] == 1).all() and (alpha[22:] == 0).all()
    # weights of the cubic kernel with a = -0.75 at an eighth of a pixel, left of the edge
    x = [1.125, 0.125, 0.875, 1.875]
    far = [-0.75 * (d**3 - 5 * d**2 + 8 * d - 4) for d in (x[0], x[3])]
    near = [1.25 * d**3 - 2.25 * d**2 + 1 for d in (x[1], x[2])]
    assert far[0] + far[1] + sum(near) == pytest.approx(1)
    assert alpha[14] == pytest.approx(far[0] + near[0], abs=0.005)  # 3.5 px + 1/8 px: left of it
    palette = Image.fromarray(flat[..., :3]).quantize(4)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert through(tmp_path / "p.png", tmp_path / "q.png")[2].mode == "RGBA"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_bits(suffix, tmp_path):
    x = np.random.default_rng(0).integers(0, 65536, (6, 7), np.uint16)
    Image.fromarray(x).save(tmp_path / f"a.{suffix}")
    photo, _, result = through(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    assert photo.bits == 16 and photo.is_grey and not photo.note
    np.testing.assert_array_equal(np.asarray(result), x.repeat(4, 0).repeat(4, 1))


def png_of_16_bit(colour_type, channels):
    import struct
    import zlib

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    rows = b"".join(b"\0" + bytes([y, 1, 60, 2, 90, 3, 255, 255][: 2 * channels]) * 4
                    for y in range(3))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, colour_type,
            0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))  # fmt: skip


@pytest.mark.parametrize("colour_type, channels, mode", [(2, 3, "RGB"), (4, 2, "LA"),
                                                         (6, 4, "RGBA")])
def test_16_bit_colour_is_read_at_8_bits_and_said(colour_type, channels, mode, tmp_path):
    (tmp_path / "a.png").write_bytes(png_of_16_bit(colour_type, channels))
    photo, _, result = through(tmp_path / "a.png", tmp_path / "b.png")
    assert "16 bits per channel, of which Pillow reads 8" in photo.note
    assert result.mode == mode and result.size == (16, 12)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_and_profile_are_kept(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "Maker"  # Orientation, Make
    exif.get_ifd(0x8769)[0xA002] = 14  # PixelXDimension
    source = Image.fromarray(smooth_image(np.random.default_rng(0), 9, 14))
    source.save(tmp_path / f"a.{suffix}", exif=exif, icc_profile=PROFILE, quality=100)
    photo, stored, result = through(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}")))
    rgb = photo.rgb[0].permute(1, 2, 0).mul(255).round().byte().numpy()
    np.testing.assert_array_equal(rgb, shown)  # the network sees it upright
    assert result.size == (56, 36) and result.info["icc_profile"] == PROFILE
    kept = result.getexif()
    assert (kept[274], kept[271]) == (orientation, "Maker")
    assert kept.get_ifd(0x8769)[0xA002] == 56
    error = np.asarray(result).astype(float) - stored.repeat(4, 0).repeat(4, 1)
    assert np.abs(error).mean() < 4  # of the lossy formats


def test_exif_that_cannot_be_written_is_one_line_with_the_photos_name(tmp_path):
    exif = Image.Exif()
    exif[271] = "Maker"
    pixels("RGB").save(tmp_path / "a.jpg", exif=exif)
    photo = read_photo(tmp_path / "a.jpg")
    photo.exif[296] = "odd"  # ResolutionUnit, a number
    with pytest.raises(ValueError, match=r"b\.jpg: its EXIF cannot be written"):
        write_photo(photo, enlarge(photo.rgb), tmp_path / "b.jpg")
    assert not (tmp_path / "b.jpg").exists()


def test_a_tiff_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    pixels("RGB").save(tmp_path / "a.tif", exif=exif)
    result = through(tmp_path / "a.tif", tmp_path / "b.tif")[2]
    assert result.size == (36, 56) and result.getexif().get(274, 1) == 1


# ------------------------------------------------------------------------- tiles


class Local(nn.Module):
    """`radius` 3x3 convolutions, then nearest enlargement: a receptive field of that radius."""

    def __init__(self, radius):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(radius)])
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape[2:]))
        return enlarge(torch.tanh(3 * self.convs(x)))


def lq(h, w):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0))


def test_spans_and_ramps():
    assert tiles.spans(64, 64) == [(0, 64)] and tiles.spans(20, 64) == [(0, 20)]
    assert tiles.spans(97, 64) == [(0, 64), (32, 96), (64, 97)]
    for side in range(1, 300):
        for tile in (64, 72, 128):
            total, spans = torch.zeros(4 * side), tiles.spans(side, tile)
            for start, end in spans:
                total[4 * start : 4 * end] += tiles.ramp(start, end, side, 4)
                assert start % 8 == 0 and end - start <= tile
            assert spans[-1][1] == side and torch.allclose(total, torch.ones(4 * side), atol=1e-6)
    assert list(tiles.halves(1000)) == [504, 256, 128, 64] and list(tiles.halves(64)) == []


def test_tiles_are_exact_for_a_net_that_looks_no_further_than_the_margin():
    net, x = Local(tiles.MARGIN), lq(150, 83)
    whole, size = tiles.upscale(net, x, 0)
    assert size == 0 and net.seen == [(150, 83)]
    sr, size = tiles.upscale(net, x, 64)
    assert size == 64 and max(max(s) for s in net.seen[1:]) == 64
    torch.testing.assert_close(sr, whole, rtol=0, atol=1e-6)


def test_tiles_are_exact_outside_the_overlaps_for_a_net_that_looks_as_far_as_these():
    x = lq(64, 150)
    net = Local(tiles.OVERLAP)
    whole, sr = tiles.upscale(net, x, 0)[0], tiles.upscale(net, x, 96)[0]
    for left, right in ((0, 64), (96, 128)):  # tiles start at 0, 64, 128 and end at 96, 150
        torch.testing.assert_close(sr[..., 4 * left : 4 * right],
                                   whole[..., 4 * left : 4 * right], rtol=0, atol=1e-6)
    assert (sr - whole).abs().max() > 1e-6  # and not in them


def test_windows_of_tiles_are_those_of_the_whole_image(monkeypatch):
    torch.manual_seed(0)
    net = SwinIR(embed_dim=12, depths=(2,), num_heads=(2,), img_size=16, num_feat=8,
                 upsampler="nearest+conv").eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape) * p[0].numel() ** -0.5)
    x = lq(75, 117)
    whole, sr = tiles.upscale(net, x, 0)[0], tiles.upscale(net, x, 64)[0]
    outside = torch.ones(117, dtype=torch.bool)
    for start, _ in tiles.spans(117, 64)[1:]:
        outside[start : start + tiles.OVERLAP] = False
    rows = torch.ones(75, dtype=torch.bool)
    rows[32:64] = False
    keep = (rows[:, None] & outside).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert keep.any() and (sr - whole).abs()[..., keep].max() < 1e-5
    assert (sr - whole).abs().max() < 0.01  # depth 2: one shift, so little comes from further away
    monkeypatch.setattr(tiles, "spans", lambda side, tile: [(0, 60), (28, side)])  # no multiples
    shifted = tiles.upscale(net, x, 64)[0]
    assert (shifted - whole).abs().max() > 5 * (sr - whole).abs().max()


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory."), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
])  # fmt: skip
def test_auto_halves_until_it_fits(error):
    class Full(Local):
        def forward(self, x):
            if x.shape[2] * x.shape[3] > 72 * 72:
                self.seen.append(tuple(x.shape[2:]))
                raise error
            return super().forward(x)

    net = Full(2)
    sr, size = tiles.upscale(net, lq(150, 200))
    assert size == 64 and net.seen[:4] == [(150, 200), (104, 104), (64, 64), (64, 64)]
    torch.testing.assert_close(sr, tiles.upscale(Local(2), lq(150, 200), 0)[0], rtol=0, atol=1e-6)
    with pytest.raises(MemoryError, match="100x80 pixels in tiles of 96; give --tile auto"):
        tiles.upscale(net, lq(80, 100), 96)
    with pytest.raises(RuntimeError, match="another"):
        tiles.upscale(lambda x: (_ for _ in ()).throw(RuntimeError("another")), lq(9, 9))


def test_a_refusal_of_the_cpus_allocator_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert tiles.is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        F.conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3))
    assert not tiles.is_out_of_memory(caught.value)


# ------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    net = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4).eval()
    path = tmp_path_factory.mktemp("photos") / "net.pt"
    save_atomic({"params_ema": net.state_dict()}, path)
    (path.parent / "own_metric.py").write_text(
        "import torch\nclass Mean(torch.nn.Module):\n    def forward(self, x):\n"
        "        return 100 * x.mean((1, 2, 3))\ndef mean():\n    return Mean()\n")
    return path, net


def run(ckpt, *args):
    env = {k: v for k, v in os.environ.items() if k != "DEBUG" and "proxy" not in k.lower()}
    env |= {"PYTHONPATH": str(ckpt.parent), "TORCH_HOME": str(ckpt.parent / "torch"),
            "HF_HOME": str(ckpt.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "evaluate.py", "--ckpt", str(ckpt), *map(str, args)],
                          cwd=ROOT, env=env, text=True, capture_output=True, timeout=100)


def test_a_folder_of_photos(ckpt, tmp_path):
    path, net = ckpt
    photos, out = tmp_path / "photos", tmp_path / "sr"
    photos.mkdir()
    image = smooth_image(np.random.default_rng(1), 30, 40)
    Image.fromarray(image).save(photos / "b.png")
    Image.fromarray(image).save(photos / "c.JPG", quality=95)
    (photos / "a.png").write_bytes((photos / "b.png").read_bytes()[:200])
    (photos / "notes.txt").write_text("no photo")
    done = run(path, "--lq", photos, "--out", out, "--metrics", "musiq", "--extra",
               "m=own_metric:mean")
    assert done.returncode == 1, done.stderr
    assert f"{photos}/a.png: not a readable photo" in done.stderr
    assert "column musiq is left out" in done.stderr and "1 of 3 photos failed" in done.stderr
    assert "100%" in done.stderr and sorted(p.name for p in out.iterdir()) == [
        "b.png", "c.JPG", "scores.csv"]
    with torch.no_grad():
        sr = net(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255)
    saved = np.asarray(Image.open(out / "b.png"))
    expected = sr[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255
    assert np.abs(saved - expected).max() <= 0.51

    def rows():
        lines = [x for x in (out / "scores.csv").read_text().splitlines() if x[0] != "#"]
        return list(csv.DictReader(lines))

    a, b, c = rows()
    assert list(b) == ["file", "status", "width", "height", "tile", "m_lq", "m_sr"]
    assert (a["status"], b["status"], c["file"]) == ("failed", "made", "c.JPG")
    assert (b["width"], b["height"], b["tile"]) == ("40", "30", "0")
    assert float(b["m_lq"]) == pytest.approx(100 * image.mean() / 255, abs=1e-3)
    assert float(b["m_sr"]) == pytest.approx(100 * saved.mean() / 255, abs=1e-3)

    # The same command keeps what exists; --overwrite does not
    (photos / "a.png").unlink()
    Image.fromarray(255 - image).save(out / "b.png")
    args = evaluate.parse_args(["--ckpt", str(path), "--lq", str(photos), "--out", str(out),
                                "--metrics"])  # fmt: skip
    assert evaluate.use_checkpoint(args) == 0 and [r["status"] for r in rows()] == ["kept"] * 2
    assert (np.asarray(Image.open(out / "b.png")) == 255 - image).all()
    args.overwrite = True
    assert evaluate.use_checkpoint(args) == 0 and [r["status"] for r in rows()] == ["made"] * 2
    assert (np.asarray(Image.open(out / "b.png")) == saved).all()


@pytest.mark.parametrize("more, message", [
    (("--lq", "{tmp}/nothing", "--out", "{tmp}/sr"), "nothing: no .png"),
    (("--lq", "{tmp}", "--out", "{tmp}"), "holds the photos themselves"),
    (("--lq", "{tmp}/a.png", "--out", "{tmp}/b.png"), "give a folder"),
    (("--lq", "{tmp}/a.png", "--out", "{tmp}/sr", "--tile", "100"), "--tile 100"),
    (("--lq", "{tmp}/a.png", "--out", "{tmp}/sr", "--metrics", "psnr"), "needs a ground truth"),
    (("--export", "{tmp}/net.bin"), "write .pth"),
    (("--export", "{tmp}/net.pth", "--lora", "{ckpt}"), "not the lora.pt"),
])  # fmt: skip
def test_bad_arguments_are_refused(ckpt, tmp_path, more, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    args = [m.format(tmp=tmp_path, ckpt=ckpt[0]) for m in more]
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.use_checkpoint(evaluate.parse_args(["--ckpt", str(ckpt[0]), *args]))


@pytest.mark.parametrize("args", [
    "--ckpt a.pt", "--ckpt a.pt --lq b", "--ckpt a.pt --lq b --out c --export d.pth",
    "--ckpt a.pt --export d.pth --models A=b", "--models A=b --lora c --out t.csv --gt g --lq l",
])  # fmt: skip
def test_modes_do_not_mix(args, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.parse_args(args.split())
    assert caught.value.code == 2 and "--ckpt" in capsys.readouterr().err
