"""tools/upscale.py: what a photograph holds is kept; tiles equal the whole image."""

import csv
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from make_data import smooth_image
from PIL import Image, ImageOps
from scripts import ROOT, run_script
from torch import nn

from models import tiles
from models.checkpoint import save_atomic
from models.photos import read_photo, write_photo
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from tools.upscale import main, parse_args, upscale_photos

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
    visible = expected[..., -1] > 0 if then.endswith("A") else slice(None)
    np.testing.assert_array_equal(np.asarray(result)[colours][visible], expected[colours][visible])
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


# ------------------------------------------------------------------------- 16 bits

TURNED = {  # how a stored array looks upright, by its EXIF orientation
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
    5: lambda x: np.fliplr(np.rot90(x, -1)), 6: lambda x: np.rot90(x, -1),
    7: lambda x: np.fliplr(np.rot90(x)), 8: np.rot90,
}  # fmt: skip
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
         (1, 0, 2, 1))


def values(channels, h=9, w=14):
    return np.random.default_rng(channels).integers(0, 65536, (h, w, channels), np.uint16)


def chunk(kind, data):
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def png_of(x, more=b"", interlaced=False):
    """A PNG file of (H, W, C) uint16, without filters; more: chunks before the pixels."""
    h, w, channels = x.shape
    passes = [x[y::dy, left::dx] for y, left, dy, dx in ADAM7] if interlaced else [x]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in passes for row in part)
    head = struct.pack(">2I5B", w, h, 16, (0, 4, 2, 6)[channels - 1], 0, 0, interlaced)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def write_16(path, x, profile=None, **options):
    """(H, W, C) uint16 as a PNG or TIFF file."""
    if path.suffix == ".png":
        icc = chunk(b"iCCP", b"x\0\0" + zlib.compress(profile)) if profile else b""
        return path.write_bytes(png_of(x, icc, **options))
    icc = [(34675, 7, len(profile), profile, True)] if profile else []
    options = {"extrasamples": ["unassalpha"] * (x.shape[2] == 4), "extratags": icc,
               "photometric": "rgb" if x.shape[2] > 1 else "minisblack"} | options
    tifffile.imwrite(path, x[..., 0] if x.shape[2] == 1 else x, **options)


def stored_16(path):
    """Pixels (H, W, C) by OpenCV's decoder, as uint16; it makes grey with alpha RGBA."""
    x = cv2.imread(str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    assert x.dtype == np.uint16
    return x[..., None] if x.ndim == 2 else x[..., [2, 1, 0, 3][: x.shape[2]]]


def enlarged(x):
    """(H, W, C) uint16 as it should come out: colours of `enlarge`, alpha bicubic."""
    big = x.repeat(4, 0).repeat(4, 1)
    if x.shape[2] in (2, 4):
        alpha = torch.from_numpy(x[..., -1].astype(np.float32) / 65535)[None, None]
        alpha = F.interpolate(alpha, scale_factor=4, mode="bicubic").clamp(0, 1)
        big[..., -1] = (alpha[0, 0] * 65535).round().numpy()
    return big


@pytest.mark.parametrize("suffix, channels", [("png", 1), ("png", 2), ("png", 3), ("png", 4),
                                              ("tif", 1), ("tif", 3), ("tif", 4)])
def test_16_bits_come_out_again(suffix, channels, tmp_path):
    x, a, b = values(channels), tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write_16(a, x, PROFILE)
    photo, _, result = through(a, b)
    assert (photo.bits, photo.is_grey, photo.note) == (16, channels < 3, "")
    read = photo.rgb[0].permute(1, 2, 0).mul(65535).round().numpy()
    np.testing.assert_array_equal(read, np.broadcast_to(x[..., : (channels - 1 | 1)], (9, 14, 3)))
    stored = stored_16(b)
    np.testing.assert_array_equal(stored[..., [0, 3]] if channels == 2 else stored, enlarged(x))
    assert result.info["icc_profile"] == PROFILE and result.size == (56, 36)
    if suffix == "png":
        assert b.read_bytes()[24:26] == bytes([16, (0, 4, 2, 6)[channels - 1]])
        result.verify()  # every chunk's checksum
    else:
        np.testing.assert_array_equal(tifffile.imread(b).reshape(stored.shape), stored)
    again = read_photo(b)
    assert again.bits == 16 and (again.alpha is None) == (channels in (1, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_16_bits(orientation, tmp_path):
    x, exif = values(3), Image.Exif()
    exif[274], exif[271] = orientation, "Maker"
    exif.get_ifd(0x8769)[0xA002] = 14  # PixelXDimension
    (tmp_path / "a.png").write_bytes(png_of(x, chunk(b"eXIf", exif.tobytes()[6:])))
    photo, _, result = through(tmp_path / "a.png", tmp_path / "b.png")
    shown = photo.rgb[0].permute(1, 2, 0).mul(65535).round().numpy()
    np.testing.assert_array_equal(shown, TURNED[orientation](x))
    np.testing.assert_array_equal(stored_16(tmp_path / "b.png"), enlarged(x))
    kept = result.getexif()
    assert (kept[274], kept[271], kept.get_ifd(0x8769)[0xA002]) == (orientation, "Maker", 56)

    for x in (values(3), values(1)):
        write_16(tmp_path / "a.tif", x, extratags=[(274, "H", 1, orientation, True)])
        _, _, result = through(tmp_path / "a.tif", tmp_path / "b.tif")  # a TIFF comes out upright
        stored = stored_16(tmp_path / "b.tif").reshape(*result.size[::-1], -1)
        np.testing.assert_array_equal(stored, enlarged(TURNED[orientation](x)))
        assert result.getexif().get(274, 1) == 1


def test_16_bit_pngs_of_other_kinds(tmp_path):
    x = values(3)
    (tmp_path / "a.png").write_bytes(png_of(x, interlaced=True))
    through(tmp_path / "a.png", tmp_path / "b.png")
    np.testing.assert_array_equal(stored_16(tmp_path / "b.png"), enlarged(x))
    for channels, order in ((3, [0, 1, 2, 3]), (1, [0, 3])):  # tRNS: one colour is transparent
        x = values(channels)
        opaque = np.full((9, 14, 1), 65535, np.uint16)
        opaque[5, 7] = 0
        colour = struct.pack(f">{channels}H", *map(int, x[5, 7]))
        (tmp_path / "a.png").write_bytes(png_of(x, chunk(b"tRNS", colour)))
        through(tmp_path / "a.png", tmp_path / "b.png")
        x[5, 7] = stored_16(tmp_path / "b.png")[22, 30, order[:-1]]
        assert any((x[5, 7] == x[near]).all() for near in ((4, 7), (5, 6), (5, 8), (6, 7)))
        np.testing.assert_array_equal(stored_16(tmp_path / "b.png")[..., order],
                                      enlarged(np.concatenate([x, opaque], 2)))


@pytest.mark.parametrize("options", [
    {"byteorder": ">"}, {"tile": (16, 16)}, {"compression": "zlib", "predictor": True},
    {"bigtiff": True}, {"extratags": [(50000, "H", 1, 3, True)]},
])  # fmt: skip
def test_16_bit_tiffs_of_other_kinds(options, tmp_path, capfd):
    x = values(4, 20, 30)
    write_16(tmp_path / "a.tif", x, **options)
    through(tmp_path / "a.tif", tmp_path / "b.tif")
    assert capfd.readouterr().err == ""  # OpenCV's warnings
    np.testing.assert_array_equal(stored_16(tmp_path / "b.tif"), enlarged(x))


def test_16_bit_tiffs_whose_tags_say_what_the_values_mean(tmp_path):
    def read(x, **options):
        write_16(tmp_path / "a.tif", x, **options)
        photo = read_photo(tmp_path / "a.tif")
        return photo, photo.rgb[0].permute(1, 2, 0).mul(65535).round().numpy()

    x = values(4)
    cv2.imwrite(str(tmp_path / "lzw.tif"), x[..., 2::-1])  # what other programs write
    assert Image.open(tmp_path / "lzw.tif").info["compression"] == "tiff_lzw"
    lzw = read_photo(tmp_path / "lzw.tif").rgb[0].permute(1, 2, 0).mul(65535).round().numpy()
    np.testing.assert_array_equal(lzw, x[..., :3])
    photo, rgb = read(x, extrasamples=["unspecified"])  # no alpha
    np.testing.assert_array_equal(rgb, x[..., :3])
    assert photo.alpha is None
    _, rgb = read(x[..., :1], photometric="miniswhite")
    np.testing.assert_array_equal(rgb[..., :1], 65535 - x[..., :1])
    x[..., 3] = [0] * 7 + [32768] * 7
    multiplied = x.copy()
    multiplied[..., :3] = np.round(x[..., :3] * (x[..., 3:] / 65535.0))
    photo, rgb = read(multiplied, extrasamples=["assocalpha"])
    assert (rgb[:, :7] == rgb[:, 7:8]).all() and np.abs(rgb[:, 7:] - x[:, 7:, :3]).max() <= 1
    np.testing.assert_array_equal(photo.alpha[0, 0].mul(65535).round(), x[..., 3])


def test_16_bits_that_cannot_be_read_are_refused(tmp_path):
    x, file = values(3, 30, 40), tmp_path / "a.tif"
    tifffile.imwrite(file, x.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    with pytest.raises(ValueError, match=r"a\.tif: not a readable photo \(16 bits in one"):
        read_photo(file)
    write_16(file, x)
    file.write_bytes(file.read_bytes()[:3000])  # OpenCV reads the rest as zeros
    with pytest.raises(ValueError, match="truncated"):
        read_photo(file)
    write_16(file, x[..., :1], compression=None)
    data = bytearray(file.read_bytes())
    entry = data.index(struct.pack("<HHI", 258, 3, 1))  # BitsPerSample
    data[entry + 8 : entry + 10] = struct.pack("<H", 12)
    file.write_bytes(data)
    with pytest.raises(ValueError, match="12 bits per channel; convert it to 8 or 16"):
        read_photo(file)


# ------------------------------------------------------------------------- EXIF


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


def run(ckpt, *args, processes=0):
    return run_script("tools.upscale", "--ckpt", ckpt, *args, processes=processes,
                      PYTHONPATH=ckpt.parent, TORCH_HOME=ckpt.parent / "torch",
                      HF_HOME=ckpt.parent / "hf", HF_HUB_OFFLINE=1)


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
    assert "upscale.py: column musiq is skipped" in done.stderr
    assert "1 of 3 photos failed" in done.stderr
    assert "\r" not in done.stderr and sorted(p.name for p in out.iterdir()) == [
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
    assert list(b) == ["file", "status", "width", "height", "tile", "m_lq", "m_bicubic",
                       "m_sr"]
    assert (a["status"], b["status"], c["file"]) == ("failed", "made", "c.JPG")
    assert (b["width"], b["height"], b["tile"]) == ("40", "30", "0")
    assert float(b["m_lq"]) == pytest.approx(100 * image.mean() / 255, abs=1e-3)
    assert float(b["m_sr"]) == pytest.approx(100 * saved.mean() / 255, abs=1e-3)

    # The same command keeps what exists; --overwrite does not
    (photos / "a.png").unlink()
    Image.fromarray(255 - image).save(out / "b.png")
    args = parse_args(["--ckpt", str(path), "--lq", str(photos), "--out", str(out), "--metrics"])
    assert not main(args) and [r["status"] for r in rows()] == ["kept"] * 2
    assert (np.asarray(Image.open(out / "b.png")) == 255 - image).all()
    args.overwrite = True
    assert not main(args) and [r["status"] for r in rows()] == ["made"] * 2
    assert (np.asarray(Image.open(out / "b.png")) == saved).all()

    # One photo more, given alone: the others' rows stay, as long as their results do
    (out / "c.JPG").unlink()
    args.lq = str(tmp_path / "single.png")
    Image.fromarray(image).save(args.lq)
    assert not main(args)
    assert [r["file"] for r in rows()] == ["b.png", "single.png"]
    assert "# photos that are not in --lq: from earlier calls" in (out / "scores.csv").read_text()


def test_an_error_of_torch_concerns_its_photo_alone(tmp_path, capsys):
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for i, file in enumerate(files):
        Image.new("RGB", (8 + i, 8)).save(file)

    def upscale(x):
        if x.shape[-1] == 8:
            raise RuntimeError("CUDA error of this size\nwith advice")
        if x.shape[-1] == 9:
            raise MemoryError  # Python's own has no message
        return enlarge(x), 0

    rows = upscale_photos(files, tmp_path / "sr", upscale, {}, quiet=True)
    assert [row["status"] for row in rows] == ["failed", "failed", "made"]
    assert [row["width"] for row in rows] == ["8", "9", "10"]
    assert capsys.readouterr().err == (
        f"{files[0]}: RuntimeError: CUDA error of this size with advice\n"
        f"{files[1]}: MemoryError\n")


def test_of_an_animation_the_first_picture_is_made_with_a_note(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    files = [tmp_path / name for name in ("a.png", "b.webp", "c.tif")]
    for file in files:
        frames[0].save(file, save_all=True, append_images=frames[1:])
    rows = upscale_photos(files, tmp_path / "sr", lambda x: (enlarge(x), 0), {}, quiet=True)
    assert [row["status"] for row in rows] == ["made"] * 3
    assert capsys.readouterr().err == "".join(
        f"{file}: only the first of its 3 pictures is read\n" for file in files)


def test_a_failing_metric_leaves_its_scores_empty(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def too_small(x):
        if x.shape[-1] < 32:
            raise ValueError("metric q: needs 32 px")
        return x.mean((1, 2, 3))

    rows = upscale_photos([tmp_path / "a.png"], tmp_path / "sr", lambda x: (enlarge(x), 0),
                          {"q": too_small, "m": lambda x: x.mean((1, 2, 3))}, quiet=True)
    assert rows == [{"file": "a.png", "width": "8", "height": "8", "tile": "0", "status": "made",
                     "m_lq": "0.000000", "q_bicubic": "0.000000", "m_bicubic": "0.000000",
                     "q_sr": "0.000000", "m_sr": "0.000000"}]
    assert capsys.readouterr().err == f"{tmp_path}/a.png: no score (metric q: needs 32 px)\n"


def test_free_memory_is_the_machines_or_the_containers(tmp_path):
    assert tiles.free_memory(tmp_path) is None  # not Linux
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\nX: 1 kB\n")
    assert tiles.free_memory(tmp_path) == 8000 * 1024
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.current").write_text("3000000\n")
    (cgroup / "memory.stat").write_text("anon 2500000\nfile 500000\ninactive_file 400000\n")
    for limit, free in (("max", 8000 * 1024), ("5000000", 2400000), ("1000000", 0)):
        (cgroup / "memory.max").write_text(f"{limit}\n")
        assert tiles.free_memory(tmp_path) == free


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no limit of this kind")
def test_a_cpu_refuses_memory_so_that_tiles_are_used():
    """About 190 MB are left to a network that takes 400 MB for the whole image, 90 MB in tiles."""
    code = """
import torch
from models import tiles

torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Upsample(scale_factor=4), torch.nn.Conv2d(3, 90, 1),
                          torch.nn.Conv2d(90, 3, 1))
lq = torch.rand(1, 3, 256, 256)
with torch.no_grad():
    right = torch.cat([net(x) for x in lq.split(8, 2)], 2)
tiles.limit_memory(190e6 / tiles.free_memory())
sr, tile = tiles.upscale(net, lq, quiet=True)
print(tile, (sr - right).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    tile, difference = done.stdout.split()
    assert 64 <= int(tile) <= 128 and float(difference) < 1e-5


def test_two_processes_share_the_photos(ckpt, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, name in enumerate("abe"):  # two processes: a, c, e and b, d
        image = smooth_image(np.random.default_rng(i), 20 + 4 * i, 40)
        Image.fromarray(image).save(photos / f"{name}.png")
    (photos / "c.png").write_bytes(b"no PNG")
    (photos / "d.png").write_bytes((photos / "e.png").read_bytes()[:300])
    scores = []
    for processes in (0, 2):
        out = tmp_path / f"by{processes}"
        out.mkdir()
        Image.new("RGB", (160, 96)).save(out / "b.png")
        done = run(ckpt[0], "--lq", photos, "--out", out, "--extra", "m=own_metric:mean",
                   processes=processes)
        assert done.returncode == 1, done.stderr
        for text in ("column musiq is skipped", "column topiq is skipped", "d.png: not a read",
                     "c.png: not a read", "1 existing files kept", "2 of 5 photos failed"):
            assert done.stderr.count(text) == 1, done.stderr
        assert "\r" not in done.stderr  # no bar off a terminal
        assert "stopped" not in done.stderr
        if processes:  # torchrun's summary of the ranks
            assert "exitcode  : 1" in done.stderr and "exitcode  : -" not in done.stderr
        scores.append((out / "scores.csv").read_bytes())
    assert scores[0] == scores[1]
    head, _, *rows = [x for x in scores[0].decode().splitlines() if not x.startswith("# status")]
    assert b"# status kept: made earlier, by whichever network" in scores[0] and "net.pt" in head
    assert [row.split(",")[:2] for row in rows] == [
        [f"{name}.png", status] for name, status in zip(
            "abcde", ("made", "kept", "failed", "failed", "made"), strict=True)]
    for path in (tmp_path / "by0").iterdir():
        assert path.read_bytes() == (tmp_path / "by2" / path.name).read_bytes()


@pytest.mark.parametrize("more, message", [
    (("--lq", "{tmp}/nothing", "--out", "{tmp}/sr"), "nothing: no such photo or folder"),
    (("--lq", "{tmp}", "--out", "{tmp}"), "holds the photos themselves"),
    (("--lq", "{tmp}/a.png", "--out", "{tmp}/b.png"), "give a folder"),
    (("--lq", "{tmp}/a.png", "--out", "{tmp}/sr", "--tile", "100"), "--tile 100"),
    (("--lq", "{tmp}/a.png", "--out", "{tmp}/sr", "--metrics", "psnr"), "needs a ground truth"),
    (("--lq", "{tmp}/a.png", "--out", "{tmp}/sr", "--extra", "q"), "--extra q: write NAME=VALUE"),
    (("--export", "{tmp}/net.bin"), "write .pth"),
    (("--export", "{tmp}/net.pth", "--lora", "{ckpt}"), "not the lora.pt"),
])  # fmt: skip
def test_bad_arguments_are_refused(ckpt, tmp_path, more, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    args = [m.format(tmp=tmp_path, ckpt=ckpt[0]) for m in more]
    with pytest.raises((ValueError, OSError), match=message):
        main(parse_args(["--ckpt", str(ckpt[0]), *args]))


@pytest.mark.parametrize("args, flag", [
    ("--export d.pth --lora-scale 0.5", "--lora-scale"),
    ("--lq b --out c --lora-scale 0", "--lora-scale"),
    ("--export d.pth --onnx-size 8 8", "--onnx-size"),
    ("--lq b --out c --onnx-size 8 8", "--onnx-size"),
    ("--export d.pth --tile 64", "--tile"),
    ("--export d.pth --tile 0", "--tile"),
    ("--export d.pth --overwrite", "--overwrite"),
])
def test_a_flag_that_would_do_nothing_is_refused(args, flag, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--ckpt", "a.pt", *args.split()])
    assert caught.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("args", ["", "--lq b", "--out c", "--lq b --out c --export d.pth",
                                  "--lq b --export d.pth", "--out c --export d.pth"])
def test_photos_and_export_do_not_mix(args, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--ckpt", "a.pt", *args.split()])
    assert caught.value.code == 2
    assert "give --lq with --out, or --export alone" in capsys.readouterr().err


def test_metrics_of_photos_by_default():
    args = ["--ckpt", "a.pt", "--lq", "b", "--out", "c"]
    assert parse_args(args).metrics == ["musiq", "topiq"]
    assert parse_args([*args, "--metrics"]).metrics == []


# ------------------------------------------------------------------------- what no pixel shows


def test_hidden_colours_do_not_leak_into_the_edges(tmp_path):
    """A white disc on transparent black had a dark rim, 172 over white."""
    y, x = np.mgrid[:32, :32]
    disc = ((y - 16) ** 2 + (x - 16) ** 2 < 100).astype(np.uint8) * 255
    Image.fromarray(np.dstack([disc] * 4)).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    smooth = F.interpolate(photo.rgb, scale_factor=4, mode="bicubic")
    write_photo(photo, smooth, tmp_path / "b.png")
    result = np.asarray(Image.open(tmp_path / "b.png")).astype(float)
    over_white = result[..., :3] * result[..., 3:] / 255 + 255 - result[..., 3:]
    assert over_white.min() == 255
    Image.new("RGBA", (8, 8)).save(tmp_path / "none.png")  # nothing is visible
    assert (read_photo(tmp_path / "none.png").rgb == 0).all()


def test_colour_chunks_and_resolution_are_kept(tmp_path):
    source = pixels("RGB")
    kept = (chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"cHRM", struct.pack(">8I", *range(8)))
            + chunk(b"cICP", bytes([9, 16, 0, 1])) + chunk(b"pHYs", struct.pack(">IIB", 7, 9, 1)))
    source.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + kept + chunk(b"tIME", bytes(7)) + data[33:])
    (tmp_path / "16.png").write_bytes(png_of(values(3), kept))
    for name in ("a", "16"):
        through(tmp_path / f"{name}.png", tmp_path / f"{name}-4.png")
        result = (tmp_path / f"{name}-4.png").read_bytes()
        assert result[33:].startswith(kept) and b"tIME" not in result
    source.save(tmp_path / "a.jpg", dpi=(240, 120))
    source.save(tmp_path / "a.tif", dpi=(240, 120))
    write_16(tmp_path / "16.tif", values(3), resolution=(240, 120), resolutionunit="INCH")
    for name in ("a.jpg", "a.tif", "16.tif"):
        assert through(tmp_path / name, tmp_path / f"4{name}")[2].info["dpi"] == (240, 120), name
    pixels("RGB").save(tmp_path / "none.jpg")
    assert "dpi" not in through(tmp_path / "none.jpg", tmp_path / "4none.jpg")[2].info


def test_the_baseline_has_the_size_of_the_result(tmp_path):
    Image.fromarray(smooth_image(np.random.default_rng(0), 16, 20)).save(tmp_path / "a.png")
    row, = upscale_photos([tmp_path / "a.png"], tmp_path / "sr", lambda x: (enlarge(x), 0),
                          {"n": lambda x: torch.tensor([float(x[0, 0].numel())])}, quiet=True)
    assert (row["n_lq"], row["n_bicubic"], row["n_sr"]) == (
        "320.000000", "5120.000000", "5120.000000")


def test_an_error_of_any_kind_concerns_its_photo_alone(tmp_path, capsys):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    calls = []

    def fails_once(x):
        calls.append(x)
        if len(calls) == 1:
            raise ZeroDivisionError("odd \x1b[31m")
        return enlarge(x), 0

    files = [tmp_path / "a.png", tmp_path / "b.png"]
    rows = upscale_photos(files, tmp_path / "sr", fails_once, {}, quiet=True)
    assert [row["status"] for row in rows] == ["failed", "made"]
    assert capsys.readouterr().err == f"{files[0]}: ZeroDivisionError: odd \\x1b[31m\n"
