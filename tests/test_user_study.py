"""paper/user_study.py: the design, the page driven in Chromium, the analysis, the refused files."""

import base64
import csv
import io
import json
import re
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest
from make_data import smooth_image
from PIL import Image, PngImagePlugin
from scripts import run_script

from demo import report
from paper import user_study

NAMES = ("Model-Alpha+FT", "Model-Beta")
# Votes for model A out of 25: mean 69.67 %, median 68 %, standard error 4.81 %, as the paper rounds
PAPER_COUNTS = [11, 13, 14, 14, 16, 17, 17, 18, 21, 21, 22, 25]


def run(command: str):
    args = user_study.parse_args(command.split())
    args.main(args)


def cli(*arguments) -> subprocess.CompletedProcess:
    return run_script("paper.user_study", *arguments)


def make_folders(root: Path, n: int, size: tuple[int, int] = (24, 32)) -> str:
    """--a and --b of a study on n images; the files' metadata name their model."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        (root / name).mkdir(parents=True)
        note = PngImagePlugin.PngInfo()
        note.add_text("Comment", name)
        for i in range(n):
            Image.fromarray(smooth_image(rng, *size)).save(
                root / name / f"bridge-in-fog-{i:03d}.png", pnginfo=note)
    return f"make --a {NAMES[0]}={root / NAMES[0]} --b {NAMES[1]}={root / NAMES[1]}"


def write_vote_file(path: Path, key: dict, of: str, for_a: int, **changes) -> Path:
    """A finished votes file with `for_a` votes for model A; changes: values to put in its place."""
    plan, votes = key["plan"][of], []
    for k, pair in enumerate(plan["pairs"]):
        wanted = "a" if k < for_a else "b"
        choice = "left" if pair["left"] == wanted else "right"
        votes.append({"id": pair["id"], "choice": choice, "ms": 1000 + k, "zoom": 100})
    votes = changes.pop("votes", lambda v: v)(votes)
    data = {"study": key["study"], "rater": of, "finished": True, "votes": votes} | changes
    if "checksum" not in data:
        data["checksum"] = user_study.checksum(key["study"], of, plan["token"], votes,
                                               data.get("screen"))
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The paper's design on 100 tiny images: (folder, key)."""
    root = tmp_path_factory.mktemp("study")
    run(f"{make_folders(root, 100, (8, 8))} --out {root / 'study'}")
    return root / "study", json.loads((root / "study" / "key.json").read_text())


# ------------------------------------------------------------------------- the design


@pytest.mark.parametrize(("raters", "pairs", "n", "views"), [(12, 25, 100, 3), (12, 4, 16, 3),
                                                             (4, 3, 4, 3), (2, 5, 5, 2)])
def test_every_image_is_seen_equally_often_and_by_no_rater_twice(raters, pairs, n, views):
    images, a_left = user_study.assign(n, raters, pairs, seed=0)
    assert images.shape == a_left.shape == (raters, pairs)
    assert np.bincount(images.ravel(), minlength=n).tolist() == [views] * n
    assert all(len(set(row)) == pairs for row in images.tolist())
    assert set(a_left.sum(1)) <= {pairs // 2, (pairs + 1) // 2}  # of each rater's pairs
    again = user_study.assign(n, raters, pairs, seed=0)
    assert (images == again[0]).all() and (a_left == again[1]).all()


def test_groups_order_and_sides_are_random():
    images, a_left = user_study.assign(100, 12, 25, seed=0)
    other = user_study.assign(100, 12, 25, seed=1)
    assert (images != other[0]).any() and (a_left != other[1]).any()
    groups = {tuple(sorted(row)) for row in images.tolist()}
    assert len(groups) == 12  # not the same four groups three times
    assert 0.35 < (np.diff(images) > 0).mean() < 0.65  # not sorted
    assert 0.35 < a_left[:, 0].mean() < 0.9 and len({tuple(r) for r in a_left.tolist()}) == 12


def test_the_key_says_what_the_pages_show(study):
    folder, key = study
    assert len(list(folder.iterdir())) == 13
    for rater in ("rater01", "rater12"):
        html = (folder / f"{rater}.html").read_text()
        data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
        plan = key["plan"][rater]
        assert data["token"] == plan["token"] and len(data["pairs"]) == 1 + 25
        assert plan["practice"]["image"] not in [pair["image"] for pair in plan["pairs"]]
        for shown, pair in zip(data["pairs"], [plan["practice"], *plan["pairs"]], strict=True):
            files = [folder.parent / name / pair["image"] for name in NAMES]
            a, b = (np.asarray(Image.open(file)) for file in files)
            sides = (a, b) if pair["left"] == "a" else (b, a)
            for side, expected in zip(("left", "right"), sides, strict=True):
                png = base64.b64decode(shown[side])
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)
                assert b"Comment" in files[0].read_bytes() and b"Comment" not in png
        # nothing else that tells the models, and nothing that reaches out
        text = re.sub(r"[A-Za-z0-9+/]{60,}=*", "", html)
        assert len(text) < 20_000
        assert not re.search("alpha|beta|bridge|fog|https?:|//[a-z]|@import", text, re.I)


def test_practice_pairs_differ_and_raters_of_all_images_practise_on_their_last(study):
    plans = study[1]["plan"].values()
    assert len({plan["practice"]["image"] for plan in plans}) > 6
    assert [plan["practice"]["left"] for plan in plans].count("a") == 6
    args = user_study.parse_args(["make", "--a", "A=x", "--b", "B=y", "--raters", "2", "--pairs",
                                  "3", "--out", "z"])
    plan = user_study.make_key(args, ["1.png", "2.png", "3.png"], "0" * 64)["plan"]
    assert all(p["practice"]["image"] == p["pairs"][-1]["image"] for p in plan.values())


# ------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    run(f"{make_folders(root, 6)} --raters 2 --pairs 6 --out {root / 'study'}")
    return root / "study", json.loads((root / "study" / "key.json").read_text())


def open_page(browser, file: Path, number: int = 6, **options):
    """The page after the practice, and a list of what went wrong or out to the network since."""
    context, trouble = browser.new_context(**options), []
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda r: r.url.split(":")[0] in ("file", "data", "blob")
            or trouble.append(r.url))
    page.goto(file.as_uri())
    practise(page)
    wait_for(page, 1, number)
    return page, trouble


def practise(page):
    """Vote "right" on the practice pair."""
    page.wait_for_function("() => shownAt !== null && performance.now() - shownAt > 310")
    assert page.locator("#count").text_content() == "practice"
    assert page.get_by_text("Practice, this pair does not count.").is_visible()
    assert page.locator("#bar").evaluate("b => b.value") == 0
    page.keyboard.press("2")


def wait_for(page, number: int, of: int = 6):
    """Until pair `number` can be voted on; the page ignores the first 300 ms of a pair."""
    page.wait_for_function(f"() => at === {number} && shownAt !== null"
                           " && performance.now() - shownAt > 310")
    assert page.locator("#count").text_content() == f"pair {number} of {of}"
    assert not page.locator("#practice").is_visible()


def slider(page) -> float:
    """Percent of the picture that shows the left image: by the clipping, the line and the knob."""
    clip = page.evaluate("getComputedStyle($('left')).clipPath")
    line, box = page.locator("#line").bounding_box(), page.locator("#picture").bounding_box()
    percent = 100 * (line["x"] + 1 - box["x"]) / box["width"]
    shown = float(re.fullmatch(r"inset\(0px calc\((\S+)%( \+ 0px)?\) 0px 0px\)|"
                               r"inset\(0px (\S+)% 0px 0px\)", clip).group(3) or 0)
    assert percent == pytest.approx(100 - shown, abs=1)
    assert float(page.locator("#knob").get_attribute("aria-valuenow")) == pytest.approx(percent,
                                                                                        abs=1)
    return percent


def test_votes_cast_by_mouse_keyboard_and_touch_are_analysed(browser, small_study, tmp_path):
    folder, key = small_study
    page, trouble = open_page(browser, folder / "rater01.html", accept_downloads=True,
                              viewport={"width": 1280, "height": 800})

    # Mouse: drag the line, click the buttons
    assert slider(page) == pytest.approx(50, abs=1)
    box = page.locator("#picture").bounding_box()
    assert (box["width"], box["height"]) == (32 * 20, 24 * 20)  # whole pixels up to 640
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 100, steps=3)
    assert slider(page) == pytest.approx(25, abs=1)
    page.mouse.up()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 100)
    assert slider(page) == pytest.approx(25, abs=1)  # let go
    page.get_by_text("Left looks better").click()
    wait_for(page, 2)
    assert slider(page) == pytest.approx(50, abs=1)  # starts anew in the middle
    page.evaluate("""async () => {  // a double click is one vote
        buttons[1].click();
        while (shownAt === null) await new Promise(requestAnimationFrame);
        buttons[1].click(); }""")
    wait_for(page, 3)

    # Keyboard
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert slider(page) == pytest.approx(60, abs=1)
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert slider(page) == pytest.approx(48, abs=1)
    page.keyboard.press("1")
    wait_for(page, 4)

    # A reload keeps the votes; Back shows the old vote and takes another
    page.reload()
    wait_for(page, 4)
    assert page.locator("#bar").evaluate("b => b.value / b.max") == 0.5
    page.get_by_text("Back").click()
    wait_for(page, 3)
    assert page.locator("[aria-pressed=true]").get_attribute("data-choice") == "left"
    page.keyboard.press("2")
    for number in (4, 5, 6):
        wait_for(page, number)
        page.keyboard.press("2")

    # The end: download, also as text
    with page.expect_download() as download:
        page.get_by_text("Download my votes").click()
    file = tmp_path / download.value.suggested_filename
    assert file.name == f"votes_{key['study']}_rater01.json"
    download.value.save_as(file)
    assert page.locator("#text").input_value() == file.read_text()
    data = json.loads(file.read_text())
    assert data["screen"] == {"width": 1280, "height": 800, "ratio": 1,
                              "surround": "rgb(128, 128, 128)"}
    votes, choices = data["votes"], ["left", "right", "right", "right", "right", "right"]
    assert votes[0]["id"] == "rater01-practice"
    assert [v["choice"] for v in votes] == ["right", *choices]
    assert all(v["ms"] >= 300 and v["zoom"] == 2000 for v in votes)
    assert not trouble
    page.context.close()

    # Touch, on a phone: flick the line, tap the buttons
    page, trouble = open_page(browser, folder / "rater02.html", has_touch=True, is_mobile=True,
                              viewport={"width": 390, "height": 844}, device_scale_factor=3)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = page.locator("#picture").bounding_box()
    touch = page.context.new_cdp_session(page)
    for kind, at in (("touchStart", 0.5), ("touchMove", 0.6), ("touchMove", 0.8), ("touchEnd", 0)):
        point = {"x": box["x"] + at * box["width"], "y": box["y"] + 50}
        touch.send("Input.dispatchTouchEvent",
                   {"type": kind, "touchPoints": [point] if at else []})
    assert slider(page) == pytest.approx(80, abs=1)
    assert not page.locator(".keys:visible").count()
    for number in range(1, 7):
        wait_for(page, number)
        page.get_by_text("Left looks better").tap()
    other = tmp_path / "sent as text.json"
    page.locator("#end").wait_for()
    other.write_text(page.locator("#text").input_value())
    assert not trouble
    page.context.close()

    # The analysis maps sides to models by the key
    result = cli("analyze", file, other, "--key", folder / "key.json", "--out", tmp_path / "t.csv")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert ("# screens, device pixels per CSS pixel, surround (raters): 1280x800 at 1, "
            "rgb(128, 128, 128) (1); 390x844 at 3, rgb(128, 128, 128) (1)") in lines
    assert "2 of 2 raters, 12 votes" in lines[0]  # without the practice
    rows = list(csv.reader(x for x in lines if x[0] != "#"))
    for rater, voted, row in zip(("rater01", "rater02"), (choices, ["left"] * 6), rows[1:3],
                                 strict=True):
        left = [pair["left"] for pair in key["plan"][rater]["pairs"]]
        models = [x if c == "left" else {"a": "b", "b": "a"}[x]
                  for c, x in zip(voted, left, strict=True)]
        for_a = models.count("a")
        assert row == [rater, "6", str(for_a), f"{100 * for_a / 6:.2f}"]
    assert rows[2][2] == "3"  # always left: half of the pairs


def test_the_surround_is_the_same_gray_in_dark_mode_and_in_light(browser, small_study):
    for scheme in ("light", "dark"):
        page, _ = open_page(browser, small_study[0] / "rater01.html", color_scheme=scheme)
        colors = page.evaluate("[document.body, $('back')].map(e => getComputedStyle(e))"
                               ".map(s => s.backgroundColor + s.color)")
        assert colors == ["rgb(128, 128, 128)rgb(0, 0, 0)", "rgb(208, 208, 208)rgb(0, 0, 0)"]
        page.context.close()


def test_the_page_forbids_network_and_says_when_nothing_is_kept(browser, small_study):
    folder, _ = small_study
    page, trouble = open_page(browser, folder / "rater01.html")
    assert not page.locator("#unsaved").is_visible() and not page.locator("#broken").is_visible()
    refused = page.evaluate("""() => new Promise(done => {
        document.addEventListener("securitypolicyviolation", e => done(e.effectiveDirective));
        setTimeout(done, 3000, "nothing refused");
        fetch("https://example.org/").catch(() => 0); })""")
    assert refused == "connect-src" and not trouble
    page.context.close()

    context = browser.new_context()
    context.add_init_script("Object.defineProperty(window, 'localStorage',"
                            " { get() { throw new DOMException('no') } })")
    page = context.new_page()
    page.goto((folder / "rater01.html").as_uri())
    practise(page)
    wait_for(page, 1)
    assert page.locator("#unsaved").is_visible()
    page.keyboard.press("1")
    wait_for(page, 2)
    context.close()


def test_a_truncated_page_says_so(browser, small_study, tmp_path):
    html = (small_study[0] / "rater01.html").read_text()
    (tmp_path / "cut.html").write_text(html[: html.index('id="data"') + 500])
    page = browser.new_page()
    page.goto((tmp_path / "cut.html").as_uri())
    assert page.locator("#broken").is_visible() and not page.locator("#study").is_visible()
    page.close()


# ------------------------------------------------------------------------- the analysis


def test_summary_equals_values_by_hand():
    s = user_study.summarise(np.array([40.0, 60.0, 80.0, 80.0]))
    # squared deviations from 65: 625 + 25 + 225 + 225 = 1100; SE = sqrt(1100 / 3 / 4) = 9.574271
    assert (s["mean"], s["median"]) == (65, 70)
    assert s["standard_error"] == pytest.approx(9.574271, abs=1e-6)
    assert s["normal_low"] == pytest.approx(65 - 1.96 * 9.574271, abs=1e-5)
    assert s["normal_high"] == pytest.approx(65 + 1.96 * 9.574271, abs=1e-5)
    # Student's t, 3 degrees: 97.5 % point 3.182446 (tables: 3.182)
    assert s["t_low"] == pytest.approx(65 - 3.182446 * 9.574271, abs=1e-4)
    assert s["t_high"] == pytest.approx(65 + 3.182446 * 9.574271, abs=1e-4)
    # with 3 degrees, P(T > t) = 1/2 - (atan(u) + u / (1 + u^2)) / pi with u = t / sqrt(3)
    u = s["t"] / 3**0.5
    assert s["t"] == pytest.approx(15 / 9.574271, abs=1e-5)
    assert s["p"] == pytest.approx(0.5 - (np.arctan(u) + u / (1 + u * u)) / np.pi, abs=1e-9)
    assert user_study.summarise(np.array([40.0, 20.0, 30.0]))["p"] > 0.9  # one-sided


def test_paper_numbers(study, tmp_path):
    folder, key = study
    files = [write_vote_file(tmp_path / f"{rater}.json", key, rater, n)
             for rater, n in zip(key["plan"], PAPER_COUNTS, strict=True)]
    result = cli("analyze", *files, "--key", folder / "key.json", "--out", tmp_path / "out.csv")
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "\nmean 69.7 %, median 68.0 %, standard error 4.8 %\n" in result.stdout
    assert "\n95 % interval, normal: [60.2, 79.1]; Student's t: [59.1, 80.3]\n" in result.stdout
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert NAMES[0] in lines[0] and "12 of 12 raters, 300 votes" in lines[0]
    assert "(raters): not recorded (12)" in lines[3]
    assert f"sha256 {key['pixels_sha256'][:12]}" in lines[4] and "scipy 1." in lines[5]
    rows = {r[0]: r[1:] for r in csv.reader(x for x in lines if x[0] != "#")}
    assert rows["rater01"] == ["25", "11", "44.00"] and rows["mean"][2] == "69.67"
    assert rows["normal_low"][2] == "60.24" and rows["normal_high"][2] == "79.10"
    assert 0 < float(rows["p"][2]) < 0.01


SCREEN = {"width": 1280, "height": 800, "ratio": 1.5, "surround": "rgb(128, 128, 128)"}


def test_files_of_earlier_versions_are_read_and_practice_does_not_count(study, tmp_path, capsys):
    folder, key = study
    command = f"--key {folder / 'key.json'} --out {tmp_path / 'out.csv'}"
    old = write_vote_file(tmp_path / "1.json", key, "rater01", 20)
    new = write_vote_file(
        tmp_path / "2.json", key, "rater02", 10, screen=SCREEN,
        votes=lambda v: [v[0] | {"id": "rater02-practice"}, *v])
    run(f"analyze {old} {new} {command}")
    captured = capsys.readouterr()
    assert "2 of 12 raters, 50 votes" in captured.out
    assert "rater01   20 of 25" in captured.out and "rater02   10 of 25" in captured.out
    assert "(raters): not recorded (1); 1280x800 at 1.5, rgb(128, 128, 128) (1)" in (
        tmp_path / "out.csv").read_text()
    before = json.loads(json.dumps(key))  # a key of earlier versions
    for plan in before["plan"].values():
        del plan["practice"]
    (tmp_path / "key.json").write_text(json.dumps(before))
    run(f"analyze {old} --key {tmp_path / 'key.json'} --out {tmp_path / 'out.csv'}")
    with pytest.raises(ValueError, match="rater02-practice is not one of"):
        run(f"analyze {new} --key {tmp_path / 'key.json'} --out {tmp_path / 'out.csv'}")


def test_a_key_that_is_no_file_gives_one_line(study, tmp_path):
    vote = write_vote_file(tmp_path / "1.json", study[1], "rater01", 10)
    for key in (tmp_path / "none.json", tmp_path):
        result = cli("analyze", vote, "--key", key, "--out", tmp_path / "out.csv")
        assert result.returncode == 2 and result.stderr == (
            f"user_study.py: {key}: no such file; give the key.json that make wrote (--key)\n")


def test_one_rater_and_raters_of_one_mind(study, tmp_path, capsys):
    folder, key = study
    one = write_vote_file(tmp_path / "1.json", key, "rater01", 20)
    two = write_vote_file(tmp_path / "2.json", key, "rater02", 20)
    command = f"--key {folder / 'key.json'} --out {tmp_path / 'out.csv'}"
    run(f"analyze {one} {command}")
    captured = capsys.readouterr()
    assert "mean 80.0 %, median 80.0 %, standard error undefined for one rater" in captured.out
    assert captured.out.count("undefined") == 4 and "nan" not in captured.out
    assert "1 of 12 raters; missing rater02, rater03" in captured.err
    assert "\nstandard_error,,,\n" in (tmp_path / "out.csv").read_text()
    run(f"analyze {one} {two} {command}")
    assert "t-test: undefined, all raters have one preference" in capsys.readouterr().out


def test_bad_vote_files_are_refused_by_name(study, tmp_path):
    folder, key = study

    def bad(name, of="rater01", **changes):
        return write_vote_file(tmp_path / f"{name}.json", key, of, 10, **changes)

    def flip(votes):
        other = {"left": "right", "right": "left"}
        return [votes[0] | {"choice": other[votes[0]["choice"]]}, *votes[1:]]

    good, again, wider = bad("good"), bad("again"), bad("wider", "rater06", screen=SCREEN)
    wider.write_text(wider.read_text().replace("1280", "1920"))
    checksum = json.loads(good.read_text())["checksum"]
    expected = {
        again: f"rater01 again, as in {good}",
        bad("foreign", study="00000000"): "of study 00000000",
        bad("stranger", "rater02", rater="rater13"): "rater rater13 is not one of",
        bad("short", "rater03", votes=lambda v: v[:23]): "unfinished, 23 of 25",
        bad("open", "rater03", finished=False): "unfinished, 25 of 25",
        bad("pair", "rater04", votes=lambda v: [v[0] | {"id": "rater05-01"}, *v[1:]]):
            "pair rater05-01 is not one of rater04's",
        bad("edited", votes=flip, checksum=checksum): "wrong checksum",
        bad("twice", "rater05", votes=lambda v: [*v, v[0]]): "votes twice",
        bad("empty", "rater06", votes=lambda v: [{"id": x["id"]} for x in v], checksum=""):
            "malformed votes",
        wider: "wrong checksum",
        bad("screen", "rater06", screen=SCREEN | {"surround": "red"}): "malformed votes",
    }  # fmt: skip
    cut, text, listed = (tmp_path / f"{n}.json" for n in ("cut", "text", "list"))
    cut.write_text(good.read_text()[:-40])
    text.write_bytes(b"\xff\xfe\x00 not JSON")
    listed.write_text("[1]")
    expected |= {cut: "not JSON, or truncated", text: "not JSON, or truncated",
                 listed: "holds a list", tmp_path / "absent.json":
                     "no such file; give the JSON files that the raters sent"}
    result = cli("analyze", good, *expected, "--key", folder / "key.json", "--out",
                 tmp_path / "out.csv")
    assert result.returncode == 2 and not (tmp_path / "out.csv").exists()
    lines = result.stderr.splitlines()
    assert len(lines) == len(expected), result.stderr
    for line, (file, reason) in zip(lines, expected.items(), strict=True):
        assert line.startswith("user_study.py: ") and str(file) in line and reason in line, line
    with pytest.raises(ValueError, match="good.json: not the key.json"):
        run(f"analyze {good} --key {good} --out {tmp_path / 'out.csv'}")


@pytest.mark.parametrize("damage", [
    lambda key: key.pop("plan"), lambda key: key.update(plan=["rater01"]),
    lambda key: key["plan"].update({"../../evil": key["plan"].pop("rater01")}),
    lambda key: key["plan"].update(rater01=None), lambda key: key["plan"]["rater01"].pop("token"),
    lambda key: key["plan"]["rater01"]["pairs"].append("rater01-26"),
    lambda key: key["plan"]["rater01"]["pairs"][0].update(image="../../evil.png"),
    lambda key: key["plan"]["rater01"]["pairs"][0].update(left="c"),
    lambda key: key["plan"]["rater01"].update(practice=None),
    lambda key: key.update(study="../../evil"), lambda key: key.update(a="../evil"),
    lambda key: key.update(b="two\nlines"), lambda key: key.update(raters="12"),
])  # fmt: skip
def test_a_damaged_key_gives_one_line_and_writes_nothing(study, tmp_path, damage):
    folder, key = study
    vote = write_vote_file(tmp_path / "1.json", key, "rater02", 10)
    other = json.loads(json.dumps(key))
    damage(other)
    (tmp_path / "study").mkdir()
    file = tmp_path / "study/key.json"
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError) as error:
        run(f"analyze {vote} --key {file} --out {tmp_path / 'out.csv'}")
    assert str(error.value) == f"{file}: not the key.json of a study, or damaged (--key)"
    with pytest.raises(ValueError, match="or damaged"):
        report.simulate_votes(tmp_path / "study", tmp_path, tmp_path, tmp_path / "votes")
    assert {p.name for p in tmp_path.iterdir()} == {"1.json", "study"}


def test_a_votes_file_names_no_path(study, tmp_path):
    folder, key = study
    bad = write_vote_file(tmp_path / "1.json", key, "rater01", 10, rater="../../evil")
    with pytest.raises(ValueError, match="is not one of this study's"):
        run(f"analyze {bad} --key {folder / 'key.json'} --out {tmp_path / 'out.csv'}")
    assert [p.name for p in tmp_path.iterdir()] == ["1.json"]


def make_hostile_study(root: Path) -> Path:
    """Of a model called <script>alert(1)</script>, as far as a name may be so, and such images."""
    rng = np.random.default_rng(0)
    name = 'a"><img src=x onerror=alert(1)>.png'
    flags = []
    for flag, model in (("--a", "<script>alert(1)<script>"), ("--b", "B&quot;</")):
        folder = root / flag
        folder.mkdir(parents=True)
        Image.fromarray(smooth_image(rng, 24, 32)).save(folder / name)
        flags += [flag, f"{model.replace('/', '')}={folder}"]
    args = user_study.parse_args(["make", *flags, "--raters", "1", "--pairs", "1", "--out",
                                  str(root / "study")])
    args.main(args)
    return root / "study"


def test_hostile_names_reach_no_page(tmp_path):
    folder = make_hostile_study(tmp_path)
    key = json.loads((folder / "key.json").read_text())
    assert key["a"] == "<script>alert(1)<script>" and "onerror" in key["images"][0]
    html = (folder / "rater01.html").read_text()
    assert html.count("<script") == 2 and html.count("</script") == 2  # the data and the program
    assert "alert(1)" not in html and "onerror" not in html and "<img src" not in html
    for model in ("..", "a/b", "a\nb"):
        with pytest.raises(SystemExit):
            user_study.parse_args(["make", "--a", f"{model}=x", "--b", "B=y", "--out", "z"])


def test_hostile_names_do_nothing_in_the_browser(browser, tmp_path):
    page, trouble = open_page(browser, make_hostile_study(tmp_path) / "rater01.html", number=1)
    page.on("dialog", lambda dialog: trouble.append(dialog.message))
    page.keyboard.press("1")
    page.locator("#end").wait_for()
    assert page.locator("img").count() == 2 and page.locator("script").count() == 2
    assert not trouble
    page.context.close()


# ------------------------------------------------------------------------- inputs of make


def remove(file: Path):
    file.unlink()


def resize(file: Path):
    Image.new("RGB", (16, 24)).save(file)


def cut(file: Path):
    data = file.read_bytes()
    file.write_bytes(data[:60] + b"\0" * 40 + data[100:])


def gray(file: Path):
    Image.new("L", (32, 24)).save(file)


@pytest.mark.parametrize(("spoil", "message"), [
    (remove, r"Model-Beta/bridge-in-fog-002.png: missing, but the other folder has it"),
    (resize, r"Model-Beta/bridge-in-fog-002.png: 16x24, but .*Alpha.*002.png is 32x24"),
    (cut, r"Model-Beta/bridge-in-fog-002.png: (unreadable|not a PNG)"),
    (gray, r"Model-Beta/bridge-in-fog-002.png: 8-bit gr[ae]y PNG"),
])  # fmt: skip
def test_bad_images_are_refused_by_name(tmp_path, spoil, message):
    command = make_folders(tmp_path, 4)
    spoil(tmp_path / NAMES[1] / "bridge-in-fog-002.png")
    with pytest.raises(ValueError, match=message) as error:
        run(f"{command} --raters 2 --pairs 2 --out {tmp_path / 'study'}")
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "study").exists()


def test_bad_settings_are_refused_and_studies_kept(tmp_path, capsys):
    command, out = make_folders(tmp_path, 4), tmp_path / "study"
    (tmp_path / "empty").mkdir()
    same = command.replace(f"{NAMES[1]}={tmp_path / NAMES[1]}", f"{NAMES[1]}={tmp_path / NAMES[0]}")
    for bad, message in [
        (f"{command} --raters 3 --pairs 5", "--pairs 5: there are only 4 images"),
        (f"{command} --raters 3 --pairs 2", "equally often; give a multiple of 4"),
        (f"{same} --pairs 4", "the same images as in"),
        (f"make --a x={tmp_path / NAMES[0]} --b y={tmp_path / 'empty'}", "empty: no PNG files"),
        (f"make --a x={tmp_path} --b x={tmp_path}", "different names"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(f"{bad} --out {out}")
    assert not out.exists()
    run(f"{command} --raters 2 --pairs 2 --out {out}")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    run(f"{command} --raters 2 --pairs 2 --out {out}")
    assert "already holds this study" in capsys.readouterr().out
    result = cli(*command.split(), "--raters", 2, "--pairs", 2, "--seed", 1, "--out", out)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"{out}: exists with other content" in result.stderr
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    run(f"{command} --raters 2 --pairs 2 --out {tmp_path / 'again'}")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_votes_of_other_systems_are_read_and_escapes_are_shown(study, tmp_path):
    folder, key = study
    vote = write_vote_file(tmp_path / "1.json", key, "rater01", 10)
    text, key_text = Path(vote).read_text(), (folder / "key.json").read_text()
    (tmp_path / "key.json").write_bytes(key_text.replace("\n", "\r\n").encode("utf-8-sig"))
    for encoding in ("utf-8-sig", "utf-16"):
        Path(vote).write_bytes(text.replace(", ", ",\r\n").encode(encoding))
        run(f"analyze {vote} --key {tmp_path / 'key.json'} --out {tmp_path / 'out.csv'}")
    bad = write_vote_file(tmp_path / "2.json", key, "rater02", 10, rater="\x1b[31mred\x07")
    result = cli("analyze", bad, "--key", folder / "key.json", "--out", tmp_path / "out.csv")
    assert result.returncode == 2 and "\x1b" not in result.stderr and "\x07" not in result.stderr
    assert "rater \\x1b[31mred\\x07 is not one of this study's" in result.stderr


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    """A file size limit stands for it."""
    command, out = make_folders(tmp_path, 4), tmp_path / "study"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^{out}: File too large"):
            run(f"{command} --raters 2 --pairs 2 --out {out}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not out.exists() and not list(tmp_path.glob(".*"))
