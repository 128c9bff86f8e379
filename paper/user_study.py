"""Ask people which of two models' images look better, and test the answer (paper Sec. 12, Fig. 7).

    python -m paper.user_study make --a SwinIR-AMO+FT=results/paper/sr/SwinIR-AMO+FT \\
        --b SwinIR-UPos=results/paper/sr/SwinIR-UPos --raters 12 --pairs 25 --seed 0 --out study
    python -m paper.user_study analyze votes/*.json --key study/key.json \\
        --out results/user_study.csv

make.     In: two folders of 8-bit RGB PNGs with equal names and sizes (evaluate.py --save-sr).
          Out: a new folder with key.json and one page per rater, rater01.html ... Send each rater
          only their page: it works offline and on phones, and ends with a download of the votes.
          It contains neither the models' nor the files' names. Only key.json tells which side is
          which model; keep it. A practice pair comes first; its vote does not count.
analyze.  In: the raters' votes_*.json and key.json. Out: one row per rater, then the summary.

Every page has the same neutral gray surround, in dark mode too. A votes file tells the surround and
the screen; files of earlier versions, without either and without practice, are read as well.

A votes file has a CRC32 over its votes and a token of its rater. It reveals truncated, mixed up and
hand-edited files. It does not stop fraud: the page contains all that forging one takes.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import scipy
from PIL import Image
from scipy import stats

from models.checkpoint import errors_named, read_text, write_csv
from models.distributed import clean_exit
from models.flags import SEED, integer, new_parser, refuse
from models.images import list_images, png_size, read_rgb
from paper.page import fill

PAPER = ("paper (Test-100, SwinIR-AMO+FT against SwinIR-UPos): mean 69.7 %, median 68.0 %, "
         "standard error 4.8 %, 95 % interval [60.2, 79.1], p < 0.01")


# ------------------------------------------------------------------------- the method


def assign(n_images: int, raters: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rater sees which images, in which order, and on which sides (paper Sec. 12).

    Every image is seen raters * pairs / n_images times, which must be whole, and by no rater twice.
    Returns images (raters, pairs) int, indices in order of showing, and a_left (raters, pairs)
    bool: whether model A is on the left.
    """
    rng = np.random.default_rng(seed)
    seen = np.zeros(n_images, int)
    images = np.zeros((raters, pairs), int)
    a_left = np.zeros((raters, pairs), bool)
    for rater in range(raters):
        dealt = np.lexsort((rng.random(n_images), seen))[:pairs]  # the least seen, ties at random
        seen[dealt] += 1
        images[rater] = rng.permutation(dealt)
        # ASSUMED: each rater has A on the left in half of the pairs (odd: one more on either side,
        # at random), so that a habit of one side cancels; Sec. 12 says "randomized" only.
        a_left[rater] = rng.permutation((np.arange(pairs) + rng.integers(2)) % 2 == 0)
    return images, a_left


def summarise(preferences: np.ndarray) -> dict[str, float]:
    """The numbers of Sec. 12 from one preference per rater.

    preferences: (raters,) percent of a rater's pairs in which model A was preferred.
    Returns, in percent: mean, median, standard_error (sample deviation over sqrt(raters)),
    normal_low, normal_high (95 %, as the paper's), t_low, t_high (95 %, Student's t); and t, p of
    the one-sided t-test of the mean being above 50 %. What is undefined is nan: all but mean and
    median for one rater; t and p if all raters have the same preference.
    """
    n, mean = len(preferences), float(np.mean(preferences))
    se = float(np.std(preferences, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    t, p, t_width = math.nan, math.nan, math.nan
    if n > 1:
        t_width = float(stats.t.ppf(0.975, n - 1)) * se
        if np.ptp(preferences) > 0:
            t, p = map(float, stats.ttest_1samp(preferences, 50, alternative="greater"))
    # PAPER: Sec. 12; [60.2, 79.1] is 69.7 +- 1.96 * 4.8; Student's t with 11 degrees is wider
    return {
        "mean": mean, "median": float(np.median(preferences)), "standard_error": se,
        "normal_low": mean - 1.96 * se, "normal_high": mean + 1.96 * se,
        "t_low": mean - t_width, "t_high": mean + t_width, "t": t, "p": p,
    }  # fmt: skip


def checksum(study: str, rater: str, token: str, votes: list[dict],
             screen: dict | None = None) -> str:
    """CRC32 of a votes file, eight hex digits; votesFile() of study.html computes the same."""
    lines = [f"{v['id']} {v['choice']} {v['ms']} {v['zoom']}" for v in votes]
    lines += [screen_text(screen)] if screen else []
    return f"{zlib.crc32(chr(10).join([study, rater, token, *lines]).encode()):08x}"


def screen_text(screen: dict) -> str:
    """A votes file's screen in CSS pixels, device pixels per CSS pixel, surround."""
    return f"{screen['width']}x{screen['height']} at {screen['ratio']}, {screen['surround']}"


# ------------------------------------------------------------------------- make


def read_pair(a: Path, b: Path) -> list[np.ndarray]:
    """Two images of one size; ValueError names the file that is damaged or of another size."""
    (height, width), (height_b, width_b) = png_size(a), png_size(b)
    images = [read_rgb(a), read_rgb(b)]
    if (height, width) != (height_b, width_b):
        raise ValueError(f"{b}: {width_b}x{height_b}, but {a} is {width}x{height}")
    return images


def find_pairs(folders: list[Path]) -> tuple[list[str], str]:
    """Names of the PNGs that two folders share and a digest of all pixels; refuses unequal sets."""
    refuse([f"{folder}: no such folder" for folder in folders if not folder.is_dir()])
    listed = [list_images(folder) for folder in folders]
    refuse([f"{file}: not a PNG; convert it to 8-bit RGB PNG" for _, others in listed
            for file in others])
    files = [{path.name for path in chosen} for chosen, _ in listed]
    refuse([f"{folder}: no PNG files; save them with evaluate.py --save-sr"
            for folder, names in zip(folders, files, strict=True) if not names])
    refuse([f"{folder / name}: missing, but the other folder has it"
            for folder, names, others in zip(folders, files, files[::-1], strict=True)
            for name in sorted(others - names)])
    problems, equal, digest = [], [], hashlib.sha256()
    for name in sorted(files[0]):
        try:
            images = read_pair(*(folder / name for folder in folders))
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if np.array_equal(*images):
            equal.append(name)
        for image in images:
            digest.update(f"{name} {image.shape} ".encode() + image.tobytes())
    refuse(problems)
    if len(equal) == len(files[0]):
        raise ValueError(f"{folders[1]}: the same images as in {folders[0]}; give two models")
    if equal:
        print(f"user_study.py: warning: {len(equal)} pairs of equal images, the first {equal[0]}",
              file=sys.stderr)
    return sorted(files[0]), digest.hexdigest()


def check_design(raters: int, pairs: int, n_images: int) -> None:
    if pairs > n_images:
        raise ValueError(f"--pairs {pairs}: there are only {n_images} images, and no rater may see "
                         "one twice")
    if raters * pairs % n_images:
        step = n_images // math.gcd(n_images, raters)
        raise ValueError(f"--pairs {pairs}: {raters} raters would not see each of the {n_images} "
                         f"images equally often; give a multiple of {step}")


def make_key(args: argparse.Namespace, names: list[str], digest: str) -> dict:
    """What key.json holds: the settings, and per rater the token and the pairs with their sides."""
    settings = {
        "a": args.a[0], "b": args.b[0], "raters": args.raters, "pairs": args.pairs,
        "seed": args.seed, "images": names, "pixels_sha256": digest,
    }  # fmt: skip
    study = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    images, a_left = assign(len(names), args.raters, args.pairs, args.seed)
    plan = {}
    for i in range(args.raters):
        rater = f"rater{i + 1:02d}"
        # An image that this rater does not rate; the last of all, where they rate all
        others = np.setdiff1d(np.arange(len(names)), images[i])
        # ASSUMED: a practice pair that does not count, on a gray page; Sec. 12 tells of neither.
        practice = others[i % len(others)] if len(others) else images[i, -1]
        plan[rater] = {
            "practice": {"id": f"{rater}-practice", "image": names[practice], "left": "ab"[i % 2]},
            "token": hashlib.sha256(f"{study} {rater} {digest}".encode()).hexdigest()[:16],
            "pairs": [
                {"id": f"{rater}-{k + 1:02d}", "image": names[image], "left": "a" if left else "b"}
                for k, (image, left) in enumerate(zip(images[i], a_left[i], strict=True))
            ],
        }
    return {"study": study, **settings, "plan": plan}


def is_made(out: Path, key: dict, key_text: str) -> bool:
    """Whether `out` already holds all of this study; ValueError if it holds anything else."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    old = out / "key.json"
    if not old.is_file() or old.read_bytes() != key_text.encode():
        raise ValueError(f"{out}: exists with other content; give a new folder (--out)")
    pages = [out / f"{rater}.html" for rater in key["plan"]]
    refuse([f"{page}: missing; delete {out} to make the study again" for page in pages
            if not page.is_file()])
    return True


def encode(file: Path) -> str:
    """An image as base64 PNG, without its metadata, which may name the model."""
    buffer = io.BytesIO()
    Image.fromarray(read_rgb(file)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def page_of(rater: str, key: dict, encoded: dict[str, dict[str, str]]) -> str:
    """The rater's page, the practice pair first; encoded: {image: {"a": base64, "b": base64}}"""
    plan, pairs = key["plan"][rater], []
    for pair in (plan["practice"], *plan["pairs"]):
        left, right = ("a", "b") if pair["left"] == "a" else ("b", "a")
        images = encoded[pair["image"]]
        pairs.append({"id": pair["id"], "left": images[left], "right": images[right]})
    return fill("study.html", {"study": key["study"], "rater": rater, "token": plan["token"],
                               "pairs": pairs})


def make(args: argparse.Namespace) -> None:
    # Inputs
    (name_a, folder_a), (name_b, folder_b) = args.a, args.b
    if name_a == name_b:
        raise ValueError(f"--b {name_b}: the name of --a; give the two models different names")
    names, digest = find_pairs([Path(folder_a), Path(folder_b)])
    check_design(args.raters, args.pairs, len(names))
    key = make_key(args, names, digest)
    key_text, out = json.dumps(key, indent=1) + "\n", Path(args.out)
    if is_made(out, key, key_text):
        print(f"{out}: already holds this study, nothing written")
        return

    # Pages and key: the folder appears complete or not at all
    out.parent.mkdir(parents=True, exist_ok=True)
    encoded = {n: {"a": encode(Path(folder_a, n)), "b": encode(Path(folder_b, n))} for n in names}
    temporary = out.with_name(f".study.{os.getpid()}.tmp")
    try:
        with errors_named(out):
            temporary.mkdir()
            for rater in key["plan"]:
                page = page_of(rater, key, encoded)
                (temporary / f"{rater}.html").write_text(page, encoding="utf-8")
            (temporary / "key.json").write_text(key_text, encoding="utf-8")
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    views, size = args.raters * args.pairs // len(names), len(page) / 1e6
    print(f"{out}: study {key['study']}, {args.raters} pages of {args.pairs} pairs (about "
          f"{size:.1f} MB each), every one of the {len(names)} images {views} times.\n"
          "Send each rater only their raterNN.html. Keep key.json: it tells the models apart.")


# ------------------------------------------------------------------------- analyze


def read_json(path: str | Path, what: str) -> dict:
    """The object in a JSON file; what: what the file should be, for the messages."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give {what}")
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or truncated ({error}); get it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}; get the file again")
    return data


def read_key(path: str | Path) -> dict:
    """What `make` wrote; ValueError if it is damaged, or names a file outside its folder."""
    key = read_json(path, "the key.json that make wrote (--key)")
    try:
        valid = (re.fullmatch("[0-9a-f]{8}", key["study"])
                 and re.fullmatch("[0-9a-f]{64}", key["pixels_sha256"])
                 and type(key["raters"]) is int and key["plan"]
                 and all(is_model_name(key[m]) for m in "ab")
                 and all(is_plan(rater, plan) for rater, plan in key["plan"].items()))
    except (KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{path}: not the key.json of a study, or damaged (--key)")
    return key


def is_plan(rater: str, plan: dict) -> bool:
    """Whether key.json may hold this of a rater; a wrong type may also raise."""
    pairs = [*plan["pairs"], *([plan["practice"]] if "practice" in plan else [])]
    return bool(re.fullmatch(r"rater\d+", rater) and type(plan["token"]) is str and plan["pairs"]
                and all(type(pair["id"]) is str and pair["left"] in ("a", "b")
                        and pair["image"] == Path(pair["image"]).name for pair in pairs))


def is_vote(vote: object) -> bool:
    """Whether a vote is {id, choice, ms on show, zoom in device pixels per 100 image pixels}."""
    fields = {"id": str, "choice": str, "ms": int, "zoom": int}
    return (isinstance(vote, dict) and {k: type(v) for k, v in vote.items()} == fields
            and vote["choice"] in ("left", "right"))


def is_screen(screen: object) -> bool:
    """Whether it is {width, height, ratio, surround}, or None, as of earlier versions."""
    return screen is None or isinstance(screen, dict) and (
        screen.keys() == {"width", "height", "ratio", "surround"}
        and all(type(screen[k]) in (int, float) for k in ("width", "height", "ratio"))
        and type(screen["surround"]) is str
        and bool(re.fullmatch(r"rgb\(\d+, \d+, \d+\)", screen["surround"])))


def read_votes(path: str, key: dict) -> tuple[str, list[dict]]:
    """(rater, votes) of one file, without that on the practice pair.

    Raises ValueError unless the file is complete and of this study.
    """
    data = read_json(path, "the JSON files that the raters sent")
    study, rater, votes = data.get("study"), data.get("rater"), data.get("votes")
    if study != key["study"]:
        raise ValueError(f"{path}: of study {study}, but the key is of study {key['study']}")
    if not isinstance(rater, str) or rater not in key["plan"]:
        raise ValueError(f"{path}: rater {rater} is not one of this study's {key['raters']}")
    if not isinstance(votes, list) or not all(map(is_vote, votes)) or not is_screen(
            data.get("screen")):
        raise ValueError(f"{path}: malformed votes; get the file again")
    plan = key["plan"][rater]
    counted = [vote for vote in votes if vote["id"] != plan.get("practice", {}).get("id")]
    ids, known = [vote["id"] for vote in counted], [pair["id"] for pair in plan["pairs"]]
    if unknown := [i for i in ids if i not in known]:
        raise ValueError(f"{path}: pair {unknown[0]} is not one of {rater}'s")
    if len(set(ids)) < len(known) or data.get("finished") is not True:
        raise ValueError(f"{path}: unfinished, {len(set(ids))} of {len(known)} pairs; ask the "
                         "rater to finish")
    if len(ids) > len(known):
        raise ValueError(f"{path}: votes twice on a pair; get the file again")
    if data.get("checksum") != checksum(study, rater, plan["token"], votes, data.get("screen")):
        raise ValueError(f"{path}: wrong checksum, so the file was edited; get it again")
    return rater, counted


def gather_votes(paths: list[str], key: dict) -> dict[str, list[dict]]:
    """{rater: votes} in the key's order; ValueError lists every bad file."""
    votes, file_of, problems = {}, {}, []
    for path in paths:
        try:
            rater, cast = read_votes(path, key)
            if rater in votes:
                raise ValueError(f"{path}: {rater} again, as in {file_of[rater]}; give one of them")
            votes[rater], file_of[rater] = cast, path
        except (ValueError, OSError) as error:
            problems.append(str(error))
    refuse(problems, shown=len(problems))
    if missing := [rater for rater in key["plan"] if rater not in votes]:
        print(f"user_study.py: warning: {len(votes)} of {key['raters']} raters; missing "
              f"{', '.join(missing)}", file=sys.stderr)
    return {rater: votes[rater] for rater in key["plan"] if rater in votes}


def count_for_a(plan: dict, votes: list[dict]) -> int:
    """The rater's votes for model A; only the key tells on which side it was."""
    left = {pair["id"]: pair["left"] for pair in plan["pairs"]}
    return sum((vote["choice"] == "left") == (left[vote["id"]] == "a") for vote in votes)


def count_screens(paths: list[str]) -> str:
    """How many raters had which screen and surround, of votes files that `read_votes` accepted."""
    screens = [read_json(path, "a votes file").get("screen") for path in paths]
    counts = Counter(screen_text(screen) if screen else "not recorded" for screen in screens)
    return "; ".join(f"{text} ({count})" for text, count in counts.most_common())


def table_comments(key: dict, votes: dict[str, list[dict]], screens: str) -> list[str]:
    every = [vote for cast in votes.values() for vote in cast]
    lefts = 100 * sum(vote["choice"] == "left" for vote in every) / len(every)
    shrunk = sum(vote["zoom"] < 100 for vote in every)
    return [
        f"study {key['study']}: percent of votes for {key['a']} over {key['b']}, {len(votes)} of "
        f"{key['raters']} raters, {len(every)} votes; sides hidden and balanced",
        "value: percent, but for t and p, one-sided t-test of the raters' mean against 50 %; "
        "standard error: sample deviation over the root of the raters; intervals 95 %",
        f"left chosen in {lefts:.1f} % of the votes, either model; {shrunk} votes on images shrunk "
        "to fit the screen",
        f"screens, device pixels per CSS pixel, surround (raters): {screens}",
        f"images: whole, RGB, 8 bit, as they are; sha256 {key['pixels_sha256'][:12]}",
        f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}",
        PAPER,
    ]


def summary_text(summary: dict[str, float], raters: int) -> str:
    """The result of `summarise` in words, with the reason for what is undefined."""

    def interval(kind: str) -> str:
        low, high = summary[f"{kind}_low"], summary[f"{kind}_high"]
        return "undefined" if math.isnan(low) else f"[{low:.1f}, {high:.1f}]"

    reason = "undefined" + (" for one rater" if raters == 1 else ", all raters have one preference")
    se = reason if raters == 1 else f"{summary['standard_error']:.1f} %"
    test = f"t = {summary['t']:.2f}, p = {summary['p']:.2g}"
    return (f"mean {summary['mean']:.1f} %, median {summary['median']:.1f} %, standard error {se}\n"
            f"95 % interval, normal: {interval('normal')}; Student's t: {interval('t')}\n"
            "mean above 50 %, one-sided t-test: "
            + (reason if math.isnan(summary["t"]) else test))


def analyze(args: argparse.Namespace) -> None:
    key = read_key(args.key)
    votes = gather_votes(args.votes, key)
    counts = {rater: count_for_a(key["plan"][rater], cast) for rater, cast in votes.items()}
    percents = {rater: 100 * n / len(votes[rater]) for rater, n in counts.items()}
    summary = summarise(np.array([*percents.values()]))
    comments = table_comments(key, votes, count_screens(args.votes))

    rows = [[rater, len(votes[rater]), n, f"{percents[rater]:.2f}"] for rater, n in counts.items()]
    for name, x in summary.items():
        rows.append([name, "", "", "" if math.isnan(x) else f"{x:.4g}" if name == "p"
                     else f"{x:.2f}"])
    write_csv(args.out, ["rater", "pairs", "for_a", "value"], rows, comments)

    print(comments[0])
    for rater, n in counts.items():
        print(f"  {rater}  {n:3d} of {len(votes[rater])}  {percents[rater]:5.1f} %")
    print(summary_text(summary, len(votes)), comments[2], PAPER, sep="\n")


# ------------------------------------------------------------------------- flags


def is_model_name(name: str) -> bool:
    """Whether a name fits on one line and is one part of a path."""
    return name.isprintable() and not set(name) & set("/\\") and name not in ("", ".", "..")


def name_and_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not is_model_name(name) or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=DIR, NAME without a slash")
    return name, folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="make|analyze")
    sub = commands.add_parser("make", help="write the raters' pages and the key", **layout)
    sub.set_defaults(main=make)
    add = sub.add_argument
    add("--a", required=True, type=name_and_folder, metavar="NAME=DIR",
        help="model whose preference is measured, and its PNGs")
    add("--b", required=True, type=name_and_folder, metavar="NAME=DIR",
        help="model that it is compared with, and its PNGs of the same names")
    add("--out", required=True, metavar="DIR", help="study folder to make")
    add("--raters", type=integer(1, 10_000), default=12,
        help="raters, each with a page (default: the paper's 12)")
    add("--pairs", type=integer(1), default=25,
        help="image pairs per rater (default: the paper's 25)")
    add("--seed", type=SEED, default=0, help="seed of groups, order and sides (default: 0)")
    sub = commands.add_parser("analyze", help="check and count the votes", **layout)
    sub.set_defaults(main=analyze)
    add = sub.add_argument
    add("votes", nargs="+", metavar="FILE", help="votes_*.json of the raters")
    add("--key", required=True, metavar="FILE", help="key.json of the study")
    add("--out", required=True, metavar="FILE", help="table to write (.csv)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("user_study.py"):
        args = parse_args()
        args.main(args)
