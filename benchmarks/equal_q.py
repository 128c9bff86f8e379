"""Adapters against all weights at equal Q, on photographs (paper Sec. 4.3: LoRA keeps noise away).

    python -m benchmarks.equal_q             # on demo/photos: three hours on 2 CPU cores
    python -m benchmarks.equal_q --jobs 8    # more runs side by side, one thread each

Each method fine-tunes RealESRGAN_x4plus with each learning rate and lambda_Q; every 20 steps the
averaged network is scored. The setting with the best PSNR at the middle gain of Q on the validation
photos is chosen, and trained again with three other seeds, which are scored on the test photos. At
equal Q means: between two scorings, all values are interpolated linearly in Q. The split, the crops
and Q are those of `bash run_all.sh photos`. Rerun the same command to resume.

Out: results/photos/equal_q_validation.csv (every setting), equal_q_test.csv (every seed and crop
     along its path), equal_q.csv (methods and their difference at each gain, with intervals),
     equal_q.png (a test crop by both methods, where their Q is nearest the middle gain).
"""

import argparse
import itertools
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn

from models.checkpoint import replacing, write_csv
from models.distributed import clean_exit
from models.flags import integer, new_parser, refuse
from models.images import read_rgb
from models.metrics import as_image, as_tensor, load_metrics, rounded, score_pair
from models.weights import load_net
from paper.noise import best_window, gradient, high_pass, structured_noise, window_sums
from tools.prefetch import fetch_network
from tools.tune import CPU, STAND_IN, STAND_IN_NOTE
from tools.tune_data import CROP, list_crops, make_data, split_photos, usable_photos

PHOTOS, RESULTS = Path("demo/photos"), Path("results/photos")
WORK, RUNS = Path("runs/photos"), Path("runs/equal_q")
Q, PERCEPTUAL = STAND_IN, "laplacian"
ABOUT_Q = f"{STAND_IN_NOTE}; perceptual loss: {PERCEPTUAL}"
# Around what did well in a prototype on other photos; full fine-tuning needs a tenth
RATES = {"lora": (5e-5, 1e-4, 2e-4, 4e-4), "full": (5e-6, 1e-5, 2e-5)}
LAMBDAS = (0.001, 0.003, 0.01)
NAMES = {"lora": "adapters", "full": "all weights"}
SEED, SEEDS = 0, (1, 2, 3)  # of the choice, and of the result
EVERY, MOST = 20, 240  # steps
GAINS = (5.0, 10.0, 15.0)  # of Q over the base network
FLAT = 48  # pixels, side of the flattest window of a crop
COLUMNS = ("psnr", "ssim", "q", "piqe", "structured_noise", "flat_noise")


def flat_noise(sr: np.ndarray, gt: np.ndarray) -> float:
    """Standard deviation, in levels, of the high-passed SR image where the photo is flattest.

    That is, where the mean of its squared gradient is the smallest.
    """
    top, left = best_window(-window_sums(gradient(gt) ** 2, FLAT))
    return float(high_pass(sr)[top : top + FLAT, left : left + FLAT].std())


def score(net: nn.Module, part: str) -> list[list[float]]:
    """COLUMNS of each crop of "val" or "test"."""
    cpu = torch.device("cpu")
    metrics, unavailable, problems = load_metrics({"psnr": "psnr", "ssim": "ssim", "q": Q,
                                                   "piqe": "piqe"}, cpu)
    refuse([*problems, *unavailable.values()])
    rows = []
    for file in list_crops(WORK, part):
        lq, gt = read_rgb(file), read_rgb(WORK / part / "gt" / file.name)
        with torch.no_grad():
            sr = rounded(net(as_tensor(lq, cpu)))
            row = score_pair(metrics, sr, as_tensor(gt, cpu))
        image = as_image(sr)
        rows.append([*row, structured_noise(high_pass(image), high_pass(gt)),
                     flat_noise(image, gt)])
    return rows


def train_and_score(base: str, method: str, lr: float, lambda_q: float, seed: int, part: str
                    ) -> dict[int, np.ndarray]:
    """{step: scores (crops, COLUMNS)} of a run, until its Q has risen by the largest gain."""
    torch.set_num_threads(1)
    out = RUNS / folder_name(method, lr, lambda_q, seed)
    scored: dict[int, np.ndarray] = {}
    for step in range(0, MOST + 1, EVERY):
        kept = out / f"{part}_{step:04d}.npy"
        if not kept.is_file():
            if step:
                train(base, out, method, lr, lambda_q, seed, step)
            out.mkdir(parents=True, exist_ok=True)
            scores = score(load_net(out / "net_g_ema.pt" if step else base), part)
            with replacing(kept) as temporary, open(temporary, "wb") as file:
                np.save(file, scores)
        scored[step] = np.load(kept)
        gain = (scored[step] - scored[0])[:, COLUMNS.index("q")].mean()
        if gain > GAINS[-1]:
            break
    return scored


def folder_name(method: str, lr: float, lambda_q: float, seed: int) -> str:
    return f"{method}_lr{lr:g}_lambda{lambda_q:g}_seed{seed}"


def train(base: str, out: Path, method: str, lr: float, lambda_q: float, seed: int, steps: int
          ) -> None:
    run("finetune_lora.py", "--data", WORK / "train", "--init", base, "--sampler", "origs_only",
        "--iqa", Q, "--perceptual", PERCEPTUAL, "--batch-size", CPU["batch_size"], "--patch-size",
        CPU["patch_size"], "--ema-decay", CPU["ema_decay"], "--lr", lr, "--lambda-q", lambda_q,
        "--seed", seed, "--steps", steps, "--num-workers", 0, "--sample-every", 0, "--log-every",
        EVERY, "--out", out, *["--full"] * (method == "full"))


def run(*command: object, threads: int = 1) -> None:
    """Run Python with these arguments, quietly. ValueError with the end of its messages."""
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise ValueError(f"{command[0]}: {done.stderr[-500:]}")


def at_gain(path: dict[int, np.ndarray], gain: float) -> np.ndarray:
    """Scores (crops, COLUMNS) where the mean Q has risen by `gain`, interpolated; NaN: never."""
    q = {step: scores[:, COLUMNS.index("q")].mean() for step, scores in path.items()}
    target = q[0] + gain
    for (a, qa), (b, qb) in itertools.pairwise(q.items()):
        if qa < target <= qb:
            t = (target - qa) / (qb - qa)
            return (1 - t) * path[a] + t * path[b]
    return np.full_like(path[0], np.nan)


def main(args: argparse.Namespace) -> None:
    base = str(fetch_network("realesrgan_x4plus"))
    parts = split_photos(usable_photos(PHOTOS, CPU["patch_size"]))
    make_data(parts, WORK, "two_round")
    settings = [(method, lr, lambda_q) for method, rates in RATES.items()
                for lr in rates for lambda_q in LAMBDAS]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        paths = pool.map(train_and_score, *zip(*[(base, *s, SEED, "val") for s in settings],
                                               strict=True))
        validation = dict(zip(settings, paths, strict=True))
        chosen = choose(validation)
        runs = [(*setting, seed) for setting in chosen.values() for seed in SEEDS]
        paths = pool.map(train_and_score, *zip(*[(base, *r, "test") for r in runs], strict=True))
        paths = dict(zip(runs, paths, strict=True))
        write_tables(chosen, paths)
        shown = {run: step_near(path, GAINS[1]) for run, path in paths.items()
                 if run[-1] == SEEDS[0]}
        files = list(pool.map(train_shown, [base] * len(shown), shown, shown.values()))
    write_strip(f"{parts['test'][0].stem}_0.png", {"base": base} | {
        NAMES[method]: file for (method, *_), file in zip(shown, files, strict=True)})


def choose(validation: dict[tuple, dict[int, np.ndarray]]) -> dict[str, tuple]:
    """{method: (method, lr, lambda_q)} with the best PSNR at the middle gain; all are written."""
    rows, best = [], {}
    for setting, path in validation.items():
        at = at_gain(path, GAINS[1])
        for step, scores in path.items():
            rows.append([*setting, step, *(f"{v:.4f}" for v in np.nanmean(scores, 0))])
        psnr = at[:, 0].mean()
        if np.isfinite(psnr) and psnr > best.get(setting[0], (-np.inf,))[0]:
            best[setting[0]] = psnr, setting
    if missing := [method for method in RATES if method not in best]:
        raise ValueError(f"{', '.join(missing)}: no setting raised Q by {GAINS[1]:g}")
    chosen = {method: setting for method, (_, setting) in best.items()}
    notes = [f"means over the validation crops of {PHOTOS}; seed {SEED}; Q: {Q}", ABOUT_Q,
             "chosen: " + "; ".join(f"{m}: lr {lr:g}, lambda_Q {lq:g}"
                                    for m, lr, lq in chosen.values())]
    write_csv(RESULTS / "equal_q_validation.csv",
              ["method", "lr", "lambda_q", "step", *COLUMNS], rows, notes)
    return chosen


def write_tables(chosen: dict[str, tuple], paths: dict[tuple, dict[int, np.ndarray]]) -> None:
    """equal_q_test.csv and equal_q.csv."""
    names = [file.stem for file in list_crops(WORK)]
    photos = np.array([name.rpartition("_")[0] for name in names])
    notes = ["; ".join(f"{m}: lr {lr:g}, lambda_Q {lq:g}" for m, lr, lq in chosen.values()),
             f"{len(set(photos))} test photos, two crops of {CROP} pixels each; Q: {Q}", ABOUT_Q]
    write_csv(RESULTS / "equal_q_test.csv", ["method", "seed", "step", "image", *COLUMNS],
              [[method, seed, step, name, *(f"{v:.5f}" for v in row)]
               for (method, _, _, seed), path in paths.items() for step, scores in path.items()
               for name, row in zip(names, scores, strict=True)], notes)

    rows = []
    base = next(iter(paths.values()))[0]
    rows.append(["base", 0, *cells(np.nanmean(base, 0))])
    for gain in GAINS:
        at = {m: np.stack([at_gain(path, gain) for (k, *_), path in paths.items() if k == m])
              for m in RATES}  # (seeds, crops, COLUMNS)
        for method, scores in at.items():
            if np.isnan(scores[..., 2]).any():
                raise ValueError(f"{method}: a seed's Q did not rise by {gain:g} within {MOST} "
                                 "steps")
            rows.append([method, gain, *cells(np.nanmean(scores, (0, 1)))])
        difference = at["lora"] - at["full"]
        of_photos = np.stack([np.nanmean(difference[:, photos == p], (0, 1))
                              for p in sorted(set(photos))])
        rows.append(["lora - full", gain, *cells(np.nanmean(of_photos, 0))])
        for kind, values in (("photos", of_photos), ("seeds", np.nanmean(difference, 1))):
            rows.append([f"+- over {len(values)} {kind}", gain, *cells(half_width(values))])
    notes += ["mean over 3 seeds; piqe without crops where it has none; +-: half of a 95 % "
              "t-interval of the mean difference"]
    write_csv(RESULTS / "equal_q.csv", ["method", "gain", *COLUMNS], rows, notes)
    print((RESULTS / "equal_q.csv").read_text())


def step_near(path: dict[int, np.ndarray], gain: float) -> int:
    """The scored step whose mean Q has risen by about `gain`."""
    q = {step: scores[:, COLUMNS.index("q")].mean() for step, scores in path.items()}
    return min(q, key=lambda step: abs(q[step] - q[0] - gain))


def train_shown(base: str, run: tuple, steps: int) -> Path:
    """The network of a run after `steps` steps, in a folder of its own."""
    method, lr, lambda_q, seed = run
    out = RUNS / f"{folder_name(*run)}_shown{steps}"
    train(base, out, method, lr, lambda_q, seed, steps)
    return out / "net_g_ema.pt"


def write_strip(name: str, files: dict[str, str | Path]) -> None:
    """equal_q.png: a test crop by each network, and as photographed."""
    from paper.draw import Cell, draw_grid, save

    shown = []
    for title, file in files.items():
        with torch.no_grad():
            lq = as_tensor(read_rgb(WORK / "test/lq" / name), torch.device("cpu"))
            shown.append(Cell(as_image(rounded(load_net(file)(lq))), title))
    shown.append(Cell(read_rgb(WORK / "test/gt" / name), "photo"))
    save(draw_grid([shown], [""]), RESULTS / "equal_q.png", "")


def cells(values: np.ndarray) -> list[str]:
    return [f"{value:.4f}" if np.isfinite(value) else "" for value in values]


def half_width(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % t-interval of the mean of (n, COLUMNS)."""
    n = len(values)
    return stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m benchmarks.equal_q")
    parser.add_argument("--jobs", type=integer(1, 64), default=2,
                        help="runs side by side, one thread each (default: 2)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("equal_q.py"):
        main(parse_args())
