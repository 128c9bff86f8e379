"""Kill a training and a fine-tuning at random moments, many times; compare with undisturbed ones.

    python tests/faults/kill_loop.py --kills 20
    python tests/faults/kill_loop.py --deterministic        # on a GPU

Both runs are resumed until done; the fine-tuning validates, with a guard that it passes. Ends with
exit code 0 if every weight, optimiser state and line of log.csv is equal, bit for bit or to
--tolerance; prints a line per kill and the largest difference. The first GPU is used where there is
one; CUDA_VISIBLE_DEVICES= takes the CPU.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1, 2)]
import torch  # noqa: E402
from make_data import make_hggt  # noqa: E402
from PIL import Image  # noqa: E402
from scripts import ROOT, environment, run_script  # noqa: E402
from test_faults import step_of  # noqa: E402
from test_train import TINY, read_log  # noqa: E402

from models.checkpoint import load_file  # noqa: E402
from models.flags import new_parser  # noqa: E402

# The other tests hide the GPUs
DEVICE = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}


def difference(a: object, b: object) -> float:
    """Largest difference of two numbers in a and b; infinite where anything else differs."""
    if type(a) is not type(b):
        return math.inf
    if isinstance(a, torch.Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype):
        if torch.equal(a, b):
            return 0.0
        largest = (a.double() - b.double()).abs().max().item()  # NaN if there is one
        return math.inf if math.isnan(largest) else largest
    if isinstance(a, dict) and a.keys() == b.keys():
        return max((difference(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, list | tuple) and len(a) == len(b):
        return max(map(difference, a, b), default=0.0)
    if isinstance(a, float) and math.isfinite(a - b):
        return abs(a - b)
    return 0.0 if not isinstance(a, torch.Tensor) and a == b else math.inf


def result(out: Path) -> tuple:
    """last.pt and the rows of log.csv; a cell without a validation stays ""."""
    rows = [{k: float(v) if v else v for k, v in row.items()} for row in read_log(out / "log.csv")]
    return load_file(out / "last.pt"), rows


def make_pairs(originals: Path, lq: Path, gt: Path) -> None:
    """Copy images to `gt`, and a quarter of their size to `lq`, for --val."""
    shutil.copytree(originals, gt)
    lq.mkdir()
    for path in gt.iterdir():
        with Image.open(path) as image:
            image.reduce(4).save(lq / path.name)


def start(*flags: object, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / flags[0]), *map(str, flags[1:])], cwd=cwd, text=True,
        env=environment(**DEVICE), start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)


def run(*flags: object, cwd: Path) -> None:
    done = run_script(*flags, cwd=cwd, **DEVICE)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def disturbed(flags: tuple, out: Path, kills: int, rng: random.Random, cwd: Path) -> None:
    """Run until done, `kills` times killed on the way: while loading, in a step, in a write."""
    for kill in range(kills):
        process, before = start(*flags, "--out", out, cwd=cwd), step_of(out)
        wait = rng.random() < 0.75  # else at any time after the start, imports included
        while wait and process.poll() is None and step_of(out) <= before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.0 if wait else 6.0))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        stderr = process.communicate()[1]
        last = load_file(out / "last.pt")["step"] if (out / "last.pt").exists() else 0
        print(f"{out.name}: kill {kill + 1}, log at step {step_of(out)}, last.pt at {last}",
              flush=True)
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"ended before the kill, exit code {process.returncode}: "
                             f"{stderr[-500:]}")
    run(*flags, "--out", out, cwd=cwd)


def main(kills: int, seed: int, more: tuple[str, ...] = (), tolerance: float = 0.0) -> bool:
    """more: flags of the trainings; tolerance: largest difference of any number that passes."""
    rng, same = random.Random(seed), True
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        make_hggt(cwd / "HGGT", n=4, size=64)
        make_pairs(cwd / "HGGT/Train/images/0-4/original", cwd / "lq", cwd / "gt")
        two = ("train_sr.py", *TINY, "--sampler", "amo", "--init", "none", "--save-every", 3,
               "--steps", 8 * kills, *more)
        fine = ("finetune_lora.py", *TINY, "--sampler", "amo", "--init", "train/net_g_ema.pt",
                "--lora-rank", 2, "--lambda-q", 0.01, "--save-every", 3, "--steps", 8 * kills,
                "--val", "lq", "gt", "--val-every", 4, "--guard", 100, *more)  # 100: passes
        for name, flags, part in (("train", two, (kills + 1) // 2), ("tune", fine, kills // 2)):
            run(*flags, "--out", cwd / name, cwd=cwd)
            out = cwd / f"{name}-killed"
            disturbed(flags, out, part, rng, cwd)
            files = [result(d) for d in (cwd / name, out)]
            apart = difference(*files)
            ok = apart <= tolerance
            print(f"{name}: {part} kills, {files[0][0]['step']} steps, last.pt and log.csv "
                  + ("equal to the undisturbed run's" if ok else "DIFFER")
                  + (f", by up to {apart:.3g}" if apart else ""), flush=True)
            same &= ok
    return same


if __name__ == "__main__":
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="half of them in each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--deterministic", action="store_true", help="a flag of the trainings")
    parser.add_argument("--tolerance", type=float, default=0.0,
                        help="largest difference of any number that passes; 0: bit for bit")
    args = parser.parse_args()
    more = ("--deterministic",) if args.deterministic else ()
    sys.exit(not main(args.kills, args.seed, more, args.tolerance))
