"""paper/claims.py: small made-up tables, the paper's own numbers, and what the script writes."""

from pathlib import Path

import pytest

from models.checkpoint import read_csv, write_csv
from paper import claims
from paper.claims import GOLD, NR, Claim, check, check_all, check_study, ordering
from paper.figures import main, parse_args
from paper.tables import numbers

PAPER = Path(__file__).resolve().parent.parent / "paper"


def paper_means():
    tables = {n: {r["model"]: numbers(r) for r in read_csv(PAPER / f"table{n}.csv")[0]}
              for n in (5, 7, 8)}
    tables[5] |= tables.pop(7)
    return tables


def test_an_ordering_is_held_not_held_or_not_run():
    values = {"a": 1.0, "b": 2.0, "c": 2.5}
    assert ordering(values, ("a", "b", "c")) == ("held", "a 1.00 < b 2.00 < c 2.50")
    assert ordering(values, ("a", "c", "b"))[0] == "not held"
    assert ordering(values | {"c": 2.0}, ("b", "c"))[0] == "not held"  # equal is not better
    assert ordering(values, ("a", "x", "y")) == ("not run", "no x, y")
    assert ordering(values, ("c", "b", "a"), lower=True, digits=1) == ("held",
                                                                       "c 2.5 > b 2.0 > a 1.0")
    assert ordering(values, (("a", "b"), "c")) == ("held", "b 2.00 < c 2.50")  # the best of two
    assert ordering(values, (("a", "c"), "b"))[0] == "not held"
    assert ordering(values, (("c", "b"), "a"), lower=True) == ("held", "b 2.00 > a 1.00")
    assert ordering(values, (("a", "x"), "b"))[0] == "not run"


def test_a_change_lies_within_its_limits_or_not():
    claim = Claim("5.1", "falls by 6 %", ("UPos", "AMO"), ("lpips",), change=(-100, -5.5))
    for value, outcome in ((0.188, "held"), (0.19, "not held"), (0.22, "not held")):
        means = {"SwinIR-UPos": {"lpips": 0.2}, "SwinIR-AMO": {"lpips": value}}
        assert check(claim, "SwinIR", "lpips", means)[0] == outcome
    assert check(claim, "SwinIR", "lpips", means)[1] == "UPos 0.200, AMO 0.220: +10.0 %"
    assert check(claim, "RealESRGAN", "lpips", means) == ("not run", "no UPos, AMO")


def test_the_networks_are_not_mixed_and_the_gold_standard_belongs_to_both():
    means = {"SwinIR-AMO": {"musiq": 60}, "RealESRGAN-AMO": {"musiq": 80}, GOLD: {"musiq": 70}}
    claim = Claim("5.1", "below", ("AMO", GOLD), ("musiq",))
    assert [check(claim, net, "musiq", means)[0] for net in claims.NETS] == ["held", "not held"]


def test_the_paper_s_own_numbers_hold_but_for_two_ties_of_its_rounding():
    tables = paper_means()
    lines = check_all(tables, tables)
    assert len(lines) > 150 and {line[4] for line in lines} == {"held", "not held"}
    assert [(line[0], line[1], line[3], line[5]) for line in lines if line[4] != "held"] == [
        ("5.2", "SwinIR", "lpips_st", "UPos+FT 0.123 > UPos+FT_HP 0.123"),
        ("11", "SwinIR", "dists", "AMO 0.190 > AMO+FT 0.190")]
    for name in ("UPos", "AMO+FT"):  # LPIPS-ST's fall, of both networks: "6 %" and "12 %"
        assert f"SwinIR-{name}" in tables[5]
    falls = [line[6].split(": ")[1] for line in lines if "LPIPS-ST over UPos by" in line[2]]
    assert falls == ["-6.2 %", "-12.0 %"]


def test_every_claim_can_fail():
    """Upside down, no claim but those with limits on both sides or below holds."""
    tables = paper_means()
    worse = {n: {m: {c: -v for c, v in values.items()} for m, values in rows.items()}
             for n, rows in tables.items()}
    held = {line[2] for line in check_all(worse, tables) if line[4] == "held"}
    assert all("%" in text for text in held), held


@pytest.mark.parametrize(("mean", "p", "outcomes"), [
    (69.7, 0.001, ["held", "held"]), (66.0, 0.009, ["not held", "held"]),
    (70.0, 0.02, ["held", "not held"])])
def test_the_user_study(tmp_path, mean, p, outcomes):
    path = tmp_path / "user_study.csv"
    assert [line[4] for line in check_study(path)] == ["not run", "not run"]
    write_csv(path, ["rater", "pairs", "for_a", "value"],
              [["rater01", 4, 3, "75.00"], ["mean", "", "", mean], ["p", "", "", p]])
    lines = check_study(path)
    assert [line[4] for line in lines] == outcomes and lines[0][5:] == (f"{mean:g}", "69.7")


def run(folder, rows):
    write_csv(folder / "table5.csv", ["model", "psnr", *NR], rows)
    main(parse_args(["--results", str(folder)]))


def test_a_run_s_claims_are_printed_and_written(tmp_path, capsys):
    run(tmp_path, [["SwinIR-SMA", 22, 66, 5.1, 3.6, 0.6], ["SwinIR-SMP", 22, 67, 5.2, 3.6, 0.6],
                   ["SwinIR-AMO", 22, 68, 5.15, 3.7, 0.7]])
    printed = capsys.readouterr().out
    assert "not held: Sec. 5.1, SwinIR: AMO is above both SMA and SMP" in printed
    assert "    musiq held: SMP 67.00 < AMO 68.00 (SMP 66.83 < AMO 68.08)" in printed
    assert "    nima not held: SMP 5.20 < AMO 5.15 (SMP 5.17 < AMO 5.21)" in printed
    assert "not run: Sec. 5.1, RealESRGAN: AMO is above both SMA and SMP" in printed
    assert "not run: Sec. 12, SwinIR: AMO+FT is preferred to UPos" in printed
    rows, _ = read_csv(tmp_path / "claims.csv")
    found = {(r["network"], r["claim"], r["metric"]): r for r in rows}
    text = "AMO is above both SMA and SMP"
    assert found["SwinIR", text, "topiq"]["outcome"] == "held"
    row = found["RealESRGAN", text, "musiq"]
    assert row["section"] == "5.1" and row["outcome"] == "not run"
    assert (row["ours"], row["paper"]) == ("no SMA, SMP, AMO", "SMP 66.66 < AMO 67.86")


def test_a_run_without_the_paper_s_metrics_has_no_claims(tmp_path, capsys):
    run(tmp_path, [["SwinIR-AMO", 22, "", "", "", ""]])
    assert "claims.csv: not made, no row has one of the paper's NR" in capsys.readouterr().out
    assert not (tmp_path / "claims.csv").exists()
