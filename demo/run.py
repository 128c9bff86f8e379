"""The demo: the whole pipeline on embedded data with tiny networks; minutes on two CPU cores.

    python -m demo.run                         # SwinIR, seed 0; what `bash run_all.sh` runs
    python -m demo.run --net rrdb --seeds 1    # RealESRGAN's network, another seed
    python -m demo.run --seeds 1 2 3           # three seeds, and a table over them
    python -m demo.run --all-rows              # with the other fine-tunings of Table 7

Out: datasets/demo/NET-seedN, runs/demo/NET-seedN and results/demo-NET-seedN (results/demo for seed
     0 of SwinIR) with tables, figures and report.html. The log of each step is
     runs/demo/NET-seedN/STEP.log. Steps run side by side, one per core and four at most, each on
     one thread, so that the numbers do not depend on how many cores there are. Rerun the same
     command to resume. Ctrl-C and SIGTERM stop all steps (exit code 130).
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from demo.report import compare_logs, curve_figure, seeds_table, simulate_votes, write_orderings
from models.distributed import clean_exit
from models.flags import SEED, new_parser
from paper.page import page_picture

LABELS = {"swinir": "SwinIR", "rrdb": "RealESRGAN"}
DEGRADATIONS = {"swinir": "light", "rrdb": "two_round"}  # of the test images, as in training

# The rows of Tables 5 and 7; each fine-tuning starts from the row before the "+".
SAMPLERS = {"OrigsOnly": "origs_only", "Rand": "rand", "UPos": "upos", "SMA": "sma", "SMP": "smp",
            "AMO": "amo"}
FINE_TUNED = {
    "UPos+FT": "",
    "UPos+FT_HP": "--lambda-p 2",
    "UPos+FT_IG": "--lambda-a 0.1 --init-d {runs}/UPos/last.pt",
    "UPos+FT_NNR,IGx2": "--lambda-a 0.2 --lambda-q 0 --init-d {runs}/UPos/last.pt",
    "UPos+FT_NNR,IGx5": "--lambda-a 0.5 --lambda-q 0 --init-d {runs}/UPos/last.pt",
    "UPos+FT_PaQ2PiQ": "--iqa {judge}",
    "AMO+FT": "",
    "AMO+FT_Q0": "--lambda-q 0",  # the control; not in the paper
    "AMO+FT_full": "--full --lr 1e-4",
}
FEW = ("UPos+FT", "AMO+FT", "AMO+FT_Q0", "AMO+FT_full")  # without --all-rows
TABLE8 = ("OrigsOnly", "UPos", "AMO", "AMO+FT")

ALL = "--patch-size 64 --perceptual laplacian --num-workers 0 --log-every 10 --sample-every 50"
STAGE_ONE = ("--lambda-p 0 --lambda-a 0 --steps 400 --lr 1e-3 --milestones 200 300 360 "
             "--ema-decay 0.95")
# At a higher rate the discriminator collapses, on some rows only, which hides the samplers' effect.
STAGE_TWO = ("--steps 200 --lr 1e-3 --lr-d 2e-4 --lambda-a 0.03 --milestones 120 160 180 "
             "--ema-decay 0.985 --tau 3")
# lambda_q is in units of Q, 0 to 100, as the paper's 0.05 is in units of MUSIQ.
FINE_TUNING = ("--steps 60 --lr 2e-3 --lr-d 2e-4 --milestones 45 --ema-decay 0.9 --lora-rank 8 "
               "--lambda-q 0.001")

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # glibc keeps freed memory; else a twentieth of the time goes into fetching zeroed pages again.
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


# ------------------------------------------------------------------------- running steps


class Step(NamedTuple):
    """One process of the demo."""

    name: str
    after: Sequence[str]  # the steps that must have ended
    command: str  # the arguments of the Python interpreter
    shown: bool = False  # its tables go to the screen, not to its log
    makes: Path | None = None  # the step is skipped where this file exists


def run_steps(steps: Sequence[Step], logs: Path, jobs: int) -> None:
    """Run all steps, at most `jobs` at a time; among those that are ready, in the list's order.

    If a step fails, the end of its log is printed, the others are stopped, and the exit code is 1.
    """
    done = {step.name for step in steps if step.makes and step.makes.is_file()}
    waiting = [step for step in steps if step.name not in done]
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    try:
        while waiting or running:
            ready = [step for step in waiting if done.issuperset(step.after)]
            for step in ready[: jobs - len(running)]:
                waiting.remove(step)
                running[step.name] = start(step, logs / f"{step.name}.log"), time.monotonic()
            time.sleep(0.1)
            for name, (process, begin) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    fail(name, logs / f"{name}.log")
                done.add(name)
                print(f"  {name:<24} {time.monotonic() - begin:3.0f} s")
    finally:
        stop([process for process, _ in running.values()])


def fail(name: str, log: Path) -> None:
    lines = log.read_text(errors="replace").splitlines()[-5:]
    print("\n".join([*lines, f"demo.run: {name} failed; see {log}"]), file=sys.stderr)
    sys.exit(1)


def start(step: Step, log: Path) -> subprocess.Popen:
    """Start a step in its own session, so that Ctrl-C reaches it through `stop` alone."""
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *step.command.split()], env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=None if step.shown else file, stderr=file,
            start_new_session=True)


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM, on which training saves and ends; SIGKILL after 20 s, or a second Ctrl-C."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(20)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ------------------------------------------------------------------------- the demo's steps


class Demo:
    """Folders and steps of one network and seed."""

    def __init__(self, net: str, seed: int, all_rows: bool):
        tag = f"{net}-seed{seed}"
        self.net, self.seed, self.label = net, seed, LABELS[net]
        self.data, self.runs = Path(f"datasets/demo/{tag}"), Path(f"runs/demo/{tag}")
        self.results = Path("results/demo" if tag == "swinir-seed0" else f"results/demo-{tag}")
        self.reference = Path(f"results/reference/{tag}.csv")  # training logs to compare with
        self.rows = [*SAMPLERS, *(row for row in FINE_TUNED if all_rows or row in FEW)]
        self.q = f"demo.quality:q@{self.runs}/q.pt"
        self.judge = f"demo.quality:judge@{self.runs}/judge.pt"
        self.lq = f"{self.data}/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR"
        self.test = f"--gt {self.data}/HGGT/Test/GT/Test-100 --lq {self.lq}"

    def steps(self) -> list[Step]:
        """Everything but the last pages; what should begin early comes first."""
        data, runs = self.data, self.runs
        training = (f"--net {self.net}_tiny --data {data}/HGGT --iqa {self.q} --seed {self.seed} "
                    f"--cache {runs}/cache {ALL}")
        steps = [
            Step("data", (), f"-m demo.data --out {data} --seed {self.seed} "
                 f"--setting {DEGRADATIONS[self.net]}", shown=True),
            Step("q", ("data",), f"-m demo.quality --data {data} --which q --out {runs}/q.pt "
                 f"--seed {self.seed}", shown=True, makes=runs / "q.pt"),
            Step("start", ("data",), f"-m demo.nets --net {self.net}_tiny --seed {self.seed} "
                 f"--out {runs}/start.pt"),
            # Stage one learns from a flat folder: the originals
            Step("stage1", ("start",), f"train_sr.py {training} {STAGE_ONE} "
                 f"--data {data}/HGGT/Train/images/0-40/original --init {runs}/start.pt "
                 f"--out {runs}/stage1"),
            Step("judge", ("data",), f"-m demo.quality --data {data} --which judge "
                 f"--out {runs}/judge.pt --seed {self.seed}", shown=True, makes=runs / "judge.pt"),
            Step("analysis", ("q", "judge"), f"analyze_iqa.py --pairs {data}/SBS180K/train.csv "
                 f"--pairs-test {data}/SBS180K/test.csv --sets {data}/HGGT --metrics q={self.q} "
                 f"judge={self.judge} piqe --reference q --out {self.results}", shown=True),
        ]
        for base, sampler in reversed(SAMPLERS.items()):
            steps.append(Step(base, ("q", "stage1"), f"train_sr.py {training} {STAGE_TWO} "
                              f"--sampler {sampler} --init {runs}/stage1/net_g_ema.pt "
                              f"--out {runs}/{base}"))
            for row in self.rows:
                if row.startswith(f"{base}+"):
                    flags = FINE_TUNED[row].format(runs=runs, judge=self.judge)
                    steps.append(Step(row, (base, "judge"), f"finetune_lora.py {training} "
                                      f"{FINE_TUNING} --sampler {sampler} {flags} "
                                      f"--init {runs}/{base}/net_g_ema.pt --out {runs}/{row}"))
        return steps + self.table_steps()

    def table_steps(self) -> list[Step]:
        data, runs, results = self.data, self.runs, self.results
        model = f"{self.label}-{{0}}={runs}/{{0}}/net_g_ema.pt".format
        metrics = f"--metrics psnr ssim --extra q={self.q} judge={self.judge}"
        return [
            Step("table5", ("judge", *self.rows), "evaluate.py --models "
                 f"{' '.join(map(model, self.rows))} {self.test} {metrics} --save-sr {runs}/sr "
                 f"--out {results}/table5.csv", shown=True),
            Step("table8", ("judge", *TABLE8), "evaluate.py --models "
                 f"{' '.join(map(model, TABLE8))} --realsr {data}/RealSR(V3) {metrics} "
                 f"--out {results}/table8.csv", shown=True),
            # AMO with AMO+FT's adapters, from none to more than were trained
            *(Step(f"lora-{scale}", ("AMO+FT",), "-m tools.upscale --ckpt "
                   f"{runs}/AMO/net_g_ema.pt --lora {runs}/AMO+FT/lora.pt --lora-scale {scale} "
                   f"--export {runs}/lora-{scale}.pt") for scale in (0.5, 1.5)),
            Step("lora_curve", ("judge", "lora-0.5", "lora-1.5"), "evaluate.py --models "
                 f"0={runs}/AMO/net_g_ema.pt 0.5={runs}/lora-0.5.pt 1={runs}/AMO+FT/net_g_ema.pt "
                 f"1.5={runs}/lora-1.5.pt {self.test} {metrics} --out {results}/lora_curve.csv",
                 shown=True),
            # Naive fine-tuning at the quality of AMO+FT, for Figures 3 and 5
            Step("equal", ("judge", "AMO+FT", "AMO+FT_full"), "-m paper.equal --base "
                 f"{runs}/AMO/net_g_ema.pt --naive {runs}/AMO+FT_full/net_g_ema.pt --lora "
                 f"{runs}/AMO+FT/net_g_ema.pt --iqa {self.q} --lq {self.lq} "
                 f"--out {runs}/AMO+FT_full_eq.pt", shown=True),
            Step("equal_table", ("equal",), f"evaluate.py --models {self.label}-AMO+FT_full_eq="
                 f"{runs}/AMO+FT_full_eq.pt {self.test} {metrics} --save-sr {runs}/sr "
                 f"--out {results}/equal.csv", shown=True),
            Step("figures", ("analysis", "table5", "table8", "equal_table"), "-m paper.figures "
                 f"--results {results} --sr {runs}/sr {self.test} --quality q --held-out judge "
                 f"--reference {data}/pristine/test", shown=True),
            Step("study", ("table5",), "-m paper.user_study make "
                 f"--a {self.label}-AMO+FT={runs}/sr/{self.label}-AMO+FT "
                 f"--b {self.label}-UPos={runs}/sr/{self.label}-UPos --pairs 4 --out {runs}/study",
                 shown=True),
        ]

    def run(self, jobs: int) -> None:
        begin, runs, results = time.monotonic(), self.runs, self.results
        print(f"{self.label}, seed {self.seed}: logs in {runs}, results in {results}")
        if not self.data.is_dir():
            shutil.rmtree(runs, ignore_errors=True)  # of other data
        shutil.rmtree(runs / "study", ignore_errors=True)
        runs.mkdir(parents=True, exist_ok=True)
        run_steps(self.steps(), runs, jobs)

        # Simulated raters vote in the user study, which shows its analysis
        votes = runs / "study/votes"
        page_picture(runs / "study/rater01.html", results / "figure7.png")
        simulate_votes(runs / "study", runs / "sr", self.data / "pristine/test", votes)
        run_steps([Step("votes", (), "-m paper.user_study analyze "
                        f"{' '.join(map(str, sorted(votes.glob('*.json'))))} "
                        f"--key {runs}/study/key.json --out {results}/user_study_simulated.csv",
                        shown=True)], runs, jobs)

        # The curve, the orderings, the training logs beside the reference, and a page of all this
        curve_figure(results / "lora_curve.csv")
        write_orderings(results)
        if self.reference.is_file():
            compare_logs(runs, self.reference)
        run_steps([Step("report", (), f"-m paper.report --results {results} --sr {runs}/sr "
                        f"{self.test}", shown=True)], runs, jobs)
        print(f"done in {time.monotonic() - begin:.0f} s; results in {results}")


def main(args: argparse.Namespace) -> None:
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=True)  # keeps the order with what the steps print
    jobs = min(4, os.cpu_count() or 1)
    demos = [Demo(args.net, seed, args.all_rows) for seed in args.seeds]
    try:
        for demo in demos:
            demo.run(jobs)
    except KeyboardInterrupt:
        print("demo.run: stopped; rerun the same command to resume", file=sys.stderr)
        sys.exit(130)
    if len(demos) > 1:
        folders = {demo.seed: demo.results for demo in demos}
        seeds_table(folders, Path(f"results/demo/seeds_{args.net}.csv"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m demo.run")
    add = parser.add_argument
    add("--net", choices=list(LABELS), default="swinir", help="network (default: %(default)s)")
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="N",
        help="seeds of data, Q, judge and training; of several, a table over them (default: 0)")
    add("--all-rows", action="store_true", help="all rows of Table 7")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds: give each once")
    return args


if __name__ == "__main__":
    with clean_exit("demo.run"):
        main(parse_args())
