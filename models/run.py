"""A training run: its folder, resumed, logged, saved, and stopped by a signal or a NaN.

    run = TrainingRun(args, {"params": net_g, "optim_g": optim_g, ...}, LOSSES, members=5, settings)
    for step, batch in run.steps(loader, describe):
        ...
        run.record(step, lr, parts)
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from models.checkpoint import (
    check_finite,
    errors_named,
    load_file,
    lock,
    not_finite,
    replacing,
    save_atomic,
    write_csv,
)
from models.distributed import Interrupt, agree, any_rank, cleanup, from_rank_zero, gather
from models.images import write_png
from models.lora import merged_state
from models.settings import ema_checkpoint
from models.validation import Validation, fidelity, passes, sample_image

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EARLY = (1, 100)  # steps after which a run saves and shows samples besides: a fault shows at once
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "simplejpeg",
            "kornia-rs", "pyiqa", "spandrel")  # on which results may depend
LOCKS: list[IO] = []  # of the run folders of this process


class TrainingRun:
    """The run in the folder args.out, restored from its last.pt if there is one.

    Rank 0 alone reads and writes the folder, which other machines need not see.

    args:     out, steps, log_every, save_every, sample_every, rank, device
    state:    {name: module or optimiser or None}, all that a resume restores; "params_ema" makes
              the samples
    losses:   names of the losses that `record` gets, columns of log.csv
    members:  ground truths per set, K; log.csv has the share of each
    settings: what decides the result; a folder with other settings is refused

    done:  the step that the run resumes after, 0 for a new one
    extra: further values to keep in last.pt, those of the resumed run at first
    Raises ValueError for a damaged checkpoint, for one with other settings, for settings that
    differ between machines, and for a folder that another run writes to.
    """

    def __init__(
        self, args: argparse.Namespace, state: dict[str, nn.Module | Optimizer | None],
        losses: Sequence[str], members: int, settings: dict,
    ):
        self.args, self.state, self.losses, self.settings = args, state, losses, settings
        self.out, self.members = Path(args.out), members
        agree(f"{self.out}, --data and weights", settings)
        columns = [*losses, *(f"share_{k}" for k in range(members))]
        # Sums since the last row of log.csv; the first is the number of steps times ranks
        kind = torch.float32 if args.device.type == "mps" else torch.float64  # mps has no other
        self.meter = torch.zeros(1 + len(columns), dtype=kind, device=args.device)
        self.done, self.extra = 0, {}
        saved = from_rank_zero(lambda: open_run(self.out, settings))
        if saved:
            for name, part in state.items():
                if part is not None:
                    part.load_state_dict(saved[name])
            self.done = saved["step"]
            if self.done > args.steps:
                raise ValueError(f"{self.out}: has {self.done} steps, more than --steps "
                                 f"{args.steps}; give {self.done} or more, or another --out")
            self.extra = {k: v for k, v in saved.items()
                          if k not in (*state, "step", "meter", "settings", "log")}
            self._forget_other_ends()
            if args.rank == 0:  # it is the sum over the ranks
                self.meter = saved["meter"].to(self.meter)
        self.watch = LossWatch(losses, args.device)
        self.scored: dict[str, str] = {}  # the last validation, for the bar
        self.shown: tuple[Tensor, Tensor] | None = None  # LQ and ground truth of the sample images
        if args.rank == 0:
            if self.done:
                print(f"resuming {self.out} at step {self.done}")
            # A longer run continues the interval of a last row between two others
            rows = [row for row in (saved["log"].tolist() if saved else ())
                    if row[0] % args.log_every == 0 or row[0] == self.done == args.steps]
            write_config(self.out, args, settings)
            self.log = TrainingLog(self.out, ["step", "lr", *columns], rows, self.done, settings)
            self.log.val = self._validations()
            self.log.write()

    def steps(self, loader: Iterable, describe: Callable[[int], str]) -> Iterator[tuple[int, dict]]:
        """(step, batch) from self.done + 1 to args.steps; saves, and stops on a signal or NaN.

        describe: the samples of a step on this rank, for the message about a NaN.
        """
        if self.extra.get("stopped"):
            return
        interrupt = Interrupt()
        self.started = time.monotonic()
        # Off a terminal, `record` prints lines instead: a bar would fill a log with control codes
        self.bar = tqdm(loader, initial=self.done, total=self.args.steps, desc=self.out.name,
                        unit="it", disable=True if self.args.rank else not sys.stderr.isatty())
        for step, batch in enumerate(self.bar, start=self.done + 1):
            yield step, batch
            self._save_or_stop(step, bool(interrupt.caught), describe)
            if self.extra.get("stopped"):
                break
        interrupt.restore()

    def check_validation(self, validation: Validation) -> None:
        """ValueError if a resumed run cannot go on with its validation; before the first step."""
        names, before = ",".join(validation.columns), self.extra.get("val_columns")
        if before not in (None, names):
            raise ValueError(f"{self.out}: was validated by {before}, not {names}; make the same "
                             "metrics available, or give another --out")
        if self.extra.get("val_pairs") not in (None, validation.digest):
            raise ValueError(f"{self.out}: was validated on other images than --val's; give those, "
                             "or another --out")
        if self.args.guard and self.done and "val" not in self.extra:
            raise ValueError(f"{self.out}: --guard compares with the start, which this run did not "
                             "validate; leave --val out, or give another --out")
        self.extra |= {"val_columns": names, "val_pairs": validation.digest}

    def validate(self, step: int, validation: Validation) -> None:
        """Score the averaged network; every rank calls this, rank 0 scores.

        The scores at step 0 are the base. After two validations in a row that do not pass the guard
        (`passes`) the run stops; `restore_good` goes back. The network of the best fidelity is kept
        as net_g_best.pt.
        """
        net_ema = self.state["params_ema"]
        row = torch.tensor([from_rank_zero(lambda: [step, *validation(net_ema)])],
                           dtype=torch.float64)
        self.extra["val"] = torch.cat([self.extra.get("val", row[:0]), row])
        rows = self._validations()
        passed = [row["passed"] for row in rows.values()]
        if passed[-1] and step % self.args.val_every == 0:
            self.extra["good"] = {k: v.detach().cpu().clone()
                                  for k, v in net_ema.state_dict().items()}
        if not any(passed[-2:]):
            self.extra["stopped"] = step
        if self.args.rank == 0:
            self.log.val = rows
            self.log.validated(step)
            if step and fidelity(rows[step]) >= self.extra.get("best", -np.inf):
                self.extra["best"] = fidelity(rows[step])
                save_atomic(ema_checkpoint(merged_state(net_ema), self.args),
                            self.out / "net_g_best.pt")
            self.scored = {f"val_{k}": f"{v:.4g}" for k, v in rows[step].items() if k != "passed"}
            scores = ", ".join(f"{key} {value}" for key, value in self.scored.items())
            tqdm.write(f"{self.out}: step {step}: {scores}", file=sys.stderr)
            if self.extra.get("stopped"):
                kept = max(s for s, row in rows.items() if row["passed"])
                tqdm.write(f"{self.out}: stopped at step {step}, as fidelity fell; the result is "
                           f"that of step {kept} (log.csv)")

    def _forget_other_ends(self) -> None:
        """Drop the validation of a shorter run's last step: the longer run would not have it."""
        if "val" in self.extra:
            steps = self.extra["val"][:, 0]
            planned = (steps % self.args.val_every == 0) | (steps == self.args.steps)
            self.extra["val"] = self.extra["val"][planned]
            if not planned[-1]:
                self.extra.pop("stopped", None)

    def _validations(self) -> dict[int, dict[str, float]]:
        """{step: scores by column, and whether they passed the guard}, of all so far."""
        if "val" not in self.extra:
            return {}
        columns = self.extra["val_columns"].split(",")
        rows = {int(step): dict(zip(columns, scores, strict=True))
                for step, *scores in self.extra["val"].tolist()}
        base = next(iter(rows.values()))
        return {step: scores | {"passed": passes(scores, base, self.args.guard)}
                for step, scores in rows.items()}

    def restore_good(self) -> None:
        """The averaged network of the last validation that passed, if the last step was validated.
        """
        rows = self._validations()
        last = rows.get(self.extra.get("stopped", self.args.steps))
        if last and not last["passed"]:
            self.state["params_ema"].load_state_dict(self.extra["good"])

    def record(self, step: int, lr: float, parts: Sequence[dict]) -> None:
        """Note a step: a row of log.csv every args.log_every steps, the mean since the last one.

        parts: of the batch, each with choice (N,), which ground truth each sample learnt from, and
        losses by name
        """
        args, choice = self.args, torch.cat([part["choice"] for part in parts])
        self.parts = sum(torch.stack([part["losses"][name].detach() for name in self.losses])
                         for part in parts) / len(parts)
        shares = F.one_hot(choice, self.members).to(self.meter).mean(0)
        self.meter += torch.cat([self.meter.new_ones(1), self.parts.to(self.meter), shares])
        if step % args.log_every == 0 or step == args.steps:
            sums = self._summed_meter()
            if step % args.log_every == 0:  # else a longer run continues this row's interval
                self.meter.zero_()
            if args.rank == 0:
                means = (sums[1:] / sums[0]).tolist()  # no time among them: equal runs, equal logs
                self.log.row(step, lr, means)
                named = {name: f"{mean:.3g}" for name, mean in
                         zip(self.losses, means, strict=False) if mean}
                self.bar.set_postfix(named | self.scored)
                if self.bar.disable:
                    self._print_progress(step, named)
        if step == self.done + 1 and args.device.type == "cuda" and args.rank == 0:
            peak = torch.cuda.max_memory_allocated(args.device) / 2**30
            print(f"{self.out}: {peak:.1f} GiB of GPU memory at the most, after the first step")
        if self.shown and (step in EARLY or step % args.sample_every == 0):
            lq, gt = self.shown
            with torch.no_grad():
                sr = self.state["params_ema"](lq.to(args.device).float() / 255)
            self.log.images(step, sample_image(lq, sr, gt, f"SR, step {step}"))

    def _print_progress(self, step: int, named: dict[str, str]) -> None:
        seconds = (time.monotonic() - self.started) / (step - self.done)
        left = timedelta(seconds=round(seconds * (self.args.steps - step)))
        losses = ", ".join(f"{name} {mean}" for name, mean in named.items())
        print(f"{self.out}: step {step} of {self.args.steps}, {seconds:.3g} s each, {left} left: "
              f"{losses}", file=sys.stderr, flush=True)

    def _summed_meter(self) -> Tensor:
        """The meter's sum over the ranks."""
        sums = self.meter.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums

    def _save_or_stop(self, step: int, signalled: bool, describe: Callable[[int], str]) -> None:
        """Save now and then, at the end and on a signal; never weights that are not finite."""
        args, bad = self.args, self.watch(step, self.parts)
        save = (step % args.save_every == 0 or step in (*EARLY, args.steps)
                or bool(self.extra.get("stopped")))
        stop, failed = any_rank(signalled, bool(bad))
        if (save or stop) and not failed:
            bad = self.watch() or self._not_finite(step)
            failed, = any_rank(bool(bad))
        if failed:
            text = bad and (f"step {bad[0]}: not finite: {bad[1]}; {describe(bad[0])}; {self.out} "
                            "keeps its last good checkpoint")
            raise ValueError(next(text for text in gather(text) if text))
        if save or stop:
            meter = self._summed_meter()
            if args.rank == 0:
                parts = {name: None if part is None else part.state_dict()
                         for name, part in self.state.items()}
                save_last(self.out, self.extra | parts | {
                    "step": step, "meter": meter, "settings": self.settings,
                    "log": torch.tensor(self.log.rows, dtype=torch.float64)})
        if stop and step < args.steps:
            if args.rank == 0:
                print(f"{self.out}: stopped by a signal after step {step}; "
                      "rerun the same command to resume")
            cleanup()
            sys.exit(0)

    def _not_finite(self, step: int) -> tuple[int, str] | None:
        """(step, the weights that are not finite): a step's losses come before its gradients."""
        for part in self.state.values():
            if part and (name := not_finite({type(part).__name__: part.state_dict()})):
                return step, name
        return None


class LossWatch:
    """Finds a step whose losses are not finite, one step late so that a GPU need not wait."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names, self.cuda, self.waiting = names, device.type == "cuda", None

    def __call__(self, step: int = 0, losses: Tensor | None = None) -> tuple[int, str] | None:
        """(step, its losses) of the step before if they are not finite; None where all is well.

        losses: (names,) of this step; without arguments no further step is queued.
        """
        before, self.waiting = self.waiting, None
        if losses is not None:
            host = torch.empty(losses.shape, pin_memory=self.cuda)
            host.copy_(losses, non_blocking=self.cuda)
            event = torch.cuda.Event() if self.cuda else None
            if event:
                event.record()
            self.waiting = step, host, event
        if before is None:
            return None
        step, host, event = before
        if event:
            event.synchronize()
        if host.isfinite().all():
            return None
        parts = zip(self.names, host.tolist(), strict=True)
        return step, ", ".join(f"{name} {value:.4g}" for name, value in parts)


# ------------------------------------------------------------------------- files of a run


def open_run(out: Path, settings: dict) -> dict | None:
    """Take a run folder for this process, until it ends; returns `load_last`."""
    out.mkdir(parents=True, exist_ok=True)
    LOCKS.append(open(out / ".lock", "a"))  # noqa: SIM115  (closing it would end the lock)
    if lock(LOCKS[-1]) is False:
        raise ValueError(f"{out}: another run is writing to it; wait for its end, or give another "
                         "--out")
    for abandoned in [*out.glob(".*.tmp"), *out.glob("samples/.*.tmp")]:
        if abandoned.is_file():  # of a killed run
            abandoned.unlink()
    return load_last(out, settings)


def write_config(out: Path, args: argparse.Namespace, settings: dict) -> None:
    """config.json: command, flags, what decides the result, versions and commit."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, text=True,
                            capture_output=True) if shutil.which("git") else None
    record = {
        "command": " ".join(sys.argv), "flags": {k: str(v) for k, v in vars(args).items()},
        "settings": {k: str(v) for k, v in settings.items()},
        "commit": commit.stdout.strip() if commit and not commit.returncode else None,
        "packages": {"python": platform.python_version()} | versions(PACKAGES),
    }  # fmt: skip
    with replacing(out / "config.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """{package: version} of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def load_last(out: Path, settings: dict) -> dict | None:
    """The checkpoint that a run resumes from, its settings compared; None for a new run."""
    last, previous = out / "last.pt", out / "previous.pt"
    if not last.is_file():
        return None
    try:
        state = load_file(last)
        if not {"params", "params_ema", "optim_g", "step", "settings"} <= set(state):
            raise ValueError(f"{last}: not a training checkpoint; give another --out")
        check_finite(state, last)
    except ValueError as error:
        if previous.is_file():
            raise ValueError(f"{error}; for the one before: mv {previous} {last}") from error
        raise
    before = state["settings"]
    if before.get("recipe") != settings.get("recipe"):
        raise ValueError(f"{last}: was trained by another version, whose recipe differs (see "
                         "docs/differences.md); give another --out")
    if other := [f"--{key.replace('_', '-')} {before.get(key)}, not {settings.get(key)}"
                 for key in before | settings if before.get(key) != settings.get(key)]:
        raise ValueError(f"{last}: was trained with {'; '.join(other)}; give another --out")
    return state


def save_last(out: Path, state: dict) -> None:
    """Write last.pt and keep the one before as previous.pt; at every moment one is complete."""
    last, previous = out / "last.pt", out / "previous.pt"
    if last.is_file():
        with contextlib.suppress(OSError):  # a file system without hard links keeps none
            previous.unlink(missing_ok=True)
            os.link(last, previous)
    save_atomic(state, last)


class TrainingLog:
    """log.csv and samples/*.png of a run, and the same for TensorBoard where it is installed.

    out:    the run folder; TensorBoard's files go to out/tensorboard
    header: of log.csv; the first two columns are step and lr
    rows:   of log.csv so far, from last.pt; the file itself is not read
    done:   the step that the run resumes after
    hparams: the run's settings, for TensorBoard

    val:    {step: {column: score}}, the validations, columns val_... of log.csv
    """

    def __init__(self, out: Path, header: Sequence[str], rows: list[list[float]], done: int,
                 hparams: dict):
        self.out, self.header, self.rows, self.done = out, header, rows, done
        self.hparams = {key: value if isinstance(value, int | float | str) else str(value)
                        for key, value in hparams.items()}
        self.val: dict[int, dict[str, float]] = {}
        self.path, self.board = out / "log.csv", None

    def write(self) -> None:
        """log.csv: a row per step that has losses, validation or both."""
        losses = {int(step): [lr, *values] for step, lr, *values in self.rows}
        write_csv(self.path, [*self.header, *(f"val_{column}" for column in self._val_columns())], [
            self._cells(step, losses.get(step)) for step in sorted(losses | self.val)])

    def _val_columns(self) -> list[str]:
        return list(next(iter(self.val.values()), {}))

    def _cells(self, step: int, losses: Sequence[float] | None) -> list[str]:
        """A row of log.csv; empty cells for what a step does not have."""
        scores = self.val.get(step, dict.fromkeys(self._val_columns()))
        values = [*(losses or [None] * (len(self.header) - 1)), *scores.values()]
        return [str(step), *("" if value is None else f"{value:.6g}" for value in values)]

    def _writer(self) -> "SummaryWriter | None":
        """Started at the first row, after the data workers were forked: it starts a thread."""
        if self.board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
                from torch.utils.tensorboard.summary import hparams
            except ImportError:
                self.board = False
            else:
                self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.done + 1)
                for part in hparams(self.hparams, {}):  # add_hparams would open a second file
                    self.board.file_writer.add_summary(part)
                if 0 in self.val and not self.done:
                    self._add_validation(0)
        return self.board or None

    def row(self, step: int, lr: float, values: Sequence[float]) -> None:
        self.rows.append([step, lr, *values])
        with errors_named(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(",".join(self._cells(step, [lr, *values])) + "\n")
        if board := self._writer():
            for name, value in zip(self.header[1:], (lr, *values), strict=True):
                kind, _, rest = name.partition("_")  # l_pix, share_0, lr
                tag = {"l": f"loss/{name}", "share": f"share/{rest}"}.get(kind, name)
                board.add_scalar(tag, value, step)
            board.flush()

    def validated(self, step: int) -> None:
        self.write()
        if step and self._writer():  # step 0 is before the first row
            self._add_validation(step)

    def _add_validation(self, step: int) -> None:
        for name, value in self.val[step].items():
            self.board.add_scalar(f"val/{name}", value, step)

    def images(self, step: int, image: np.ndarray) -> None:
        """image: uint8 (H, W, 3)"""
        write_png(self.out / "samples" / f"{step:06d}.png", image)
        if board := self._writer():
            board.add_image("samples", image, step, dataformats="HWC")
            board.flush()
