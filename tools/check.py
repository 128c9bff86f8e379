"""Check what a list of commands needs before the first one starts, or check one data folder.

    DRY=1 bash run_all.sh paper | python -m tools.check --plan    # part of `run_all.sh paper`
    python -m tools.check --data datasets/HGGT                    # decode every image of a folder
    python -m tools.check --data datasets/HGGT --cache DIR        # and compare its --cache file

--plan reads commands from stdin, one per line, and checks what those of the four scripts need: data
folders, weights (missing metric weights are downloaded), GPUs and disk space. All problems are
listed at once, one per line, with exit code 2. Weights that a command of the list writes need not
exist yet. Lines that begin with # are skipped. --data prints counts, sizes, labels and problems.
--cache compares every image in the file that train_sr.py --cache made with its checksum.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import analyze_iqa
import evaluate
import finetune_lora
import train_sr
from models.cache import PixelCache
from models.checkpoint import one_line
from models.distributed import clean_exit
from models.flags import integer, new_parser, refuse
from models.hggt import check_data, load_sets
from models.iqa import PREFETCH
from models.metrics import load_metric, pyiqa_name
from models.quality import image_digest, score_folder
from models.samplers import LABELLED
from models.settings import uses_quality
from models.testset import find_hggt_test, find_realsr
from models.weights import prefetch

SCRIPTS = {f"{script.__name__}.py": script
           for script in (analyze_iqa, train_sr, finetune_lora, evaluate)}
TRAINING = ("train_sr.py", "finetune_lora.py")
Command = tuple[str, argparse.Namespace, int]  # script, its flags, torchrun's processes or 0
Check = tuple[Callable, ...]  # a function and its arguments


class MissingWeights(Exception):
    """The weights of a metric, or of vgg19, are missing and cannot be downloaded; its name."""


def read_plan(lines: Iterable[str]) -> list[Command]:
    """The commands of the four scripts, parsed by the scripts; a wrong flag exits with code 2."""
    commands = []
    for line in lines:
        words = [] if line.startswith("#") else shlex.split(line)
        script = next((word for word in words if word in SCRIPTS), None)
        if script:
            at = words.index(script)
            launcher = new_parser("", "torchrun")
            launcher.add_argument("--nproc_per_node", type=integer(0), default=0)  # 0: none
            processes = launcher.parse_known_args(words[:at])[0].nproc_per_node
            commands.append((script, SCRIPTS[script].parse_args(words[at + 1 :]), processes))
    return commands


# ------------------------------------------------------------------------- single checks
# Each prints what it has found, and raises ValueError, OSError or MissingWeights, or returns a list
# of problems.


def check_sets(folder: str, labels: bool) -> None:
    """Index a multi-GT folder, which must have labels if `labels`."""
    sets = load_sets(folder)
    if labels and sets.labels is None:
        raise ValueError(f"{folder}: has no labels; upos, smp and analyze_iqa.py need them")
    print(f"{folder}: {len(sets.names)} sets")


def check_test(gt: str, lq: str) -> list[str]:
    """Index a test set, and compare its LQ images with the GTs."""
    sets, _, problems = find_hggt_test(gt, lq)
    print(f"{gt}: {len(sets.names)} test images")
    return problems


def check_realsr(folder: str) -> list[str]:
    sets, _, problems = find_realsr(folder)
    print(f"{folder}: {len(sets.names)} test images")
    return problems


def check_file(path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")


def check_init(net: str, path: str) -> None:
    """--init loads as the network that --net names."""
    train_sr.build_generator(net, path, any_size=net == "auto")
    print(f"{path}: weights of {net}")


def check_discriminator(net: str, path: str) -> None:
    train_sr.build_discriminator(net, path)
    print(f"{path}: discriminator")


def check_metric(name: str) -> None:
    """The weights of a metric, or of vgg19, are there or can be downloaded.

    name: pyiqa's; with @FILE, as a column of a table has it
    """
    own = ":" in name or "@" in name  # your own metric, or your own weights
    try:
        if own:
            load_metric(name, torch.device("cpu"))
        else:
            prefetch(name)
    except (ValueError, OSError, ImportError) as error:
        package = isinstance(error.__cause__, ImportError)  # what is missing is a package
        if isinstance(error, OSError) and not own and not package:
            raise MissingWeights(name) from error
        raise ValueError(f"{name}: {one_line(error)}") from error
    print(f"{name}: ready", flush=True)


def check_machine(commands: list[Command]) -> list[str]:
    """GPUs for the processes, whole batches for each GPU, room on the disk."""
    problems = []
    processes = max((count for *_, count in commands), default=0)
    found = torch.cuda.device_count()
    if found < processes:
        problems.append(f"GPUS={processes}: found {found}, and each process needs one")
    trained = [(args, count) for script, args, count in commands if script in TRAINING]
    for batch, count in dict.fromkeys(
        (args.batch_size or train_sr.PRESETS[args.net or "swinir"]["batch_size"], count)
        for args, count in trained if args.net != "auto"
    ):
        if count and batch % count:
            problems.append(f"the batch size {batch} must be divisible by the {count} processes "
                            "(GPUS=)")
    # A run folder holds weights, averages and two optimisers, and all of them twice during a save
    need, free = 2 + len(trained), shutil.disk_usage(".").free // 2**30
    if free < need:
        problems.append(f"{free} GB free on this disk; about {need} GB are needed")
    return problems


# ------------------------------------------------------------------------- the plan


def analysis_needs(args: argparse.Namespace) -> Iterator[Check]:
    yield from ((check_file, path) for path in (args.pairs, args.pairs_test) if path)
    if args.sets:
        yield check_sets, args.sets, True
    for name in args.metrics or analyze_iqa.METRICS:
        yield check_metric, analyze_iqa.parse_metric(name).spec


def evaluation_needs(args: argparse.Namespace) -> Iterator[Check]:
    yield (check_realsr, args.realsr) if args.realsr else (check_test, args.gt, args.lq)
    for name in (*args.metrics, *(extra.split("=", 1)[1] for extra in args.extra)):
        if name not in ("psnr", "ssim"):
            yield check_metric, name if "@" in name else pyiqa_name(name)


def training_needs(args: argparse.Namespace, written: set[str]) -> Iterator[Check]:
    """written: run folders of the plan, whose weights need not exist yet"""
    yield check_sets, args.data or "datasets/HGGT", args.sampler in LABELLED
    if args.init and str(Path(args.init).parent) not in written:
        yield check_init, args.net or "auto", args.init
    if args.init_d and str(Path(args.init_d).parent) not in written:
        yield check_discriminator, args.net or train_sr.net_in(args.init), args.init_d
    if uses_quality(args):
        yield from ((check_metric, name) for name in args.iqa)
    if args.lambda_p and args.perceptual == "vgg19":
        yield check_metric, "vgg19"


def check_plan(commands: list[Command]) -> list[str]:
    """All that is missing or wrong, a line each."""
    problems, needs, missing = check_machine(commands), [], []
    written = {str(Path(args.out)) for script, args, _ in commands
               if script in TRAINING and args.out}
    for script, args, _ in commands:
        if script == "analyze_iqa.py":
            needs += analysis_needs(args)
        elif script == "evaluate.py":
            needs += evaluation_needs(args)
        else:
            needs += training_needs(args, written)
    # Each once, the downloads last
    for check, *arguments in sorted(dict.fromkeys(needs), key=lambda c: c[0] is check_metric):
        try:
            problems += check(*arguments) or []
        except MissingWeights as error:
            missing.append(str(error))
        except (ValueError, OSError) as error:
            problems.append(one_line(error))
    if missing:
        problems.append(f"{', '.join(missing)}: weights are missing and cannot be downloaded; on a "
                        f"machine with a network, run: {PREFETCH} {' '.join(missing)}")
    return list(dict.fromkeys(problems))


def main(args: argparse.Namespace) -> None:
    if args.plan:
        problems = check_plan(read_plan(sys.stdin))
        refuse(problems, shown=len(problems))
        return
    problems = check_data(args.data)
    if args.cache and not problems:
        sets = load_sets(args.data)
        cache = PixelCache(args.cache, sets, image_digest(sets, score_folder(sets, args.cache)))
        cache.check()
        print(f"{cache.file}: {len(cache.checksums)} images as their checksums say")
    if problems:
        raise ValueError(f"{args.data}: {len(problems)} problems, listed above")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m tools.check")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", action="store_true", help="check the commands on stdin")
    what.add_argument("--data", metavar="DIR", help="check a data folder, decoding every image")
    parser.add_argument("--cache", metavar="DIR", help="check the --cache of --data, or make it")
    args = parser.parse_args(argv)
    if args.cache and not args.data:
        parser.error("--cache: give --data, whose images it holds")
    return args


if __name__ == "__main__":
    with clean_exit("check.py"):
        main(parse_args())
