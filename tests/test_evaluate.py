"""evaluate.py: PSNR and SSIM against an independent computation, the tables, what a rerun computes,
and bad inputs."""

import csv
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from make_data import make_hggt, smooth_image, write_votes
from PIL import Image
from scipy.signal import convolve2d
from scripts import ROOT, run_script

import evaluate
import finetune_lora
import train_sr
from models import metrics
from models.checkpoint import read_settings, save_atomic
from models.iqa import MetricUnavailable, load_iqa
from models.rrdb import RRDBNet
from models.scores import score_images
from models.settings import ema_checkpoint
from models.swinir import SwinIR

OWN_METRIC = """
import torch
SCORED = []  # images of each call
class Mean(torch.nn.Module):
    def forward(self, x):
        SCORED.append(len(x))
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
        ours = metrics.psnr(sr, gt, border)
        assert ours.shape == (5,) and ours.dtype == torch.float64
        np.testing.assert_allclose(ours, [psnr_by_hand(*pair) for pair in inner], atol=1e-6)
        ours = metrics.ssim(sr, gt, border)
        assert ours.shape == (5,) and ours.dtype == torch.float64
        np.testing.assert_allclose(ours, [ssim_by_hand(*pair) for pair in inner], atol=1e-6)
    assert metrics.ssim(sr, gt, 4)[3] < 0


def test_psnr_and_ssim_of_known_values():
    black, grey = torch.zeros(1, 3, 20, 20), torch.full((1, 3, 20, 20), 1 / 255)
    assert metrics.psnr(black, grey, 4).item() == pytest.approx(48.130803609)  # 20 log10(255)
    assert metrics.psnr(black, black + 1, 4).item() == pytest.approx(0)
    assert metrics.ssim(black, grey, 4).item() == pytest.approx(6.5025 / 7.5025)
    assert metrics.psnr(grey, grey, 4).item() == float("inf")
    assert metrics.ssim(grey, grey, 4).item() == pytest.approx(1)


def test_psnr_and_ssim_round_clip_and_crop():
    gt = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    assert metrics.psnr(gt + 0.4 / 255, gt, 0).item() == float("inf")  # below half a level
    assert metrics.psnr(gt + 0.6 / 255, gt, 0).item() < 50
    white = torch.ones(1, 3, 24, 24)
    assert metrics.psnr(white + 0.5, white, 0).item() == float("inf")
    framed = gt.clone()
    framed[..., :4, :], framed[..., -4:, :], framed[..., :4], framed[..., -4:] = 0, 0, 0, 0
    assert metrics.psnr(framed, gt, 4).item() == float("inf")
    assert metrics.psnr(framed, gt, 3).item() < 50 and metrics.ssim(framed, gt, 4) == 1
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(gt[..., :18], gt[..., :18], 4)


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
    """evaluate.py in a process of its own, which finds no metric's weights."""
    return run_script("evaluate.py", *args, PYTHONPATH=root, TORCH_HOME=root / "torch",
                      HF_HOME=root / "hf", HF_ENDPOINT="http://127.0.0.1:9")


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
    assert list(rows[0]) == ["model", "label", "nr_metric", "lambda_a", "no_human_labels", *nine,
                             "q"]
    assert [list(r.values())[1:5] for r in rows] == [
        ["Gold Standard", "-", "-", "no"], ["SwinIR-AMO", "", "", ""],
        ["ReSRGAN-UPos*", "", "", ""]]  # files without settings, whatever their rows' names
    for row in rows:
        values = [v for (model, _), v in expected.items() if model == row["model"]]
        for column in (*nine, "q"):
            if column in values[0]:
                mean = np.mean([v[column] for v in values])
                assert float(row[column]) == pytest.approx(mean, abs=2e-4)
            else:
                assert row[column] == ""
    assert any("4-pixel border" in c for c in comments)
    assert "# column musiq: empty, its weights are unavailable" in comments

    # What is missing is said once, at the start; the table is printed aligned
    said = [line for line in done.stderr.splitlines() if "column musiq stays empty" in line]
    assert len(said) == 1 and "python -m tools.prefetch musiq" in said[0]
    assert "1 images have no Positive GT" in done.stderr
    table = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in table] == ["model", "Gold Standard", "SwinIR-AMO",
                                                       "ReSRGAN-UPos*"]
    assert len({len(line) for line in table}) == 1


class Work:
    """What a run of evaluate.py computes."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.calls = root, []
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.delitem(sys.modules, "own_metric", raising=False)
        self.count(monkeypatch, evaluate, "super_resolve")
        self.count(monkeypatch, metrics, "psnr")
        self.count(monkeypatch, metrics, "ssim")

    def count(self, monkeypatch, module, name: str) -> None:
        function = getattr(module, name)

        def counted(*args):
            self.calls.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, counted)

    def of(self, *flags: str) -> dict[str, int]:
        """Networks' outputs, full-reference scores, and images that own_metric scored."""
        own_metric = importlib.import_module("own_metric")
        self.calls.clear()
        own_metric.SCORED.clear()
        main(*flags)
        own = {"own": sum(own_metric.SCORED)} if own_metric.SCORED else {}
        return {name: self.calls.count(name) for name in self.calls} | own


@pytest.fixture
def work(data, tmp_path, monkeypatch) -> Work:
    """A copy of the data, which a test may change."""
    shutil.copytree(data[0], tmp_path / "data")
    return Work(tmp_path / "data", monkeypatch)


def tables(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_name(f"{out.stem}_per_image.csv").read_bytes()


def values(files: tuple[bytes, bytes]) -> list[dict[str, str]]:
    """Rows of both tables without empty cells."""
    lines = [[x for x in file.decode().splitlines() if x[0] != "#"] for file in files]
    return [{k: v for k, v in row.items() if v} for table in lines for row in csv.DictReader(table)]


def without(column: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != column} for row in rows]


# Two networks and three images, two of them with a PSNR against the original besides; 15 GTs
ALL = {"super_resolve": 6, "psnr": 2 * 5, "ssim": 6, "own": 6 + 15}


def test_a_rerun_scores_only_new_columns_and_rows(work, tmp_path):
    out, q = tmp_path / "t.csv", ("--extra", "q=own_metric:mean")
    flags = arguments(work.root, out, "--metrics", "psnr")
    assert work.of(*flags, "ssim", *q) == ALL
    straight = tables(out)
    assert work.of(*flags, "ssim", *q) == {} and tables(out) == straight

    # Columns: dropped, added back, renamed, the same metric twice, a new one
    assert work.of(*flags, *q) == {}
    assert values(tables(out)) == without("ssim", values(straight))
    assert work.of(*flags, "ssim", *q) == {} and tables(out) == straight
    assert work.of(*flags, "--extra", "quality=own_metric:mean", "q=own_metric:mean") == {}
    rows = values(tables(out))
    assert all(row["quality"] == row["q"] for row in rows)
    assert without("quality", rows) == without("ssim", values(straight))
    assert work.of(*flags, "ssim", "--extra", "dark=own_metric:darkness", "darker=own_metric:"
                   "darkness") == {"super_resolve": 6, "own": 6 + 15}

    # Rows: renamed, and the same network twice
    models = ("--models", f"A={work.root / 'SwinIR-AMO.pt'}", f"B={work.root / 'SwinIR-AMO.pt'}")
    assert work.of(*flags, "ssim", *q, *models) == {}
    for name in "AB":
        renamed = [row for row in values(tables(out)) if row["model"] == name]
        before = [row for row in values(straight) if row["model"] == "SwinIR-AMO"]
        assert without("label", without("model", renamed)) == without(
            "label", without("model", before))

    # The same content in another folder, which the comments name
    shutil.copytree(work.root, tmp_path / "moved")
    assert work.of(*arguments(tmp_path / "moved", out, "--metrics", "psnr", "ssim", *q)) == {}
    assert values(tables(out)) == values(straight) and tables(out) != straight


def test_an_interrupted_evaluation_resumes(work, tmp_path):
    """Finished images are kept and the others made; the tables are an undisturbed run's."""
    out = tmp_path / "t.csv"
    flags = arguments(work.root, out, "--metrics", "psnr", "--extra", "q=own_metric:mean",
                      "--save-sr", str(tmp_path / "sr"))
    work.of(*flags)
    straight = tables(out)
    psnr, mean = (tmp_path / f"scores/{name}.csv" for name in ("psnr", "own_metric-mean"))
    lines = psnr.read_text()
    last = lines.rstrip("\n").rindex("\n") + 1  # of the last network's last image
    psnr.write_text(lines[: (last + len(lines)) // 2])
    assert work.of(*flags) == {"super_resolve": 1, "psnr": 1}
    assert tables(out) == straight and work.of(*flags) == {}
    mean.unlink()
    assert work.of(*flags) == {"super_resolve": 6, "own": 21}
    assert tables(out) == straight

    # SR images that are missing, or that another network made, are made again
    (tmp_path / "sr/SwinIR-AMO/img01.png").unlink()
    assert work.of(*flags) == {"super_resolve": 1} and work.of(*flags) == {}
    swap = [f"SwinIR-AMO={work.root / 'RealESRGAN-UPos.pt'}"]
    assert work.of(*flags, "--models", *swap) == {"super_resolve": 3}
    sr = [(tmp_path / "sr" / model / "img00.png").read_bytes()
          for model in ("SwinIR-AMO", "RealESRGAN-UPos")]
    assert sr[0] == sr[1]


def replace(path: Path, image: np.ndarray) -> None:
    """Another image of the same size in bytes, with the same time."""
    before = path.stat()
    Image.fromarray(image).save(path, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("change, expected", [
    # of img01, by both models: Positives are 01 and 03
    ("images/01/img01_01.png", {"super_resolve": 2, "psnr": 2, "ssim": 2, "own": 1}),
    ("images/original/img01.png", {"super_resolve": 2, "psnr": 2, "own": 1}),
    ("images/02/img01_02.png", {"own": 1}),
    ("lq", {"super_resolve": 2, "psnr": 4, "ssim": 2, "own": 2}),
    ("votes", {"super_resolve": 2, "psnr": 2, "ssim": 2}),
    ("checkpoint", {"super_resolve": 3, "psnr": 5, "ssim": 3, "own": 3}),
    ("metric", {"super_resolve": 6, "own": 21}),
])  # fmt: skip
def test_a_changed_file_scores_again_what_depends_on_it(work, tmp_path, change, expected):
    root, out = work.root, tmp_path / "t.csv"
    for path in [*root.glob("gt/images/*/img01*.png"), root / "lq/img01.png"]:
        Image.fromarray(np.asarray(Image.open(path))).save(path, compress_level=0)
    flags = arguments(root, out, "--metrics", "psnr", "ssim", "--extra")
    q = "q=own_metric:mean"
    work.of(*flags, q)
    if change == "votes":
        for path in root.glob("gt/labels/*/img01.json"):
            path.write_text(path.read_text().replace("Similar", "Positive"))
    elif change == "checkpoint":
        torch.manual_seed(1)
        net = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)
        save_atomic({"params_ema": net.state_dict()}, root / "RealESRGAN-UPos.pt")
    elif change == "metric":
        q = "q=own_metric:darkness"
    else:
        path = root / (f"gt/{change}" if change != "lq" else "lq/img01.png")
        replace(path, 255 - np.asarray(Image.open(path)))
    assert work.of(*flags, q) == expected
    after = tables(out)
    shutil.rmtree(tmp_path / "scores")  # no old score was taken: a new cache gives equal tables
    assert work.of(*flags, q) == ALL and tables(out) == after


def test_the_gold_standard_takes_scores_of_the_analysis(work, tmp_path):
    out, gts = tmp_path / "t.csv", sorted(work.root.glob("gt/images/*/*.png"))
    found = score_images("own_metric:mean", lambda: load_iqa("own_metric:mean", "cpu"),
                         {path.name: str(path) for path in gts}, tmp_path / "scores")
    flags = arguments(work.root, out, "--metrics", "--extra", "q=own_metric:mean")
    assert work.of(*flags)["own"] == 6
    best = max(q for name, q in found.quality.items() if name.startswith("img00"))
    gold = next(row for row in values(tables(out)) if row.get("image") == "img00")
    assert gold == {"model": "Gold Standard", "image": "img00", "q": f"{best:.6f}"}


def test_a_set_is_decoded_once_per_image_of_a_model(data, tmp_path, monkeypatch):
    root, _ = data
    read = []
    monkeypatch.setattr(evaluate, "read_rgb", lambda path, f=evaluate.read_rgb:
                        read.append(Path(path).stem) or f(path))
    main(*arguments(root, tmp_path / "t.csv", "--metrics", "psnr"))
    gts = ["img00", "img00_01", "img00_04", "img01", "img01_01", "img01_03", "img02"]
    lq = ["img00", "img01", "img02"]  # named as the originals
    assert sorted(read) == sorted(2 * (lq + gts))


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


def main(*args: str) -> None:
    evaluate.main(evaluate.parse_args(list(args)))


def trained(net: torch.nn.Module, path: Path, script: ModuleType, *flags: str) -> str:
    """A checkpoint as a training script writes it with these flags."""
    save_atomic(ema_checkpoint(net.state_dict(), script.parse_args(list(flags))), path)
    return str(path)


@pytest.mark.parametrize("flags, cells", [
    (("--sampler", "origs_only"), ["-", "-", "yes"]), (("--sampler", "rand"), ["-", "-", "yes"]),
    (("--sampler", "sma"), ["-", "-", "yes"]), (("--sampler", "amo"), ["-", "-", "yes"]),
    (("--sampler", "upos"), ["-", "-", "no"]), (("--sampler", "smp"), ["-", "-", "no"]),
    (("--init", "x", "--sampler", "upos"), ["musiq", "0", "no"]),
    (("--init", "x", "--sampler", "amo", "--iqa", "paq2piq"), ["paq2piq", "0", "yes"]),
    (("--init", "x", "--sampler", "smp", "--lambda-a", "0.2", "--lambda-q", "0"),
     ["-", "0.2", "no"]),
    (("--init", "x", "--sampler", "amo", "--iqa", "demo.quality:q@runs/q.pt", "topiq_nr@t.pth"),
     ["q+topiq_nr", "0", "yes"]),
])  # fmt: skip
def test_a_rows_settings_are_those_of_its_checkpoint(tmp_path, flags, cells):
    script = finetune_lora if "--init" in flags else train_sr
    path = trained(torch.nn.Linear(1, 1), tmp_path / "net.pt", script, *flags)
    assert evaluate.setting_cells(read_settings(path)) == cells


def test_settings_that_are_unknown_are_empty_and_a_last_pt_has_some():
    for settings in ({}, {"lr": 1e-4}, {"sampler": "adam"}, {"sampler": None}):
        assert evaluate.setting_cells(settings) == ["", "", ""]
    full = {"sampler": "amo", "lambda_q": 0.05, "lambda_a": 0.0, "iqa": "musiq"}
    assert evaluate.setting_cells(full) == ["musiq", "0", "yes"]


def test_rows_have_the_papers_order_and_names_with_others_below(data, tmp_path, capsys):
    root, nets = data
    net, q = nets["SwinIR-AMO"], "own_metric:mean"
    files = {
        "mine": trained(net, tmp_path / "a.pt", train_sr, "--sampler", "upos"),
        "SwinIR-AMO+FT_full": trained(net, tmp_path / "b.pt", finetune_lora, "--init", "x",
                                      "--sampler", "amo", "--iqa", q, "--full"),
        "SwinIR-UPos+FT": trained(net, tmp_path / "c.pt", finetune_lora, "--init", "x",
                                  "--sampler", "upos", "--iqa", q, "--lambda-a", "0.1"),
        "RealESRGAN-OrigsOnly": str(root / "RealESRGAN-UPos.pt"),
        "SwinIR-UPos+FT_HP": shutil.copy(root / "SwinIR-AMO.pt", tmp_path / "public.pt"),
        "SwinIR-SMP": trained(net, tmp_path / "d.pt", train_sr, "--sampler", "smp"),
    }  # fmt: skip
    models = ["--models", *(f"{row}={file}" for row, file in files.items())]
    (tmp_path / "config.json").write_text("{}")  # as a run leaves it
    main(*arguments(root, tmp_path / "t.csv", "--metrics", "psnr", "piqe", *models))
    comments, rows = read(tmp_path / "t.csv")
    settings = {line.split(":")[0]: line.partition(", settings in ")[2] for line in comments
                if line.startswith("# row ")}
    assert settings["# row mine"] == (tmp_path / "config.json").as_posix()
    assert settings["# row RealESRGAN-OrigsOnly"] == ""
    assert settings["# row SwinIR-UPos+FT_HP"] == ""  # a file without settings is no run's
    assert [list(row.values())[:5] for row in rows] == [
        ["Gold Standard", "Gold Standard", "-", "-", "no"],
        ["SwinIR-SMP", "SwinIR-SMP", "-", "-", "no"],
        ["SwinIR-UPos+FT_HP", "SwinIR-UPos + FT_HP", "", "", ""],
        ["SwinIR-UPos+FT", "SwinIR-UPos + FT", "mean", "0.1", "no"],
        ["RealESRGAN-OrigsOnly", "ReSRGAN-OrigsOnly", "", "", ""],
        ["mine", "mine", "-", "-", "no"],
        ["SwinIR-AMO+FT_full", "SwinIR-AMO+FT_full", "mean", "0", "yes"]]
    assert "# rows that the paper's Table 5 does not have: mine, SwinIR-AMO+FT_full" in comments
    per_image = read(tmp_path / "t_per_image.csv")[1]
    assert list(dict.fromkeys(row["model"] for row in per_image)) == [r["model"] for r in rows]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == [
        "model", *(row["label"] for row in rows[:5]), "", "mine", "SwinIR-AMO+FT_full"]


def test_require_all_makes_a_missing_column_an_error(data, tmp_path, monkeypatch):
    def unavailable(name, device):
        raise MetricUnavailable(f"metric {name}: weights are not here")

    monkeypatch.setattr(metrics, "load_iqa", unavailable)
    monkeypatch.setattr(metrics, "load_fr", unavailable)
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
    kind, function = metrics.load_metric(spec, torch.device("cpu"))
    sr, gt = torch.rand(2, 3, 40, 48), torch.rand(2, 3, 40, 48)
    expected = net(sr[..., 4:-4, 4:-4], gt[..., 4:-4, 4:-4]).reshape(2).detach()
    assert kind == "fr"
    torch.testing.assert_close(function(sr, gt), expected, rtol=0, atol=0)


@pytest.mark.parametrize("more, message", [
    (("--models", "A={root}/nowhere.pt"), "nowhere.pt: no such file"),
    (("--models", "A={root}/foreign.pt"), "foreign.pt: neither a SwinIR nor an RRDBNet"),
    (("--models", "A={root}/cut.pt"), "cut.pt: .*conv_last"),
    (("--models", "A={root}/SwinIR-AMO.pt", "A={root}/SwinIR-AMO.pt"), "each NAME once"),
    (("--models", "{root}/SwinIR-AMO.pt"), "write NAME=VALUE"),
    (("--metrics", "psnr", "musik"), "did you mean musiq"),
    (("--metrics", "psnr", "liqe"), "metric liqe: needs GTs of 224 px, the smallest has 64"),
    (("--metrics", "psnr", "--extra", "psnr=niqe"), "psnr: is a column already"),
    (("--metrics", "psnr", "--extra", "lambda_a=niqe"), "lambda_a: is a column already"),
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
    assert rows[0]["label"] == "SwinIR-AMO"
    assert evaluate.read_labels(8)["RealESRGAN-OrigsOnly"] == "RESRGAN-OrigOnly"  # Table 8's
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
