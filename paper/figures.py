"""Figures 2-8, Table 7, the paper's numbers and claims beside ours, from tables and SR images.

    python -m paper.figures --results results/paper --sr results/paper/sr \\
        --gt datasets/HGGT/Test/GT/Test-100 \\
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR
    python -m paper.figures --results results/paper       # no SR images: tables and plots

In:  --results with tables 1-4, 6 and figure2.csv of analyze_iqa.py, tables 5 and 8 of evaluate.py.
     Each of them is optional. Rows are named <Net>-<Row>. --sr is what evaluate.py --save-sr wrote.
     Also, if they exist: equal_per_image.csv of paper/equal.py, seeds_<net>_means.csv of the demo,
     user_study.csv and study/ of paper/user_study.py.
Out: into --results: comparison.csv (ours, paper, difference), claims.csv (does ours order the rows
     as the paper does?), table7.csv, figure2.png to figure8.png, crops.png (crops_<Net>.png for two
     networks), structured_noise.csv, perception_distortion.png, tradeoff.png; a PDF beside each
     PNG. What cannot be made is named, with the reason.

No picture is picked by hand; --images overrides the choice of images.
  Figures 4, 6  five images at evenly spaced quantiles of the gain in quality from UPos to AMO+FT:
                the 2nd and 4th in Figure 4, the others in Figure 6
  Figures 3, 5  three images at quantiles of the naive result's noise less LoRA's: the middle one in
                Figure 3
  Figure 8      the two images with AMO+FT's lowest held-out scores
  crops.png     three images, evenly spaced by name
Crops show the window where the original has most detail, in Figure 8 where AMO+FT has most
structured noise, and in Figures 3 and 5 the window where the original has the smallest mean
gradient, and another where the naive result has most structured noise.
"""

import argparse
from pathlib import Path

from models.checkpoint import read_csv
from models.distributed import clean_exit
from models.flags import new_parser
from paper.claims import write_claims
from paper.draw import save
from paper.noise import write_noise_table
from paper.page import page_picture
from paper.pictures import (
    pairs_figure,
    save_comparison,
    save_gain_figures,
    save_noise_figures,
    save_worst_figure,
)
from paper.plots import plane_figure, tradeoff_figure
from paper.shown import load_scores, load_test
from paper.tables import (
    load_means,
    load_seeds,
    load_tables,
    number,
    numbers,
    write_comparison,
    write_table7,
)


def load_pairs(path: Path, quality: str) -> tuple[list[dict[str, str]], str]:
    """The first four pairs of figure2.csv, if it exists, and the metric of their scores."""
    if not path.is_file():
        return [], quality
    pairs, comments = read_csv(path, ("set", "image1", "image2", "quality1", "quality2"))
    for pair, i in ((pair, i) for pair in pairs[:4] for i in (1, 2)):
        if not Path(pair[f"image{i}"]).is_file() or number(pair[f"quality{i}"]) is None:
            raise ValueError(f"{path}: {pair[f'image{i}']}: no such image, or no quality; run "
                             "analyze_iqa.py again")
    metrics = (line.split()[1] for line in comments if line.startswith("quality: "))
    return pairs[:4], next(metrics, quality)


def main(args: argparse.Namespace) -> None:
    quality, results = args.quality, args.results

    # Inputs: all of them are checked before anything is written
    tables, paper = load_tables(results, args.paper)
    per_image, scored_with = load_scores(args)
    pairs, pairs_metric = load_pairs(results / "figure2.csv", quality)
    test = load_test(args, per_image) if args.sr else None

    # Table 7, and all tables beside the paper's
    if 5 in tables:
        tables[7] = write_table7(results / "table7.csv", tables[5], paper[7])
    write_comparison(results / "comparison.csv", tables, paper)
    write_claims(results, tables, paper)

    # Plots of the tables
    ours = load_means(tables[5][0] if 5 in tables else [], per_image)
    nets = {model.split("-")[0] for model in ours}
    theirs = {row["model"]: numbers(row) for row in (*paper[5], *paper[7])
              if row["model"].split("-")[0] in nets}
    save(plane_figure(ours, theirs), results / "perception_distortion.png",
         "table5.csv has no PSNR with another metric of rows <Net>-<Row>")
    means, spreads, seeds = load_seeds(results)
    means = ours | {model: means[model] for model in ours if model in means}
    save(tradeoff_figure(means, quality, spreads, seeds), results / "tradeoff.png",
         f"table5.csv has no PSNR with {quality} of rows <Net>-<Row>")

    # Pictures
    page_picture(results / "study/rater01.html", results / "figure7.png")
    save(pairs_figure(pairs, pairs_metric), results / "figure2.png", "figure2.csv has no pairs")
    if not test or not test.rows:
        print("figures 3-6 and 8, crops.png, structured_noise.csv: not made, "
              + ("no row has SR images" if test else "no --sr, --gt and --lq"))
        return
    save_gain_figures(test, args)
    save_worst_figure(test, args)
    save_comparison(test, args)
    noise = write_noise_table(test, args, scored_with)
    save_noise_figures(test, args, noise)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--results", required=True, type=Path, metavar="DIR",
        help="folder of the tables; figures go there as well")
    add("--sr", type=Path, metavar="DIR", help="SR images, DIR/<Net>-<Row>/<NAME>.png")
    add("--gt", type=Path, metavar="DIR", help="the test set that they were scored on")
    add("--lq", type=Path, metavar="DIR", help="its low-quality images, NAME.png")
    add("--quality", default="musiq", metavar="COLUMN",
        help="the metric that was optimised, a column of table5.csv (default: %(default)s)")
    add("--held-out", default="topiq", metavar="COLUMN",
        help="one that was not, for Fig. 8's worst cases (default: %(default)s)")
    add("--reference", type=Path, metavar="DIR",
        help="clean images NAME.png to measure structured noise against (default: the originals)")
    add("--paper", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
        help="the paper's table1.csv to table8.csv (default: this script's folder)")
    add("--images", nargs="+", default=[], metavar="NAME",
        help="show these test images, five at most, in place of those chosen by rule")
    args = parser.parse_args(argv)
    if not bool(args.sr) == bool(args.gt) == bool(args.lq):
        parser.error("give --sr, --gt and --lq together, or none of them")
    if (args.images or args.reference) and not args.sr:
        parser.error("--images and --reference need --sr")
    if len(args.images) > 5:
        parser.error("--images: five at most")
    return args


if __name__ == "__main__":
    with clean_exit("figures.py"):
        main(parse_args())
