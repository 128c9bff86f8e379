"""Kill a training and a fine-tuning at random moments, many times; compare with undisturbed ones.

    python tests/faults/kill_loop.py --kills 20

Both runs are resumed until done. Ends with exit code 0 if every weight, optimiser state and line of
log.csv is equal, bit for bit; prints a line per kill.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1, 2)]
import torch  # noqa: E402
from make_data import make_hggt  # noqa: E402
from test_faults import start, step_of  # noqa: E402
from test_train import TINY, run  # noqa: E402

from models.checkpoint import load_file  # noqa: E402


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


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


def main(kills: int, seed: int) -> bool:
    rng, same = random.Random(seed), True
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        make_hggt(cwd / "HGGT", n=4, size=64)
        two = ("train_sr.py", *TINY, "--sampler", "amo", "--save-every", 3, "--steps", 8 * kills)
        fine = ("finetune_lora.py", *TINY, "--sampler", "amo", "--init", "train/net_g_ema.pt",
                "--lora-rank", 2, "--lambda-q", 0.01, "--save-every", 3, "--steps", 8 * kills)
        for name, flags, part in (("train", two, (kills + 1) // 2), ("tune", fine, kills // 2)):
            run(*flags, "--out", cwd / name, cwd=cwd)
            out = cwd / f"{name}-killed"
            disturbed(flags, out, part, rng, cwd)
            files = [load_file(d / "last.pt") for d in (cwd / name, out)]
            logs = [(d / "log.csv").read_bytes() for d in (cwd / name, out)]
            ok = equal(*files) and logs[0] == logs[1]
            print(f"{name}: {part} kills, {files[0]['step']} steps, last.pt and log.csv "
                  + ("equal to the undisturbed run's" if ok else "DIFFER"), flush=True)
            same &= ok
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="half of them in each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    sys.exit(not main(arguments.kills, arguments.seed))
