"""Which NR-IQA metric agrees with people on super-resolved images? (paper Sec. 3, 7; Tables 1-4, 6)

    python analyze_iqa.py --pairs datasets/SBS180K/train.csv \\
        --pairs-test datasets/SBS180K/test.csv --sets datasets/HGGT  # the paper's; CPU or one GPU
    torchrun --nproc_per_node=4 analyze_iqa.py ...                   # the same on four GPUs
    python analyze_iqa.py --pairs my.csv --columns image1=left image2=right score=votes \\
        --metrics musiq piqe q=demo.quality:q@q.pt                   # your pairs, your metric as q

In:  --pairs, --pairs-test: CSV manifests image1,image2,score[,model1,model2]. Paths are relative to
     the manifest's folder; score = fraction of raters that prefer the second image.
     --sets: labelled multi-GT sets in HGGT's layout.
Out: --out (default results/analysis):
     table6.csv, table1.csv  phase I: a few pairs of every two models compared
     table2.csv, table3.csv  phase II: all pairs, the best seven metrics
     table4.csv, figure2.csv HGGT, with Sec. 7.1's percentages; the pairs of Fig. 2
     scores/                 <metric>.csv, one row per image; <metric>.weights.txt, its weights
     The tables give the paper's columns first; comment lines (#) above them give the protocol.

Rerun the same command to resume (SIGTERM and Ctrl-C exit with code 0): images that have a score are
not scored again. An image that cannot be read is skipped and counts as a failure. After a change to
the code of your own metric, delete its file in scores/.
"""

import argparse
import functools
import importlib
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

from models.checkpoint import read_csv, write_csv
from models.distributed import clean_exit, cleanup, init_distributed, rank_zero_first
from models.flags import SEED, integer, new_parser
from models.hggt import load_sets
from models.iqa import load_iqa
from models.pairs import COLUMNS, Pairs, read_pairs
from models.scores import Scores, cache_stem, keep_decoded, score_images

# PAPER: Table 6, best first; the first seven are Table 1's
METRICS = (
    "paq2piq", "nima", "musiq", "liqe", "arniqa-tid", "qalign", "topiq_nr",
    "hyperiqa", "arniqa-kadid", "liqe_mix", "arniqa-flive", "topiq_nr-spaq", "arniqa-csiq",
    "musiq-spaq", "nima-vgg16-ava", "maniqa", "clipiqa+", "maniqa-kadid", "tres",
    "clipiqa+_vitL14_512", "musiq-paq2piq", "maniqa-pipal", "clipiqa+_rn50_512", "dbcnn", "clipiqa",
    "arniqa-live", "arniqa-clive", "arniqa-spaq", "arniqa", "musiq-ava", "nrqm", "cnniqa",
    "tres-flive", "pi", "brisque_matlab", "wadiqam_nr", "topiq_nr-flive", "ilniqe", "niqe",
    "brisque", "niqe_matlab", "piqe",
)  # fmt: skip
DISPLAY = {
    "paq2piq": "PaQ-2-PiQ", "nima": "NIMA", "musiq": "MUSIQ", "liqe": "LIQE",
    "arniqa-tid": "ARNIQA-TID", "qalign": "Q-Align", "topiq_nr": "TOPIQ-NR",
}  # fmt: skip
TOP = 7  # PAPER: Sec. 3.1, metrics that go on to phase II and HGGT
RESAMPLES = 1000  # of the bootstrap
DECODED_BYTES = 2**32  # of images that all processes keep for the next metric
PROTOCOL = (  # of Tables 1, 2, 3, 6
    "accuracy: share of the pairs on which the metric prefers the image that most raters do; "
    "equal quality is a miss",
    "ties: pairs with score 0.5, left out; failures: pairs with an image that could not be "
    f"scored, left out; ci: 95 % bootstrap over the pairs, {RESAMPLES} resamples; seconds: the "
    "metric's own time for all images of the phase",
)
IMAGES = "images: RGB, 8 bit, whole (no border cropped); quality up = better"


# ------------------------------------------------------------------------- the tables' maths


def draw_phase1(
    models: list[tuple[str, str]] | None, n: int, seed: int, each: int = 3, uniform: int = 1212
) -> np.ndarray:
    """Phase I's subset: `each` random pairs of every two models compared (paper Sec. 3.1).

    models: the two models of each of the n pairs, in any order; two that are compared in fewer
            pairs give all they have. None if unknown: `uniform` pairs are drawn from all.
    Returns the sorted indices of the drawn pairs, ties (score 0.5) among them.
    """
    rng = np.random.default_rng(seed)
    if models is None:
        return np.sort(rng.choice(n, min(n, uniform), replace=False))
    compared: dict[tuple, list[int]] = {}
    for i, pair in enumerate(models):
        compared.setdefault(tuple(sorted(pair)), []).append(i)
    drawn = [rng.choice(rows, min(each, len(rows)), replace=False)
             for _, rows in sorted(compared.items())]
    return np.sort(np.concatenate(drawn))


def verdicts(quality1: np.ndarray, quality2: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Does the metric prefer the image that most raters prefer? (paper Sec. 3.1)

    quality1, quality2: (n,) up = better, NaN where the image could not be scored
    score: (n,) in [0, 1], fraction of raters that prefer the second image
    Returns (n,) int8: 1 yes, 0 no, -1 left out (raters tied, or no quality).
    """
    raters = np.sign(np.round(score, 6) - 0.5)
    # ASSUMED: equal quality is a miss, as the metric then prefers neither; the paper is silent.
    metric = np.sign(quality2 - quality1)
    # PAPER: Sec. 3.1 leaves ties out of phase II; Table 6's values, all k/1136 of 1212 pairs, show
    # that phase I did so too.
    left_out = (raters == 0) | np.isnan(metric)
    return np.where(left_out, -1, metric == raters).astype(np.int8)


def accuracy(verdict: np.ndarray) -> float:
    """Percentage of yes among the yes and no of `verdicts`; NaN if there are none."""
    judged = verdict[verdict >= 0]
    return 100 * float(judged.mean()) if len(judged) else float("nan")


def bootstrap(verdict: np.ndarray, seed: int) -> np.ndarray:
    """95 % percentile intervals of M accuracies, each resample the same pairs for all metrics.

    verdict: (M, n) of `verdicts`. Returns (M, 2) in per cent, NaN without pairs. Pairs on which all
    metrics behave alike are interchangeable, so their number is drawn (multinomial), not the pairs.
    """
    verdict = verdict[:, (verdict >= 0).any(0)]
    if not verdict.size:
        return np.full((len(verdict), 2), np.nan)
    kinds, counts = np.unique(verdict, axis=1, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(counts.sum(), counts / counts.sum(), RESAMPLES).astype(float)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a metric without pairs
        accuracies = drawn @ (kinds == 1).T / (drawn @ (kinds >= 0).T)
    return 100 * np.percentile(accuracies, [2.5, 97.5], axis=0).T


def set_measures(quality: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """SRC, PM and NM of one metric on the sets with a negative (paper Sec. 3.2, Table 4).

    quality: (n, K) up = better. labels: (n, K) +1 positive, 0 similar, -1 negative.
    Returns src, the mean over the sets of Spearman's correlation between quality and label;
    pm, the fraction of sets in which at least one positive ranks below at least one similar;
    nm, the same for a negative above a similar; src_sets, the number of sets that have an SRC (none
    has it where all labels or all qualities are equal).
    """
    if not len(quality):
        return {"src": np.nan, "pm": np.nan, "nm": np.nan, "src_sets": 0}
    # ASSUMED: of all these sets, also those without a positive (similar), where nothing can be
    # misaligned; the paper says "the fraction of quintuplets".
    lowest = {v: np.where(labels == v, quality, np.inf).min(1) for v in (1, 0)}
    highest = {v: np.where(labels == v, quality, -np.inf).max(1) for v in (0, -1)}
    ranks = (rankdata(values, axis=1) for values in (quality, labels))  # equals share their mean
    x, y = (r - r.mean(1, keepdims=True) for r in ranks)
    spread = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    src = (x * y).sum(1)[spread > 0] / spread[spread > 0]
    return {
        "src": float(src.mean()) if len(src) else np.nan,
        "pm": float((lowest[1] < highest[0]).mean()),
        "nm": float((highest[-1] > lowest[0]).mean()),
        "src_sets": len(src),
    }


def set_columns(quality: np.ndarray, labels: np.ndarray, n_sets: int) -> dict[str, float]:
    """A metric's columns of Table 4, and the three percentages of Sec. 7.1.

    quality, labels: (n, K) as in `set_measures`, of the n sets with a negative among n_sets, the
    original first; a NaN is an image that could not be scored, and its set is left out.
    """
    scored = ~np.isnan(quality).any(1)
    share, q, v = 100 * len(labels) / n_sets, quality[scored], labels[scored]
    # ASSUMED: the original is one of the similar, as labels are relative to it; the columns named
    # _enhanced hold the other reading, in which it is left out.
    columns = set_measures(q, v)
    columns |= {f"{k}_enhanced": value for k, value in set_measures(q[:, 1:], v[:, 1:]).items()}
    # PAPER: Sec. 7.1, the metric ranks a negative highest: arg max, as AMO chooses
    highest = v[np.arange(len(q)), q.argmax(1)] == -1
    among = 100 * float(highest.mean()) if len(q) else float("nan")
    return columns | {
        "sets": len(q), "failures": len(quality) - len(q), "negative_percent": share,
        "negative_highest_percent": among, "overall_percent": share * among / 100,
    }


def separated_positives(quality: np.ndarray, labels: np.ndarray) -> list[tuple[int, int, int]]:
    """Two ground truths that people call equally positive but a metric tells apart (Fig. 2).

    quality: (n, K) up = better, NaN where not scored. labels: (n, K), +1 positive.
    Returns (set, lower, higher), of each set with two scored positives the pair that is furthest
    apart; the largest difference first.
    """
    pairs = []
    scored = (labels == 1) & ~np.isnan(quality)
    for i in np.flatnonzero(scored.sum(1) >= 2):
        positive = np.flatnonzero(scored[i])
        order = positive[np.argsort(quality[i, positive], kind="stable")]
        pairs.append((int(i), int(order[0]), int(order[-1])))
    return sorted(pairs, key=lambda p: quality[p[0], p[1]] - quality[p[0], p[2]])


# ------------------------------------------------------------------------- inputs


class Metric(NamedTuple):
    name: str  # in the tables: the alias if one is given, else pyiqa's name
    spec: str  # what load_iqa takes


class Sets(NamedTuple):
    names: list[str]  # n, of the sets that have a negative
    images: np.ndarray  # (n, K) paths, the original first
    labels: np.ndarray  # (n, K) +1 positive, 0 similar, -1 negative
    total: int  # number of all sets


def parse_metric(text: str, flag: str = "--metrics") -> Metric:
    """[ALIAS=]NAME[@FILE], NAME of pyiqa or module:function. Raises if it does not exist."""
    alias, spec, name, file = re.fullmatch(r"(?:([\w.+-]+)=)?(([^@]*)@?(.*))", text).groups()
    module, _, function = name.partition(":")
    try:
        if function:
            getattr(importlib.import_module(module), function)
        elif name not in METRICS:  # importing pyiqa takes seconds
            from pyiqa.default_model_configs import DEFAULT_CONFIGS

            if name not in DEFAULT_CONFIGS:
                raise ValueError("pyiqa has no such metric; see pyiqa.list_models()")
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{flag} {text}: {error}") from error
    if file and not os.path.isfile(file):
        raise FileNotFoundError(f"{flag} {text}: no weight file {file}")
    return Metric(alias or name, spec)


def resolve_args(args: argparse.Namespace) -> None:
    """Check the flags; --columns becomes a dict, --metrics and --phase2-metrics lists of Metric."""
    columns = dict(text.partition("=")[::2] for text in args.columns)
    if not set(columns) <= set(COLUMNS) or "" in columns.values():
        raise ValueError(f"--columns {' '.join(args.columns)}: write {'=NAME '.join(COLUMNS)}=NAME")
    if not (args.pairs or args.pairs_test or args.sets):
        raise ValueError("nothing to analyse; give --pairs, --pairs-test or --sets")
    default = METRICS if args.pairs else METRICS[:TOP]
    metrics = [parse_metric(text) for text in args.metrics or default]
    phase2 = [parse_metric(text, "--phase2-metrics") for text in args.phase2_metrics or ()]
    for flag, chosen in (("--metrics", metrics), ("--phase2-metrics", phase2)):
        names = [m.name for m in chosen]
        if len(set(names)) < len(names):
            raise ValueError(f"{flag} {' '.join(names)}: a name twice; give one as ALIAS=NAME")
    names = [m.name for m in phase2 or metrics]
    if args.reference not in names:
        raise ValueError(f"--reference {args.reference}: not among {', '.join(names)}; name one")
    args.columns, args.metrics, args.phase2_metrics = columns, metrics, phase2


def read_sets(root: str) -> Sets:
    """The sets with a negative of a labelled folder in HGGT's layout."""
    sets = rank_zero_first(lambda: load_sets(root))
    if sets.labels is None:
        raise ValueError(f"{root}: has no labels; Table 4 needs HGGT's layout")
    rows = np.flatnonzero((sets.labels == -1).any(1))
    paths = [os.path.abspath(path) for i in rows for path in sets.paths[i]]
    labels = sets.labels[rows]
    images = np.array(paths, object).reshape(labels.shape)
    return Sets([sets.names[i] for i in rows], images, labels, len(sets.names))


# ------------------------------------------------------------------------- scoring


def weights_file(args: argparse.Namespace, metric: Metric) -> Path:
    return Path(args.out) / "scores" / f"{cache_stem(metric.spec)}.weights.txt"


def build(args: argparse.Namespace, metric: Metric, device: torch.device) -> torch.nn.Module:
    """The metric's network; its weights are noted beside its scores."""
    net = load_iqa(metric.spec, device)
    write_csv(weights_file(args, metric), ["weights"], [[net.weights or "none"]])
    return net


def score_all(
    args: argparse.Namespace, metrics: list[Metric], images: list[np.ndarray]
) -> dict[str, Scores]:
    """{metric: scores of all images}, without the metrics that failed; images: arrays of paths.

    Raises ValueError if all metrics failed or, with --require-all, if one did.
    """
    _, world, device = init_distributed()
    paths = {path: path for array in images for path in array.flat}
    read = keep_decoded(DECODED_BYTES // world if len(metrics) > 1 else 0)
    scores = {m.name: score_images(m.spec, functools.partial(build, args, m, device), paths,
                                   Path(args.out) / "scores", device, args.batch_size, read=read)
              for m in metrics}
    failed = [name for name, s in scores.items() if s is None]
    if failed and args.require_all:
        raise ValueError(f"metric {', '.join(failed)}: not scored, see above (--require-all)")
    if len(failed) == len(scores):
        raise ValueError("no metric could be scored; the reasons are printed above")
    return {name: s for name, s in scores.items() if s is not None}


def judged(scores: Scores, pairs: Pairs) -> np.ndarray:
    """Verdicts of one metric on all pairs."""
    return verdicts(scores.of(pairs.image1), scores.of(pairs.image2), pairs.score)


def accuracies(pairs: Pairs, scores: dict[str, Scores], seed: int, prefix: str = "") -> dict:
    """{metric: {column of Tables 1, 2, 3, 6: value}} on these pairs."""
    if not scores:
        return {}
    columns, ties = {}, int((np.round(pairs.score, 6) == 0.5).sum())
    verdict = np.stack([judged(s, pairs) for s in scores.values()])
    for name, v, (low, high) in zip(scores, verdict, bootstrap(verdict, seed), strict=True):
        scored = int((v >= 0).sum())
        values = {"accuracy_percent": accuracy(v), "ci_low": low, "ci_high": high,
                  "scored": scored, "ties": ties, "failures": len(v) - ties - scored}
        columns[name] = {prefix + key: value for key, value in values.items()}
    return columns


# ------------------------------------------------------------------------- tables


class Table(NamedTuple):
    name: str  # of the file, without .csv
    columns: str  # the paper's, which stand first
    metrics: list[Metric]  # one row each
    cells: dict[str, dict]  # {metric: {column: value}}; absent for a metric that failed
    notes: list[str]  # lines above the header, the title first
    digits: int = 2


def tables_6_and_1(args: argparse.Namespace, train: Pairs, drawn: np.ndarray,
                   scores: dict[str, Scores]) -> tuple[Table, Table]:
    """Phase I (Sec. 3.1): all metrics, and the best seven, on the drawn pairs."""
    cells = accuracies(train.take(drawn), scores, args.seed)
    for name, s in scores.items():
        cells[name]["seconds"] = s.seconds
    ranked = sorted(args.metrics, key=lambda m: -cells.get(m.name, {}).get("accuracy_percent", -1))
    top = [m for m in ranked if m.name in scores][:TOP]
    how = "no model1, model2 in the manifest, drawn uniformly"
    if train.models:
        how = f"3 of each of {len(set(map(frozenset, train.models)))} comparisons of two models"
    notes = [f"{len(drawn)} of the {len(train.score)} pairs of {args.pairs}: {how}", *PROTOCOL]
    return (Table("table6", "pyiqa_name accuracy_percent", ranked, cells,
                  ["Table 6, phase I", *notes]),
            Table("table1", "metric pyiqa_name accuracy_percent", top, cells,
                  [f"Table 1, phase I, the best {TOP}", *notes]))


def phase2_table(args: argparse.Namespace, name: str, title: str, pairs: dict[str, Pairs],
                 scores: dict[str, Scores]) -> Table:
    """Tables 2 and 3: accuracy on the train and the test pairs, side by side."""
    cells = {m: {} for m in scores}
    for split, p in pairs.items():
        for m, columns in accuracies(p, scores, args.seed, f"{split}_").items():
            cells[m] |= columns
    manifests = {"train": args.pairs, "test": args.pairs_test}
    files = ", ".join(f"{split}: {path}" for split, path in manifests.items() if path)
    return Table(name, "metric pyiqa_name train_accuracy_percent test_accuracy_percent",
                 args.phase2_metrics, cells, [title, files, *PROTOCOL])


def table_2(args: argparse.Namespace, pairs: dict[str, Pairs], scores: dict[str, Scores]) -> Table:
    """Phase II (Sec. 3.1): all pairs."""
    table = phase2_table(args, "table2", "Table 2, phase II, all pairs", pairs, scores)
    for name, s in scores.items():
        table.cells[name]["seconds"] = s.seconds
    return table


def table_3(args: argparse.Namespace, pairs: dict[str, Pairs], scores: dict[str, Scores]) -> Table:
    """Phase II (Sec. 3.1): the other metrics on the pairs on which the reference fails."""
    failed = {split: p.take(judged(scores[args.reference], p) == 0)
              for split, p in pairs.items() if args.reference in scores}
    others = {name: s for name, s in scores.items() if name != args.reference}
    title = f"Table 3, phase II, pairs on which {args.reference} fails"
    table = phase2_table(args, "table3", title, failed, others)
    return table._replace(metrics=[m for m in table.metrics if m.name != args.reference])


def table_4(args: argparse.Namespace, sets: Sets, scores: dict[str, Scores]) -> Table:
    """Order within the sets that have a negative (Sec. 3.2), and Sec. 7.1's percentages."""
    cells = {name: set_columns(s.of(sets.images), sets.labels, sets.total)
             for name, s in scores.items()}
    return Table("table4", "metric pyiqa_name src pm nm", args.phase2_metrics, cells, [
        f"Table 4, {len(sets.labels)} sets with a negative of {sets.total} in {args.sets}",
        "the original counts as similar, in columns _enhanced it is left out; src_sets: "
        "where SRC is defined; failures: sets with an image not scored, left out",
        "Sec. 7.1: negative: sets with a negative; negative_highest: those, of them, where "
        "a negative has the highest quality; overall: the same, of all sets"], digits=4)


def section_7_1(reference: str, columns: dict[str, float]) -> str:
    return ("Section 7.1: {negative_percent:.1f} % of the sets have a negative; {0} ranks one "
            "highest in {negative_highest_percent:.1f} % of those, {overall_percent:.1f} % of all"
            .format(reference, **columns))


def write_figure_2(args: argparse.Namespace, sets: Sets, quality: np.ndarray) -> None:
    """figure2.csv: two Positives of a set, equal to people but not to the reference metric."""
    rows = []
    for i, *pair in separated_positives(quality, sets.labels):
        files = [os.path.relpath(sets.images[i, k]) for k in pair]
        low, high = quality[i, pair]
        rows.append([sets.names[i], *files, f"{low:.4f}", f"{high:.4f}", f"{high - low:.4f}"])
    header = ["set", "image1", "image2", "quality1", "quality2", "difference"]
    reference = [m for m in args.phase2_metrics if m.name == args.reference]
    write_csv(Path(args.out) / "figure2.csv", header, rows, [
        "Fig. 2: two Positives of a set, furthest apart in quality, among the sets with a negative "
        f"of {args.sets}; the largest difference first",
        f"quality: {args.reference}", IMAGES, *provenance(args, reference)])


def provenance(args: argparse.Namespace, metrics: list[Metric]) -> list[str]:
    """Notes: the weights of these metrics, the seed and the packages."""
    weights = [f"weights of {m.name}: {read_csv(file)[0][0]['weights']}"
               for m in metrics if (file := weights_file(args, m)).is_file()]
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "pyiqa", "numpy"))
    return [*weights, f"seed {args.seed}; Python {platform.python_version()}, {packages}"]


def write_table(args: argparse.Namespace, table: Table) -> None:
    """Write the CSV, notes in lines of # and the paper's columns first; print five columns."""
    rows = [{"metric": DISPLAY.get(m.name, m.name), "pyiqa_name": m.name}
            | table.cells.get(m.name, {}) for m in table.metrics]
    fields = list(dict.fromkeys([*table.columns.split(), *(key for row in rows for key in row)]))
    lines = []
    for row in rows:
        values = [row.get(field, "") for field in fields]
        lines.append([("" if np.isnan(v) else f"{v:.{table.digits}f}") if isinstance(v, float)
                      else str(v) for v in values])
    aliases = [f"{m.name} = {m.spec}" for m in dict.fromkeys(args.metrics + args.phase2_metrics)
               if m.name != m.spec]
    path = Path(args.out) / f"{table.name}.csv"
    write_csv(path, fields, lines,
              [*table.notes, IMAGES, *aliases, *provenance(args, table.metrics)])
    print(f"\n{path}: {table.notes[0]}")
    for line in (fields, *lines):
        print("  " + "".join(f"{text:<25}" for text in line[:5]).rstrip())


# ------------------------------------------------------------------------- the script


def main(args: argparse.Namespace) -> None:
    rank, _, _ = init_distributed()

    # Inputs, all of them checked before anything is scored
    resolve_args(args)
    manifests = {"train": args.pairs, "test": args.pairs_test}
    pairs = {split: read_pairs(path, args.columns) for split, path in manifests.items() if path}
    sets = read_sets(args.sets) if args.sets else None
    Path(args.out).mkdir(parents=True, exist_ok=True)

    # Phase I: a few pairs of every two models compared (Sec. 3.1; Tables 6 and 1)
    if train := pairs.get("train"):
        drawn = draw_phase1(train.models, len(train.score), args.seed)
        scores = score_all(args, args.metrics, [train.image1[drawn], train.image2[drawn]])
        table6, table1 = tables_6_and_1(args, train, drawn, scores)
        if rank == 0:
            write_table(args, table6)
            write_table(args, table1)
        if not args.phase2_metrics:
            reference = [m for m in args.metrics if m.name == args.reference]
            args.phase2_metrics = list(dict.fromkeys(table1.metrics + reference))

    # Phase II: all pairs; and, where the reference metric fails, the others (Tables 2 and 3)
    args.phase2_metrics = args.phase2_metrics or args.metrics
    images = [image for p in pairs.values() for image in (p.image1, p.image2)]
    images += [sets.images] if sets else []
    scores = score_all(args, args.phase2_metrics, images)
    if pairs and rank == 0:
        write_table(args, table_2(args, pairs, scores))
        write_table(args, table_3(args, pairs, scores))

    # HGGT: order within the sets that have a negative (Sec. 3.2, 7.1; Table 4, Fig. 2)
    if sets and rank == 0:
        table4 = table_4(args, sets, scores)
        write_table(args, table4)
        if len(sets.labels) and args.reference in scores:
            print("\n" + section_7_1(args.reference, table4.cells[args.reference]))
            write_figure_2(args, sets, scores[args.reference].of(sets.images))
    cleanup()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pairs", metavar="CSV", help="train manifest: phase I, and the train column of phase II")
    add("--pairs-test", metavar="CSV", help="test manifest: the test column of phase II")
    add("--sets", metavar="DIR", help="labelled multi-GT sets in HGGT's layout: Table 4, Sec. 7.1")
    add("--columns", nargs="+", default=[], metavar="KEY=NAME",
        help="the manifests' own names of image1, image2, score, model1, model2 where they differ; "
        "where score is the share that prefers the first image, swap image1 and image2")
    add("--metrics", nargs="+", metavar="NAME",
        help="[ALIAS=]NAME[@WEIGHTS], NAME of pyiqa or module:function (default: Table 6's 42; "
        "without --pairs the first seven)")
    add("--phase2-metrics", nargs="+", metavar="NAME",
        help="metrics of Tables 2-4 (default: the best seven of phase I, and the reference)")
    add("--reference", default="musiq", metavar="NAME",
        help="metric on whose failures Table 3 compares the others (default: %(default)s)")
    add("--require-all", action="store_true",
        help="fail if a metric cannot be scored, instead of leaving its row empty")
    add("--batch-size", type=integer(1), metavar="N",
        help="images of one size scored at a time, per process (default: 8 on a GPU, else 1)")
    add("--seed", type=SEED, default=0, metavar="N",
        help="of phase I's draw and the bootstrap (default: %(default)s)")
    add("--out", default="results/analysis", metavar="DIR",
        help="folder of the tables and of scores/ (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("analyze_iqa.py"):
        main(parse_args())
