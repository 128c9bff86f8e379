"""The paper's claims about its experiments, checked on our tables: claims.csv.

A claim is an ordering of rows, in one or more metrics. It holds where every row is better than the
one before it, in our unrounded numbers. The paper's own numbers stand beside ours. Where a metric
of the paper's tables contradicts its text, the claim leaves that metric out and says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.checkpoint import read_csv, write_csv
from paper.report import GOLD, LOWER_BETTER
from paper.tables import Means, number, numbers

LOW, MID, NR = ("psnr", "ssim"), ("lpips", "lpips_st", "dists"), ("musiq", "nima", "qalign",
                                                                  "topiq")
THREE_DIGITS = ("ssim", *MID)  # as the paper prints them; others have two
NETS = ("SwinIR", "RealESRGAN")
Rows = tuple[str | tuple[str, ...], ...]  # from worst to best; several at the start: their best


class Claim(NamedTuple):
    """Rows from worst to best in each of the metrics, of a table."""

    section: str
    text: str
    rows: Rows
    metrics: tuple[str, ...]
    nets: tuple[str, ...] = NETS
    table: int = 5
    change: tuple[float, float] | None = None  # per cent from first to last row, its limits


SAMPLERS = ("OrigsOnly", "Rand", "UPos", "SMA", "SMP", "AMO")
OTHERS = (*SAMPLERS, "UPos+FT_HP", "UPos+FT_IG", "UPos+FT")
CLAIMS = (
    Claim("5.1", "UPos is better than OrigsOnly", ("OrigsOnly", "UPos"), ("lpips", "dists", *NR)),
    Claim("5.1", "Rand helps, but does not reach UPos", ("OrigsOnly", "Rand", "UPos"),
          ("lpips", "dists", *NR)),
    Claim("5.1", "every sampler by Q lowers LPIPS and LPIPS-ST: SMA", ("UPos", "SMA"),
          ("lpips", "lpips_st"), ("RealESRGAN",)),
    Claim("5.1", "every sampler by Q lowers LPIPS and LPIPS-ST: SMP", ("UPos", "SMP"),
          ("lpips", "lpips_st"), ("RealESRGAN",)),
    Claim("5.1", "SMP is marginally above SMA (TOPIQ of SwinIR left out: its table has less)",
          ("SMA", "SMP"), ("musiq", "nima", "qalign")),
    Claim("5.1", "AMO is above both SMA and SMP", (("SMA", "SMP"), "AMO"), NR),
    Claim("5.1", "AMO is better than UPos in perceptual quality", ("UPos", "AMO"),
          ("lpips_st", *NR)),
    Claim("5.1", "fine-tuning UPos raises the NR metrics and improves LPIPS-ST",
          ("UPos", "UPos+FT"), ("lpips_st", *NR)),
    Claim("5.1", "fine-tuning AMO raises the NR metrics", ("AMO", "AMO+FT"), NR),
    Claim("5.1", "fine-tuning UPos lowers PSNR and SSIM", ("UPos+FT", "UPos"), LOW),
    Claim("5.1", "fine-tuning AMO lowers PSNR and SSIM", ("AMO+FT", "AMO"), LOW),
    Claim("5.1", "samplers stay below the gold standard, AMO+FT is above (in MUSIQ)",
          (SAMPLERS, GOLD, "AMO+FT"), ("musiq",)),
    Claim("5.1", "AMO+FT is above UPos in every NR metric", ("UPos", "AMO+FT"), NR),
    Claim("5.1", "AMO+FT is above every other method", (OTHERS, "AMO+FT"), NR, ("SwinIR",)),
    Claim("5.1", "AMO+FT improves LPIPS-ST over UPos by about 6 %", ("UPos", "AMO+FT"),
          ("lpips_st",), ("SwinIR",), change=(-100, -5.5)),
    Claim("5.1", "AMO+FT improves LPIPS-ST over UPos by about 12 %", ("UPos", "AMO+FT"),
          ("lpips_st",), ("RealESRGAN",), change=(-100, -11.5)),
    Claim("5.1", "AMO+FT costs 3 to 4 % in LPIPS and DISTS at most", ("UPos", "AMO+FT"),
          ("lpips", "dists"), ("SwinIR",), change=(-100, 4.5)),
    Claim("5.1", "AMO+FT changes LPIPS and DISTS by about 2 %", ("UPos", "AMO+FT"),
          ("lpips", "dists"), ("RealESRGAN",), change=(-2.5, 2.5)),
    Claim("5.1", "AMO+FT is not above UPos+FT, which has human labels (TOPIQ left out: equal)",
          ("AMO+FT", "UPos+FT"), ("musiq", "nima", "qalign"), ("RealESRGAN",)),
    Claim("5.2", "UPos+FT_HP is better than UPos+FT in every mid-level metric",
          ("UPos+FT", "UPos+FT_HP"), MID),
    Claim("5.2", "UPos+FT_HP is below UPos+FT in every NR metric", ("UPos+FT_HP", "UPos+FT"), NR),
    Claim("5.2, 9", "keeping the GAN loss lowers the NR metrics slightly (Q-Align left out: its "
          "table has more)", ("UPos+FT_IG", "UPos+FT"), ("musiq", "nima", "topiq")),
    Claim("5.2, 9", "a GAN loss alone, x2, is worse than MUSIQ", ("UPos+FT_NNR,IGx2", "UPos+FT"),
          NR),
    Claim("5.2, 9", "a GAN loss alone, x5, is worse than MUSIQ", ("UPos+FT_NNR,IGx5", "UPos+FT"),
          NR),
    Claim("5.2, 9", "PaQ-2-PiQ in place of MUSIQ lowers the NR metrics",
          ("UPos+FT_PaQ2PiQ", "UPos+FT"), NR),
    Claim("9", "PaQ-2-PiQ in place of MUSIQ improves low and mid level",
          ("UPos+FT", "UPos+FT_PaQ2PiQ"), (*LOW, *MID), ("SwinIR",)),
    Claim("11", "RealSR: AMO and AMO+FT are above OrigsOnly and UPos",
          (("OrigsOnly", "UPos"), "AMO", "AMO+FT"), NR, table=8),
    Claim("11", "RealSR: AMO+FT has the lowest PSNR and SSIM",
          ("AMO+FT", "AMO"), LOW, table=8),
    Claim("11", "RealSR: AMO+FT has the best LPIPS-ST", (("OrigsOnly", "UPos", "AMO"), "AMO+FT"),
          ("lpips_st",), table=8),
    Claim("11", "RealSR: AMO+FT has the best LPIPS and DISTS",
          (("OrigsOnly", "UPos", "AMO"), "AMO+FT"), ("lpips", "dists"), ("SwinIR",), table=8),
)
STUDY = (  # Sec. 12: of user_study.csv, (claim, row, limits, the paper's)
    ("AMO+FT is preferred to UPos at more than 2:1, in per cent", "mean", (200 / 3, 100), "69.7"),
    ("the preference is above 50 %: p of a one-sided t-test", "p", (0, 0.01), "< 0.01"),
)


def ordering(values: dict[str, float], rows: Rows, lower: bool = False, digits: int = 2
             ) -> tuple[str, str]:
    """Whether each row is better than the one before it: "held", "not held" or "not run".

    values: {row: value}; lower: less is better. Returns the outcome, and the numbers or, of a claim
    that was not run, which rows are absent.
    """
    names = [name for row in rows for name in ([row] if isinstance(row, str) else row)]
    if absent := [name for name in names if name not in values]:
        return "not run", f"no {', '.join(absent)}"
    best = min if lower else max
    chain = [row if isinstance(row, str) else best(row, key=values.get) for row in rows]
    steps = [(values[b] - values[a]) * (-1 if lower else 1)
             for a, b in zip(chain, chain[1:], strict=False)]
    sign = " > " if lower else " < "
    return ("held" if min(steps) > 0 else "not held",
            sign.join(f"{row} {values[row]:.{digits}f}" for row in chain))


def check(claim: Claim, net: str, metric: str, means: Means) -> tuple[str, str]:
    """`ordering` of a claim, or whether a change lies within its limits."""
    values = {m.removeprefix(f"{net}-"): v[metric] for m, v in means.items()
              if metric in v and (m.startswith(f"{net}-") or m == GOLD)}
    digits = 3 if metric in THREE_DIGITS else 2
    outcome, text = ordering(values, claim.rows, metric in LOWER_BETTER, digits)
    if claim.change is None or outcome == "not run":
        return outcome, text
    first, last = values[claim.rows[0]], values[claim.rows[-1]]
    change, (low, high) = 100 * (last / first - 1), claim.change
    return ("held" if low <= change <= high else "not held",
            f"{claim.rows[0]} {first:.{digits}f}, {claim.rows[-1]} {last:.{digits}f}: "
            f"{change:+.1f} %")


def check_all(ours: dict[int, Means], paper: dict[int, Means]) -> list[tuple[str, ...]]:
    """(section, network, claim, metric, outcome, our numbers, the paper's); {table: means}."""
    return [(claim.section, net, claim.text, metric,
             *check(claim, net, metric, ours.get(claim.table, {})),
             check(claim, net, metric, paper[claim.table])[1])
            for claim in CLAIMS for net in claim.nets for metric in claim.metrics]


def check_study(path: Path) -> list[tuple[str, ...]]:
    """Sec. 12 on the table of `paper.user_study analyze`."""
    rows = read_csv(path, ["rater", "value"])[0] if path.is_file() else []
    values, lines = {row["rater"]: number(row["value"]) for row in rows}, []
    for text, row, (low, high), printed in STUDY:
        value, outcome = values.get(row), "not run"
        if value is not None:
            outcome = "held" if low < value < high else "not held"
        lines.append(("12", "SwinIR", text, row, outcome,
                      f"no {path.name}" if value is None else f"{value:g}", printed))
    return lines


def write_claims(results: Path, tables: dict[int, tuple], paper: dict[int, list[dict]]) -> None:
    """claims.csv, and the same on the screen, if a table has one of the paper's NR metrics."""
    ours = {n: {row["model"]: numbers(row) for row in tables[n][0]} for n in (5, 8) if n in tables}
    if not any(metric in values for means in ours.values() for values in means.values()
               for metric in NR):
        print("claims.csv: not made, no row has one of the paper's NR metrics")
        return
    printed = {n: {row["model"]: numbers(row) for row in paper[n]} for n in (5, 7, 8)}
    printed[5] |= printed.pop(7)
    lines = check_all(ours, printed) + check_study(results / "user_study.csv")
    print("\nThe paper's claims: ours (the paper's)")
    print_claims(lines)
    write_csv(results / "claims.csv",
              ["section", "network", "claim", "metric", "outcome", "ours", "paper"], lines, [
                  "the paper's claims, a line for each metric; a claim holds if all its metrics do",
                  "ours: unrounded numbers are compared, strictly; the paper's as it prints them"])
    print("claims.csv: written")


def print_claims(lines: Sequence[tuple[str, ...]]) -> None:
    """A line for each claim and network: not run, not held or held; then one for each metric."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for line in lines:
        groups.setdefault(line[:3], []).append(line[3:])
    for (section, net, text), metrics in groups.items():
        outcomes = [outcome for _, outcome, *_ in metrics]
        worst = next(o for o in ("not held", "not run", "held") if o in outcomes)
        print(f"  {worst}: Sec. {section}, {net}: {text}")
        for metric, outcome, ours, printed in metrics:
            if outcome != "not run" or worst != "not run":
                print(f"    {metric} {outcome}: {ours} ({printed})")
