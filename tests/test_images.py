"""models/images.py, and photos as data: which files count, and what is read of them."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from make_data import make_hggt, smooth_image
from PIL import Image, ImageCms
from scripts import run_script

import train_sr
from models import hggt, images
from models.dataset import MultiGTDataset
from models.hggt import check_data, index_sets, load_sets
from models.images import find_png, is_plain_png, list_images, naming, png_size, read_rgb
from models.photos import photo_size, read_photo, read_srgb
from models.quality import score_folder
from models.scores import read_or_error
from models.testset import find_hggt_test, find_realsr
from paper.user_study import find_pairs
from tools.upscale import find_photos

RNG = np.random.default_rng(0)
IMAGE = smooth_image(RNG, 40, 48)


def png(image=IMAGE, *chunks):
    """A PNG file, with further chunks (kind, data) after its header."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    data = buffer.getvalue()
    return data[:33] + b"".join(map(chunk, chunks)) + data[33:]


def chunk(kind_and_data):
    kind, data = kind_and_data
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I",
                                                                    zlib.crc32(kind + data))


def write(folder: Path, *names: str, data: bytes | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(png() if data is None else data)


# ------------------------------------------------------------------------- which files


SYSTEM = ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg")


def test_suffixes_count_in_any_case_and_system_files_nowhere(tmp_path):
    write(tmp_path, "b.PNG", "a.png", "c.Png", "d.JPG", "e.tga", "f.HEIC", "notes.txt", *SYSTEM)
    write(tmp_path / "@eaDir", "a.png")
    write(tmp_path / "__MACOSX", "a.png")
    chosen, others = list_images(tmp_path)
    assert [f.name for f in chosen] == ["a.png", "b.PNG", "c.Png"]
    assert [f.name for f in others] == ["d.JPG", "e.tga", "f.HEIC"]
    assert find_png(tmp_path, "b").name == "b.PNG" and find_png(tmp_path, "z").name == "z.png"


def test_a_flat_folder_of_all_kinds_trains_on_all_and_names_the_rest(tmp_path, capsys):
    """Of 2 .png, 5 .jpg, 5 .PNG, training saw 2."""
    for i in range(5):
        write(tmp_path, f"upper{i}.PNG")
        Image.fromarray(IMAGE).save(tmp_path / f"photo{i}.jpg", quality=95)
    write(tmp_path, "a.png", "b.png", "x.bmp", "y.heic", *SYSTEM)
    sets = load_sets(tmp_path)
    assert len(sets.names) == 12 and (sets.sizes == (40, 48)).all()
    assert capsys.readouterr().out == (
        f"{tmp_path}: 7 PNG, 5 JPEG; not used: 1 BMP, 1 HEIC (x.bmp, y.heic)\n")
    draws = MultiGTDataset(sets, None, 32, 0, lambda image, *_: image[::4, ::4])
    assert {draws[i]["gts"].shape for i in range(12)} == {(1, 3, 32, 32)}
    assert check_data(tmp_path) == [] and "5 JPEG; not used" in capsys.readouterr().out
    write(tmp_path, "a.jpg")
    assert index_sets(tmp_path)[1] == [
        f"{tmp_path}/a.png: the same name as a.jpg; rename one"]


def test_a_folder_of_other_kinds_alone_is_refused(tmp_path):
    write(tmp_path, "a.heic", "b.heic")
    with pytest.raises(ValueError, match="2 HEIC; convert them to PNG, JPEG, WebP or TIFF"):
        load_sets(tmp_path)


def test_a_multi_gt_set_takes_png_in_any_case_and_names_other_kinds(tmp_path):
    labels = make_hggt(tmp_path, n=3)
    folder = tmp_path / "Train/images/0-4"
    (folder / "original/img00.png").rename(folder / "original/img00.PNG")
    (folder / "02/img01_02.png").rename(folder / "02/img01_02.Png")
    write(folder / "03", *SYSTEM)
    sets = load_sets(tmp_path)
    assert (sets.labels == labels).all() and sets.paths[0][0].endswith("img00.PNG")
    Image.fromarray(IMAGE).save(folder / "01/img00_01.jpg")
    write(folder / "original", "img00.png")
    problems = index_sets(tmp_path)[1]
    assert f"{folder}/01/img00_01.jpg: not a PNG; convert it to 8-bit RGB PNG" in problems
    assert any("the same name as" in problem for problem in problems)


def test_test_sets_take_png_in_any_case_and_name_other_kinds(tmp_path):
    gt, lq = tmp_path / "gt", tmp_path / "lq"
    write(gt, "a.PNG", "b.png")
    write(lq, "a.PNG", data=png(IMAGE[::4, ::4]))
    write(lq, "b.jpg")
    sets, files, problems = find_hggt_test(str(gt), str(lq))
    assert sets.names == ["a", "b"] and files[0] == f"{lq}/a.PNG"
    assert problems == [f"{lq}/b.png: no such LQ image ({lq}/b.jpg is no PNG; convert it to 8-bit "
                        "RGB PNG)"]
    Image.fromarray(IMAGE).save(gt / "c.jpg")
    write(lq, "c.png", data=png(IMAGE[::4, ::4]))
    problems = find_hggt_test(str(gt), str(lq))[2]
    assert f"{gt}/c.jpg: not a PNG file; convert it to 8-bit RGB PNG" in problems
    realsr = tmp_path / "RealSR/Canon/Test/4"
    write(realsr, "1_HR.PNG", "2_HR.png")
    write(realsr, "1_LR4.png", "2_LR4.PNG", "._1_LR4.png", data=png(IMAGE[::4, ::4]))
    sets, files, problems = find_realsr(str(tmp_path / "RealSR"))
    assert sets.names == ["Canon/Test/4/1", "Canon/Test/4/2"] and not problems
    assert files == [f"{realsr}/1_LR4.png", f"{realsr}/2_LR4.PNG"]


def test_a_user_study_takes_png_in_any_case_and_names_other_kinds(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, level in zip(folders, (0, 9), strict=True):
        for i, suffix in enumerate(("png", "PNG", "png", "PNG", "png", "png")):
            write(folder, f"{i}.{suffix}", data=png(IMAGE // 2 + level + i))
        write(folder, *SYSTEM)
    assert len(find_pairs(folders)[0]) == 6
    write(folders[1], "7.jpg")
    with pytest.raises(ValueError, match=r"b/7.jpg: not a PNG; convert it to 8-bit RGB PNG"):
        find_pairs(folders)


def test_photos_are_counted_by_kind_and_the_others_named(tmp_path, capsys):
    write(tmp_path, "a.png", "b.JPG", "c.jfif", "d.bmp", "e.gif", "f.heic", "g.avif", "h.jp2",
          "i.tga", "readme.md", *SYSTEM)
    found = find_photos(tmp_path, tmp_path / "out")
    assert [f.name for f in found] == ["a.png", "b.JPG", "c.jfif"]
    assert capsys.readouterr().out == (
        f"{tmp_path}: 2 JPEG, 1 PNG; not used: 1 BMP, 1 GIF, 1 HEIC, 1 AVIF, 1 JP2, 1 TGA (d.bmp, "
        "e.gif, f.heic, g.avif, h.jp2, ...)\n")
    with pytest.raises(FileNotFoundError, match=r"no photos; not used: 1 GIF \(a.gif\); give"):
        write(tmp_path / "gif", "a.gif")
        find_photos(tmp_path / "gif", tmp_path / "out")


# ------------------------------------------------------------------------- photos as data


def test_photos_are_turned_upright_and_become_8_bit_srgb(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # stored on its side
    for suffix in ("png", "tif", "webp", "jpg"):
        path = tmp_path / f"a.{suffix}"
        options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}
        options = options.get(suffix, {})
        Image.fromarray(IMAGE).save(path, exif=exif, **options)
        assert photo_size(path) == (48, 40)
        difference = read_srgb(path).astype(int) - np.rot90(IMAGE, -1)
        assert abs(difference).max() <= (12 if suffix == "jpg" else 0), suffix


def test_grey_palette_alpha_and_16_bits_become_rgb(tmp_path):
    grey = np.asarray(Image.fromarray(IMAGE).convert("L"))
    Image.fromarray(grey).save(tmp_path / "l.png")
    assert (read_srgb(tmp_path / "l.png") == grey[..., None]).all()
    palette = Image.fromarray(IMAGE).quantize(16)
    palette.save(tmp_path / "p.png")
    assert (read_srgb(tmp_path / "p.png") == np.asarray(palette.convert("RGB"))).all()
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "i16.png")
    assert (read_srgb(tmp_path / "i16.png") == grey[..., None]).all()
    rgba = np.dstack([IMAGE, np.where(np.arange(48) < 24, 0, 128)[None].repeat(40, 0)])
    Image.fromarray(rgba.astype(np.uint8)).save(tmp_path / "rgba.png")
    over_white = read_srgb(tmp_path / "rgba.png")
    assert (over_white[:, :24] == 255).all()
    half = IMAGE[:, 24:] * (128 / 255) + 255 * (1 - 128 / 255)
    assert abs(over_white[:, 24:] - half).max() <= 0.51


def test_colour_profiles_are_applied_and_what_cannot_be_is_refused(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(IMAGE).save(tmp_path / "same.png", icc_profile=srgb)
    assert abs(read_srgb(tmp_path / "same.png").astype(int) - IMAGE).max() <= 1
    linear = bytearray(srgb)
    at = linear.index(b"para", 128)  # the tone curve: gamma 1 in place of sRGB's
    linear[at : at + 12] = b"curv" + bytes(4) + struct.pack(">I", 0)
    Image.fromarray(IMAGE).save(tmp_path / "linear.png", icc_profile=bytes(linear))
    assert (read_srgb(tmp_path / "linear.png").astype(int) - IMAGE).mean() > 10
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(IMAGE).save(tmp_path / "lab.jpg", icc_profile=lab)
    Image.fromarray(IMAGE).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name, reason in (("lab.jpg", "its colour profile cannot be used"),
                         ("cmyk.jpg", "mode CMYK; convert it to RGB")):
        for read in (photo_size, read_srgb):
            with pytest.raises(ValueError, match=rf"{name}: .*{reason}"):
                read(tmp_path / name)
    problems = index_sets(tmp_path)[1]  # at the start, before any training
    assert len(problems) == 2 and "cmyk.jpg" in problems[0] and "lab.jpg" in problems[1]


# ------------------------------------------------------------------------- without kornia_rs


def raw_png(colour, bits, rows, *chunks, interlaced=0, cut=0):
    """A PNG of unfiltered rows (bytes each), of IMAGE's size; cut: bytes of its stream left out."""
    size = struct.pack(">2I5B", IMAGE.shape[1], IMAGE.shape[0], bits, colour, 0, 0, interlaced)
    stream = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", size), *chunks, (b"IDAT", stream[: len(stream) - cut]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, parts))


def kinds_of_png():
    """{name: file} of every kind of pixels that are read as photos."""
    alpha, grey = (IMAGE[..., :1] // 2, IMAGE[..., :1])
    palette = RNG.integers(0, 256, 768, np.uint8).tobytes()
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2))  # Adam7, of the PNG specification
    turned = (b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")  # orientation 6
    deep = (IMAGE.astype(">u2") * 257 + 1).clip(0, 65535).astype(">u2")
    return {
        "rgb": raw_png(2, 8, map(np.ndarray.tobytes, IMAGE)),
        "filtered": png(),
        "interlaced": raw_png(2, 8, (row.tobytes() for x, y, dx, dy in passes
                                     for row in IMAGE[y::dy, x::dx]), interlaced=1),
        "turned": raw_png(2, 8, map(np.ndarray.tobytes, IMAGE), turned),
        "transparent": raw_png(2, 8, map(np.ndarray.tobytes, IMAGE),
                               (b"tRNS", IMAGE[0, 0].astype(">u2").tobytes())),
        "gamma": png(IMAGE, (b"gAMA", struct.pack(">I", 100_000))),
        "grey": raw_png(0, 8, map(np.ndarray.tobytes, grey)),
        "grey alpha": raw_png(4, 8, map(np.ndarray.tobytes, np.dstack([grey, alpha]))),
        "rgba": raw_png(6, 8, map(np.ndarray.tobytes, np.dstack([IMAGE, alpha]))),
        "palette": raw_png(3, 8, map(np.ndarray.tobytes, grey), (b"PLTE", palette)),
        "16 bits": raw_png(2, 16, map(np.ndarray.tobytes, deep)),
        "16 bits grey": raw_png(0, 16, map(np.ndarray.tobytes, deep[..., :1])),
    }


def test_without_kornia_rs_every_png_has_the_same_pixels(tmp_path, monkeypatch):
    for name, data in kinds_of_png().items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        results = []
        for decode in (images.decode_image_png_u8, None):
            monkeypatch.setattr(images, "decode_image_png_u8", decode)
            for read in (read_srgb, read_rgb):
                try:
                    results.append((read(path).dtype, read(path).tolist()))
                except ValueError as error:
                    results.append(str(error))
            monkeypatch.undo()
        assert results[:2] == results[2:] and isinstance(results[0], tuple), name
        assert isinstance(results[1], tuple) is (data[24:26] == b"\x08\2"), results[1]  # 8-bit RGB
        if isinstance(results[1], tuple):
            assert results[1] == (np.uint8, IMAGE.tolist()), name


def damaged_pngs():
    rows = [row.tobytes() for row in IMAGE]
    sound = raw_png(2, 8, rows)
    middle = len(sound) // 2
    return {
        "flipped bit": sound[:middle] + bytes([sound[middle] ^ 4]) + sound[middle + 1 :],
        "cut": sound[:middle],
        "cut but for its end": sound[:middle] + sound[-12:],
        "zeros": sound[:60] + bytes(30) + sound[90:],
        "no pixels": sound[:33] + sound[-12:],
        "too few rows": raw_png(2, 8, rows[:9]),
        "too few bytes": raw_png(2, 8, rows, cut=100),
        "no end": sound[:-12],
        "unknown filter": raw_png(2, 8, rows).replace(
            sound[33:-12], chunk((b"IDAT", zlib.compress(b"".join(b"\x09" + r for r in rows))))),
        "unknown compression": png(IMAGE)[:26] + b"\1\0\0",
    }


@pytest.mark.parametrize("name", damaged_pngs())
def test_a_damaged_png_is_refused_by_either_decoder(name, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(damaged_pngs()[name])
    for decode in (images.decode_image_png_u8, None):
        monkeypatch.setattr(images, "decode_image_png_u8", decode)
        with pytest.raises(ValueError, match="a.png: ") as error:
            read_rgb(path)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------- odd and broken files


def test_an_animated_png_is_its_first_picture_for_check_and_training(tmp_path):
    first, second = Image.fromarray(IMAGE), Image.fromarray(255 - IMAGE)
    first.save(tmp_path / "a.png", save_all=True, append_images=[second], duration=50)
    assert (read_rgb(tmp_path / "a.png") == IMAGE).all()
    assert (read_or_error(str(tmp_path / "a.png")) == IMAGE).all()
    assert check_data(tmp_path) == []
    draws = MultiGTDataset(load_sets(tmp_path), None, 32, 0, lambda image, *_: image[::4, ::4])
    assert draws[0]["gts"].shape == (1, 3, 32, 32)


def test_a_small_file_that_claims_many_pixels_is_refused_at_once(tmp_path):
    head = chunk((b"IHDR", struct.pack(">2I5B", 60000, 60000, 8, 2, 0, 0, 0)))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk((b"IDAT", zlib.compress(b"")))
                     + chunk((b"IEND", b"")))
    for read in (png_size, read_rgb, read_photo, photo_size, read_srgb):
        with pytest.raises(ValueError, match="bytes cannot hold 60000x60000 pixels; copy it again"):
            read(path)
    assert "cannot hold 60000x60000" in str(read_or_error(str(path)))


def test_a_large_photo_is_legal(tmp_path, monkeypatch):
    """196 megapixels are beyond Pillow's own bound; the file's size tells that they are there."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice of it
    write(tmp_path, "a.png", data=png(IMAGE.repeat(2, 0)))
    assert read_or_error(str(tmp_path / "a.png")).shape == (80, 48, 3)
    assert read_photo(tmp_path / "a.png").rgb.shape == (1, 3, 80, 48)
    monkeypatch.setattr(images, "PIXELS_IN_ANY_FILE", 0)
    size = os.path.getsize(tmp_path / "a.png")
    monkeypatch.setattr(images, "PIXELS_PER_BYTE", 80 * 48 / size)
    assert png_size(tmp_path / "a.png") == (80, 48)
    monkeypatch.setattr(images, "PIXELS_PER_BYTE", 80 * 48 / size * 0.99)
    with pytest.raises(ValueError, match="cannot hold 48x80"):
        png_size(tmp_path / "a.png")


def test_whatever_a_decoder_raises_becomes_one_line():
    class Panic(BaseException):
        """As pyo3's, of kornia_rs."""

    for error in (Panic("rust\npanicked"), MemoryError(), SyntaxError("broken PNG"), OSError("x")):
        line = "^a.png: unreadable image .*; copy it again$"
        with pytest.raises(ValueError, match=line) as e, naming("a.png"):
            raise error
        assert "\n" not in str(e.value)
    for error in (KeyboardInterrupt(), FileNotFoundError(2, "none", "a.png")):
        with pytest.raises(type(error)), naming("a.png"):
            raise error


@pytest.mark.slow
def test_names_that_are_no_text_lose_nothing(tmp_path):
    """caf\\xe9.png lost the scores of all photos; a line separator cut a row in two."""
    names = [b"caf\xe9.png", "line\u2028end.png".encode(), b"new\nline.png", b"#1.png"]
    photos = tmp_path / "photos"
    write(photos, *map(os.fsdecode, names))
    net = Path(tmp_path, "net.py")
    net.write_text("import torch\nfrom models.checkpoint import save_atomic\n"
                   "from models.rrdb import RRDBNet\n"
                   "net = RRDBNet(num_feat=4, num_block=1, num_grow_ch=4)\n"
                   f"save_atomic({{'params': net.state_dict()}}, {str(tmp_path / 'net.pth')!r})\n")
    run_script(net)
    done = run_script("tools.upscale", "--ckpt", tmp_path / "net.pth", "--lq", photos, "--out",
                      tmp_path / "sr", "--metrics", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    made = {os.fsencode(p.name) for p in (tmp_path / "sr").iterdir()}
    assert made == {*names, b"scores.csv"}
    from models.checkpoint import read_csv

    rows, _ = read_csv(tmp_path / "sr/scores.csv")
    assert {os.fsencode(row["file"]) for row in rows} == {*names}
    assert {row["status"] for row in rows} == {"made"}


def test_small_photos_are_left_out_and_shrunk_ones_are_means(tmp_path, monkeypatch, capsys):
    for i, size in enumerate(((40, 48), (71, 90), (16, 200), (31, 33))):
        write(tmp_path / "photos", f"{i}.png", data=png(smooth_image(RNG, *size)))
    monkeypatch.chdir(tmp_path)
    flags = ["--net", "rrdb_tiny", "--data", "photos", "--init", "none", "--perceptual",
             "laplacian", "--steps", "1", "--num-workers", "0", "--ema-warmup"]

    def load(*more):
        args = train_sr.parse_args([*flags, *more])
        train_sr.resolve_args(args)
        assert args.sampler == "origs_only"  # a flat folder's default
        return train_sr.load_data(args)[0]

    sets = load("--patch-size", "32")
    assert sets.names == ["0", "1"] and sets.sizes.tolist() == [[40, 48], [71, 90]]
    assert "2 of 4 photos are smaller than --patch-size 32 and left out" in capsys.readouterr().out
    half = load("--patch-size", "32", "--shrink", "2")
    assert half.names == ["1"] and half.sizes.tolist() == [[35, 45]]
    whole = read_rgb(half.paths[0][0])[:70].astype(float)
    mean = whole.reshape(35, 2, 45, 2, 3).mean((1, 3))
    assert abs(half.read(half.paths[0][0]) - mean).max() <= 0.5
    with pytest.raises(ValueError, match="all 4 photos are smaller than --patch-size 96; give"):
        load("--patch-size", "96")
    train_sr.main(train_sr.parse_args([*flags, "--patch-size", "32", "--shrink", "2",
                                       "--cache", "cache", "--batch-size", "2", "--out", "run"]))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_broken_link_is_named(tmp_path):
    write(tmp_path / "photos", "a.png", "b.png")
    (tmp_path / "photos/c.png").symlink_to("/mnt/unmounted/c.png")
    problems = index_sets(tmp_path / "photos")[1]
    assert len(problems) == 1 and "c.png" in problems[0] and "No such file" in problems[0]


def test_an_orientation_anywhere_in_a_png_counts(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    data = png()
    late = data[:-12] + chunk((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))) + data[-12:]
    xmp = (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-'
           b'rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
           b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>')
    text = png(IMAGE, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    plain = png(IMAGE, (b"tEXt", b"Software\0a program"))
    for name, content, turned in (("late", late, True), ("xmp", text, True),
                                  ("plain", plain, False)):
        write(tmp_path, f"{name}.png", data=content)
        path = tmp_path / f"{name}.png"
        assert is_plain_png(path) is not turned
        expected = np.rot90(IMAGE, -1) if turned else IMAGE
        assert (read_srgb(path) == expected).all(), name
        assert hggt._photo_size(path) == expected.shape[:2]


def test_scores_of_another_users_folder_are_kept_in_the_run(tmp_path, monkeypatch):
    make_hggt(tmp_path / "HGGT", n=1)
    sets = load_sets(tmp_path / "HGGT")
    assert score_folder(sets, tmp_path / "run") == tmp_path / "HGGT/.scores"
    (tmp_path / "HGGT/.scores").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".scores"))
    assert score_folder(sets, tmp_path / "run") == tmp_path / "run/.scores"
