"""evaluate.py: PSNR and SSIM against an independent computation, the tables, the bad inputs."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import make_hggt, smooth_image, write_votes
from PIL import Image
from scipy.signal import convolve2d

import evaluate
from models.checkpoint import save_atomic
from models.iqa import MetricUnavailable
from models.rrdb import RRDBNet
from models.swinir import SwinIR

ROOT = Path(__file__).resolve().parent.parent
OWN_METRIC = """
import torch
class Mean(torch.nn.Module):
    def forward(self, x):
        return 100 * x.mean((1, 2, 3))
def mean():
    return Mean()
class Darkness(Mean):
    def forward(self, x):
        return -super().forward(x)
def darkness():
    return Darkness()
"""


# ------------------------------------------------------------------------- PSNR and SSIM


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two uint8 (H, W, 3) images by a full 2-D Gaussian convolution, in float64."""
    i = np.arange(11) - 5
    window = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    channels = []
    for c in range(3):
        a, b = x[..., c].astype(np.float64), y[..., c].astype(np.float64)
        ma, mb, aa, bb, ab = (convolve2d(z, window, "valid") for z in (a, b, a * a, b * b, a * b))
        c1, c2 = 6.5025, 58.5225
        s = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
        s /= (ma**2 + mb**2 + c1) * (aa - ma**2 + bb - mb**2 + c2)
        channels.append(s.mean())
    return float(np.mean(channels))


def psnr_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    return float(20 * np.log10(255 / np.sqrt(np.mean((x.astype(float) - y.astype(float)) ** 2))))


def as_tensor(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def test_psnr_and_ssim_equal_an_independent_computation():
    rng = np.random.default_rng(0)
    x = smooth_image(rng, 40, 52)
    noisy = np.clip(x + rng.normal(0, 20, x.shape), 0, 255).astype(np.uint8)
    pairs = [
        (x, noisy), (x, np.clip(x.astype(int) + 3, 0, 255).astype(np.uint8)),
        (x, smooth_image(rng, 40, 52)), (x, 255 - x),  # unrelated; negative structure
        (rng.integers(0, 256, x.shape, np.uint8), rng.integers(0, 256, x.shape, np.uint8)),
    ]  # fmt: skip
    sr, gt = as_tensor(*(a for a, _ in pairs)), as_tensor(*(b for _, b in pairs))
    for border in (0, 4):
        inner = [[z[border : 40 - border, border : 52 - border] for z in pair] for pair in pairs]
        ours = evaluate.psnr(sr, gt, border)
        assert ours.shape == (5,) and ours.dtype == torch.float64
        np.testing.assert_allclose(ours, [psnr_by_hand(*pair) for pair in inner], atol=1e-6)
        ours = evaluate.ssim(sr, gt, border)
        assert ours.shape == (5,) and ours.dtype == torch.float64
        np.testing.assert_allclose(ours, [ssim_by_hand(*pair) for pair in inner], atol=1e-6)
    assert evaluate.ssim(sr, gt, 4)[3] < 0


def test_psnr_and_ssim_of_known_values():
    black, grey = torch.zeros(1, 3, 20, 20), torch.full((1, 3, 20, 20), 1 / 255)
    assert evaluate.psnr(black, grey, 4).item() == pytest.approx(48.130803609)  # 20 log10(255)
    assert evaluate.psnr(black, black + 1, 4).item() == pytest.approx(0)
    assert evaluate.ssim(black, grey, 4).item() == pytest.approx(6.5025 / 7.5025)
    assert evaluate.psnr(grey, grey, 4).item() == float("inf")
    assert evaluate.ssim(grey, grey, 4).item() == pytest.approx(1)


def test_psnr_and_ssim_round_clip_and_crop():
    gt = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    assert evaluate.psnr(gt + 0.4 / 255, gt, 0).item() == float("inf")  # below half a level
    assert evaluate.psnr(gt + 0.6 / 255, gt, 0).item() < 50
    white = torch.ones(1, 3, 24, 24)
    assert evaluate.psnr(white + 0.5, white, 0).item() == float("inf")
    framed = gt.clone()
    framed[..., :4, :], framed[..., -4:, :], framed[..., :4], framed[..., -4:] = 0, 0, 0, 0
    assert evaluate.psnr(framed, gt, 4).item() == float("inf")
    assert evaluate.psnr(framed, gt, 3).item() < 50 and evaluate.ssim(framed, gt, 4) == 1
    with pytest.raises(ValueError, match="11x11"):
        evaluate.ssim(gt[..., :18], gt[..., :18], 4)


# ------------------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tiny random networks and a Test-100 of three sets; in the last none is Positive."""
    root = tmp_path_factory.mktemp("evaluate")
    make_hggt(root / "gt", n=3, test=True)
    for annotator in "ABC":
        votes = ["Negative", "Similar", "Similar", "Negative"]
        write_votes(root / "gt" / "labels" / annotator, "img02", votes)
    (root / "lq").mkdir()
    for path in sorted((root / "gt" / "images" / "original").glob("*.png")):
        with Image.open(path) as image:
            image.resize((16, 16), Image.Resampling.BICUBIC).save(root / "lq" / path.name)
    torch.manual_seed(0)
    nets = {
        "SwinIR-AMO": SwinIR(embed_dim=12, depths=(2,), num_heads=(2,), upsampler="nearest+conv",
                             num_feat=8),
        "RealESRGAN-UPos": RRDBNet(num_feat=8, num_block=1, num_grow_ch=4),
    }  # fmt: skip
    for name, net in nets.items():
        save_atomic({"params_ema": net.state_dict()}, root / f"{name}.pt")
    (root / "own_metric.py").write_text(OWN_METRIC)
    return root, nets


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    return ["--models", f"SwinIR-AMO={root / 'SwinIR-AMO.pt'}",
            f"RealESRGAN-UPos={root / 'RealESRGAN-UPos.pt'}", "--gt", str(root / "gt"),
            "--lq", str(root / "lq"), "--out", str(out), *more]  # fmt: skip


def run(root: Path, *args: str) -> subprocess.CompletedProcess:
    """evaluate.py as a user runs it, where no weights can be had."""
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k != "DEBUG"}
    env |= {"PYTHONPATH": str(root), "TORCH_HOME": str(root / "torch"),
            "HF_HOME": str(root / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, "evaluate.py", *args], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=200)


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    return comments, list(csv.DictReader(lines[len(comments) :]))


def test_the_tables_of_a_whole_run(data, tmp_path):
    root, nets = data
    out = tmp_path / "deep" / "table5.csv"
    done = run(root, *arguments(root, out, "--metrics", "psnr", "ssim", "musiq", "--extra",
                                "q=own_metric:mean", "--save-sr", str(tmp_path / "sr")))
    assert done.returncode == 0, done.stderr

    # By hand: SR as saved, PSNR to each positive, the mean brightness as quality
    names, members = ["img00", "img01", "img02"], ["original", "01", "02", "03", "04"]
    positives = [[1, 4], [1, 3], [0]]  # make_data's cycle; img02 falls back to the original
    files = {(n, k): root / "gt" / "images" / m / f"{n}{'_' + m if k else ''}.png"
             for n in names for k, m in enumerate(members)}  # fmt: skip
    gt = {key: np.asarray(Image.open(file)) for key, file in files.items()}
    expected = {}
    for model, net in nets.items():
        for name, chosen in zip(names, positives, strict=True):
            lq = as_tensor(np.asarray(Image.open(root / "lq" / f"{name}.png")))
            with torch.no_grad():
                sr = net.eval()(lq).clamp(0, 1).mul(255).round().byte()
            sr = sr[0].permute(1, 2, 0).numpy()
            saved = np.asarray(Image.open(tmp_path / "sr" / model / f"{name}.png"))
            assert np.abs(saved.astype(int) - sr).max() <= 1 and (saved != sr).mean() < 1e-3
            a, b = saved[4:-4, 4:-4], [gt[name, k][4:-4, 4:-4] for k in (*chosen, 0)]
            expected[model, name] = {
                "psnr": np.mean([psnr_by_hand(a, z) for z in b[:-1]]),
                "ssim": np.mean([ssim_by_hand(a, z) for z in b[:-1]]),
                "q": 100 * saved.mean() / 255, "psnr_original": psnr_by_hand(a, b[-1]),
            }  # fmt: skip
    for name in names:
        best = max(100 * gt[name, k].mean() / 255 for k in range(5))
        expected["Gold Standard", name] = {"q": best}

    comments, rows = read(out.with_name("table5_per_image.csv"))
    # Table 5's nine columns are always there, also those that were not asked for
    nine = ["psnr", "ssim", "lpips", "lpips_st", "dists", "musiq", "nima", "qalign", "topiq"]
    assert list(rows[0]) == ["model", "image", *nine, "q", "psnr_original"]
    assert [(r["model"], r["image"]) for r in rows] == [
        (m, n) for m in ("Gold Standard", "SwinIR-AMO", "RealESRGAN-UPos") for n in names]
    for row in rows:
        values = expected[row["model"], row["image"]]
        for column in (*nine, "q", "psnr_original"):
            if column in values:
                assert float(row[column]) == pytest.approx(values[column], abs=1e-4)
            else:
                assert row[column] == ""

    comments, rows = read(out)
    assert list(rows[0]) == ["model", "no_human_labels", *nine, "q"]
    assert [r["no_human_labels"] for r in rows] == ["no", "yes", "no"]
    for row in rows:
        values = [v for (model, _), v in expected.items() if model == row["model"]]
        for column in (*nine, "q"):
            if column in values[0]:
                mean = np.mean([v[column] for v in values])
                assert float(row[column]) == pytest.approx(mean, abs=2e-4)
            else:
                assert row[column] == ""
    assert any("4-pixel border" in c for c in comments)
    assert "# column musiq: empty, its weights could not be had" in comments

    # What is missing is said once, at the start; the table is printed aligned
    said = [line for line in done.stderr.splitlines() if "column musiq stays empty" in line]
    assert len(said) == 1 and "python -m models.iqa prefetch musiq" in said[0]
    assert "1 images have no Positive GT" in done.stderr
    table = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in table] == ["model", "Gold Standard", "SwinIR-AMO",
                                                       "RealESRGAN-UPos"]
    assert len({len(line) for line in table}) == 1


def test_an_interrupted_evaluation_goes_on(data, tmp_path, monkeypatch):
    """Images that are scored are kept, the others made; the tables are a straight run's."""
    root, _ = data
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(root))
    out, images = tmp_path / "t.csv", tmp_path / "t_per_image.csv"
    flags = arguments(root, out, "--metrics", "psnr", "--extra", "q=own_metric:mean",
                      "--save-sr", str(tmp_path / "sr"))
    main(*flags)
    straight = out.read_bytes(), images.read_bytes()
    made = []
    monkeypatch.setattr(evaluate, "super_resolve", lambda net, lq, f=evaluate.super_resolve:
                        made.append((type(net).__name__, lq.shape[-1])) or f(net, lq))

    def remade(*more):
        made.clear()
        main(*flags, *more)
        small = [name for name, side in made if side == 16]  # the LQ, and load_net's checks
        return len(small) - small.count("SwinIR"), small.count("SwinIR")

    assert remade() == (1, 1)  # one check each
    assert (out.read_bytes(), images.read_bytes()) == straight
    lines = (tmp_path / "scores/t.rank0.jsonl").read_text()
    assert len(lines.split("\n")) == 1 + 3 * 3
    cut = lines.rindex('["')  # the last line, at half; it is the last network's
    (tmp_path / "scores/t.rank0.jsonl").write_text(lines[: (cut + len(lines)) // 2])
    assert remade() == (3, 1)  # its image, and a check more
    assert (out.read_bytes(), images.read_bytes()) == straight
    assert remade() == (1, 1)
    (tmp_path / "sr/SwinIR-AMO/img01.png").unlink()
    assert remade() == (1, 3)
    assert remade("--metrics", "psnr", "ssim") == (5, 5) and remade() == (1, 1)  # other columns

    torch.manual_seed(1)
    net = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)
    before = (root / "RealESRGAN-UPos.pt").read_bytes()
    sr = (tmp_path / "sr/RealESRGAN-UPos/img00.png").read_bytes()
    save_atomic({"params_ema": net.state_dict()}, root / "RealESRGAN-UPos.pt")
    assert remade() == (5, 1) and images.read_bytes() != straight[1]  # other weights
    assert (tmp_path / "sr/RealESRGAN-UPos/img00.png").read_bytes() != sr
    (root / "RealESRGAN-UPos.pt").write_bytes(before)
    assert remade() == (5, 1)  # its scores are known, its images are the other's
    assert (out.read_bytes(), images.read_bytes()) == straight
    assert (tmp_path / "sr/RealESRGAN-UPos/img00.png").read_bytes() == sr


@pytest.mark.parametrize("change", ["metric", "LQ", "GT", "votes"])
def test_scores_of_another_metric_or_of_other_data_are_not_taken(data, tmp_path, monkeypatch,
                                                                  change):
    root = tmp_path / "data"
    shutil.copytree(data[0], root)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(root))
    out = tmp_path / "t.csv"
    flags = arguments(root, out, "--metrics", "psnr", "--extra")
    main(*flags, "q=own_metric:mean")
    _, before = read(out)
    image = "lq" if change == "LQ" else "gt/images/original"
    if change in ("LQ", "GT"):  # the same name and size
        path = next(root.glob(f"**/{image}/img01.png"))
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    elif change == "votes":
        for path in root.glob("**/labels/*/img01.json"):
            path.write_text(path.read_text().replace("Similar", "Positive"))
    main(*flags, "q=own_metric:darkness" if change == "metric" else "q=own_metric:mean")
    _, after = read(out)
    assert before != after


def test_a_set_is_decoded_once_per_image_of_a_model(data, tmp_path, monkeypatch):
    root, _ = data
    read = []
    monkeypatch.setattr(evaluate, "read_rgb", lambda path, f=evaluate.read_rgb:
                        read.append(Path(path).stem) or f(path))
    main(*arguments(root, tmp_path / "t.csv", "--metrics", "psnr"))
    gts = ["img00", "img00_01", "img00_04", "img01", "img01_01", "img01_03", "img02"]
    lq = ["img00", "img01", "img02"]  # named as the originals; decoded by the check as well
    assert sorted(read) == sorted(lq + 2 * (lq + gts))


def test_bad_input_ends_in_one_line_and_exit_code_2(data, tmp_path):
    root, _ = data
    (tmp_path / "lq").mkdir()
    for path in (root / "lq").glob("*.png"):
        side = 20 if path.stem == "img01" else 16
        Image.open(path).resize((side, side)).save(tmp_path / "lq" / path.name)
    out = tmp_path / "t.csv"
    done = run(root, *arguments(root, out, "--metrics", "psnr", "--lq", str(tmp_path / "lq")))
    assert done.returncode == 2 and not out.exists()
    assert len(done.stderr.splitlines()) == 1
    assert "img01.png: 20x20, but its GT is 64x64" in done.stderr


def test_which_rows_of_table_5_rest_on_human_labels():
    without = ["SwinIR-OrigsOnly", "SwinIR-Rand", "SwinIR-SMA", "SwinIR-AMO", "RealESRGAN-AMO+FT"]
    with_labels = ["Gold Standard", "SwinIR-UPos", "SwinIR-SMP", "RealESRGAN-UPos+FT_IG"]
    assert not any(map(evaluate.needs_human_labels, without))
    assert all(map(evaluate.needs_human_labels, with_labels))


def main(*args: str) -> None:
    evaluate.main(evaluate.parse_args(list(args)))


def test_require_all_makes_a_missing_column_an_error(data, tmp_path, monkeypatch):
    def unavailable(name, device):
        raise MetricUnavailable(f"metric {name}: weights are not here")

    monkeypatch.setattr(evaluate, "load_iqa", unavailable)
    monkeypatch.setattr(evaluate, "load_fr", unavailable)
    args = arguments(data[0], tmp_path / "t.csv", "--metrics", "psnr", "lpips_st", "topiq")
    with pytest.raises(ValueError) as caught:
        main(*args, "--require-all")
    assert str(caught.value).splitlines() == ["metric stlpips: weights are not here",
                                              "metric topiq_nr: weights are not here"]
    assert not (tmp_path / "t.csv").exists()


def test_perceptual_distance_crops_the_border(tmp_path):
    from pyiqa.archs.stlpips_arch import STLPIPS

    torch.manual_seed(0)
    net = STLPIPS(pretrained=False).eval()
    torch.save(net.state_dict(), tmp_path / "own.pth")
    spec = f"lpips_st@{tmp_path / 'own.pth'}"
    kind, function = evaluate.load_metric(spec, torch.device("cpu"))
    sr, gt = torch.rand(2, 3, 40, 48), torch.rand(2, 3, 40, 48)
    expected = net(sr[..., 4:-4, 4:-4], gt[..., 4:-4, 4:-4]).reshape(2).detach()
    assert kind == "fr"
    torch.testing.assert_close(function(sr, gt), expected, rtol=0, atol=0)


@pytest.mark.parametrize("more, message", [
    (("--models", "A={root}/nowhere.pt"), "nowhere.pt: no such file"),
    (("--models", "A={root}/foreign.pt"), "foreign.pt: neither a SwinIR nor an RRDBNet"),
    (("--models", "A={root}/cut.pt"), "cut.pt: .*missing conv_last"),
    (("--models", "A={root}/SwinIR-AMO.pt", "A={root}/SwinIR-AMO.pt"), "each NAME once"),
    (("--models", "{root}/SwinIR-AMO.pt"), "write NAME=VALUE"),
    (("--metrics", "psnr", "musik"), "did you mean musiq"),
    (("--metrics", "psnr", "liqe"), "metric liqe: needs GTs of 224 px, the smallest has 64"),
    (("--metrics", "psnr", "--extra", "psnr=niqe"), "psnr: is a column already"),
    (("--lq", "{root}/gt"), "img00.png: no such LQ image"),
    (("--gt", "{root}/nothing"), "nothing: no such folder"),
])  # fmt: skip
def test_bad_arguments_are_refused_before_any_work(data, tmp_path, more, message):
    root, nets = data
    save_atomic({"params": torch.nn.Linear(2, 2).state_dict()}, root / "foreign.pt")
    state = {k: v for k, v in nets["SwinIR-AMO"].state_dict().items() if "conv_last" not in k}
    save_atomic(state, root / "cut.pt")
    more = [m.format(root=root) for m in more]
    with pytest.raises((ValueError, OSError), match=message) as caught:
        main(*arguments(root, tmp_path / "t.csv", "--metrics", "psnr", *more))
    assert all("Traceback" not in line for line in str(caught.value).splitlines())
    assert not (tmp_path / "t.csv").exists()


def test_all_problems_are_named_together(data, tmp_path):
    root, _ = data
    (tmp_path / "lq").mkdir()
    with pytest.raises(ValueError) as caught:
        main(*arguments(root, tmp_path / "t.csv", "--metrics", "psnr", "liqe", "--lq",
                        str(tmp_path / "lq"), "--models", "A=nowhere.pt"))
    assert len(str(caught.value).splitlines()) == 5  # three LQ, one metric, one checkpoint


def test_realsr_v3_pairs(data, tmp_path):
    root, _ = data
    rng, expected = np.random.default_rng(0), []
    for camera, size in (("Canon", 64), ("Nikon", 48)):
        folder = tmp_path / "RealSR(V3)" / camera / "Test" / "4"
        folder.mkdir(parents=True)
        hr = smooth_image(rng, size, 64)
        Image.fromarray(hr).save(folder / f"{camera}_001_HR.png")
        Image.fromarray(hr[::4, ::4]).save(folder / f"{camera}_001_LR4.png")
        train = tmp_path / "RealSR(V3)" / camera / "Train" / "4"
        train.mkdir(parents=True)
        Image.fromarray(hr).save(train / f"{camera}_002_HR.png")
        Image.fromarray(hr[::4, ::4]).save(train / f"{camera}_002_LR4.png")
        expected.append(f"{camera}/Test/4/{camera}_001")
    args = ["--models", f"SwinIR-AMO={root / 'SwinIR-AMO.pt'}", "--realsr",
            str(tmp_path / "RealSR(V3)"), "--out", str(tmp_path / "t8.csv"),
            "--metrics", "psnr", "ssim", "piqe", "--save-sr", str(tmp_path / "sr")]  # fmt: skip
    main(*args)
    rows = read(tmp_path / "t8.csv")[1]
    assert [r["model"] for r in rows] == ["SwinIR-AMO"] and float(rows[0]["piqe"]) < 0
    rows = read(tmp_path / "t8_per_image.csv")[1]
    assert [r["image"] for r in rows] == expected
    assert all(r["psnr"] == r["psnr_original"] for r in rows)
    assert (tmp_path / "sr" / "SwinIR-AMO" / f"{expected[0]}.png").is_file()

    lr = tmp_path / "RealSR(V3)" / "Canon" / "Test" / "4" / "Canon_001_LR4.png"
    Image.open(lr).resize((64, 64)).save(lr)
    with pytest.raises(ValueError, match="RealSR V1 and V2; get V3"):
        main(*args)
    lr.unlink()
    with pytest.raises(FileNotFoundError, match="no .*_HR.png with"):
        main(*args[:3], str(tmp_path / "sr"), *args[4:])
