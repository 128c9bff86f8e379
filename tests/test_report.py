"""paper/report.py: the file without a browser, the page driven in Chromium, each bad input."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_data import make_hggt, smooth_image
from PIL import Image

from models.checkpoint import write_csv
from paper import page as paper_page
from paper import report

ROOT = Path(__file__).resolve().parent.parent
EVIL = "<script>window.hurt=1<!--"  # a model's name: one that would end or begin a script
MODELS = ("SwinIR-UPos", EVIL, "SwinIR-AMO")
NAMES = ("img00", "img01", "img02", "img03")
# Four images' scores: q ranks 4 3 2 1; lpips, lower better, ranks 1 2 4 3: apart 3 1 2 2
Q, LPIPS = ("10", "20", "30", "40"), ("0.1", "0.2", "0.4", "0.3")


def make_run(root: Path) -> list[str]:
    """A run of three models on four images, two of the models equal; the command's arguments."""
    gt, lq, results = root / "gt", root / "lq", root / "results" / "demo"
    make_hggt(gt, n=4, size=64, test=True)
    lq.mkdir()
    rng = np.random.default_rng(1)
    for model in MODELS:
        (root / "sr" / model).mkdir(parents=True)
    for name in NAMES:
        original = Image.open(gt / "images" / "original" / f"{name}.png")
        original.resize((16, 16)).save(lq / f"{name}.png")
        image = Image.fromarray(smooth_image(rng, 64, 64))
        for model in MODELS[:2]:
            image.save(root / "sr" / model / f"{name}.png")
        Image.fromarray(smooth_image(rng, 64, 64)).save(root / "sr" / MODELS[2] / f"{name}.png")
    per_image = [("Gold Standard", name, "", "", "50") for name in NAMES]
    for model in MODELS:
        per_image += [(model, *cells, "inf" if model == EVIL else "7")
                      for cells in zip(NAMES, Q, LPIPS, strict=True)]
    columns = ["model", "image", "q", "lpips", "musiq"]
    write_csv(results / "table5_per_image.csv", columns, per_image)
    rows = [("SwinIR-UPos", "SwinIR-UPos*", "no", "27.3094", ""),
            ("SwinIR-AMO", "SwinIR-AMO", "", "27.1", ""),  # not known
            (EVIL, EVIL, "yes", "<b>1</b>", "&amp;")]
    write_csv(results / "table5.csv", ["model", "label", "no_human_labels", "psnr", "q"], rows,
              ["16 images of <i>mine</i>", "@DATA@ is a note"])
    write_csv(results / "seeds_swinir.csv", ["ordering", "held"], [("Q rises", "5 of 5")])
    Image.new("RGBA", (30, 20), "red").save(results / "figure3.png")
    return ["--results", str(results), "--sr", str(root / "sr"), "--gt", str(gt), "--lq", str(lq)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(root, arguments, page) of a run whose report is made."""
    root = tmp_path_factory.mktemp("report")
    arguments = make_run(root)
    report.main(report.parse_args(arguments))
    return root, arguments, root / "results/demo/report.html"


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


# ------------------------------------------------------------------------- the file


def test_every_source_is_stored_exactly_and_once(run):
    root, _, page = run
    data = data_of(page)
    members = ["original", "01", "02", "03", "04"]
    assert data["sources"] == [*MODELS, *(f"GT {m}" for m in members), "LQ, nearest", "LQ, bicubic"]
    assert [image["name"] for image in data["images"]] == list(NAMES)
    for image in data["images"]:
        name, stored = image["name"], [data["files"][i] for i in image["files"]]
        paths = [root / "sr" / model / f"{name}.png" for model in MODELS]
        paths += [root / f"gt/images/{m}/{name}{'_' + m if k else ''}.png"
                  for k, m in enumerate(members)]
        lq = Image.open(root / f"lq/{name}.png")
        expected = [*(Image.open(p) for p in paths), lq,
                    lq.resize((64, 64), Image.Resampling.BICUBIC)]
        for url, image_of in zip(stored, expected, strict=True):
            np.testing.assert_array_equal(pixels(url), np.asarray(image_of))
    assert len(data["files"]) == 4 * (3 + 5 + 2 - 1)  # two models have equal images
    assert data["images"][0]["labels"] == ["", "", "", "", "positive", "similar", "negative",
                                           "positive"]


def test_the_file_needs_nothing_else_and_escapes_what_it_is_given(run):
    html = run[2].read_text()
    text = re.sub(r"[A-Za-z0-9+/]{60,}=*", "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|@[A-Z]+@(?! is a note)", text)

    assert html.count("<script") == 2 and "<b>" not in html and "<i>" not in html
    assert "&lt;b&gt;1&lt;/b&gt;" in html and "&amp;amp;" in html and "@DATA@ is a note" in html
    assert "&lt;i&gt;mine&lt;/i&gt;" in html


def test_the_papers_numbers_stand_beside_ours_and_its_rows_below(run):
    html = run[2].read_text()
    assert ("<tr><th>SwinIR-UPos</th><td class=text>SwinIR-UPos*</td><td class=text>no</td>"
            "<td>27.3094 <small>22.30</small></td>") in html
    assert ("<tr><th>SwinIR-AMO</th><td class=text>SwinIR-AMO</td><td class=text></td>"
            "<td>27.1 <small>22.08</small></td>") in html  # the paper's "yes" is not of this run
    below = html.index('<tr class="further"><th>&lt;script')  # ours alone, in a block of its own
    assert html.index("<th>SwinIR-AMO</th>") < html.index('<tr class="soft">') < below
    assert html.count('<tr class="further">') == 1 and '<tr class="soft">' not in html[below:]
    assert '<tr class="soft"><th>SwinIR-AMO+FT</th>' in html
    assert html.index("<summary>Table 5<") < html.index("<summary>Seeds swinir<")
    figure = base64.b64encode((run[0] / "results/demo/figure3.png").read_bytes()).decode()
    assert f'<img alt="Figure 3" src="data:image/png;base64,{figure}">' in html


def test_fewer_images_by_rule_and_by_size(run, tmp_path, monkeypatch, capsys):
    assert report.evenly_spaced(list("abcdefgh"), 2) == ["c", "g"]
    assert report.evenly_spaced(list("abc"), 9) == list("abc")
    arguments = make_run(tmp_path)
    page = tmp_path / "results/demo/report.html"
    monkeypatch.setattr(report, "MAX_PIXELS", 64 * 64 * 10 * 2.9)  # two images of ten sources
    for more, names in (([], ["img01", "img03"]), (["--images", "1"], ["img02"])):
        report.main(report.parse_args([*arguments, *more]))
        assert [image["name"] for image in data_of(page)["images"]] == names
        said, html = capsys.readouterr().out, page.read_text()
        for line in (f"{len(names)} of 4 test images, evenly spaced by name; --images N sets how",
                     f"Left out: {', '.join(n for n in NAMES if n not in names)}"):
            assert line in said and line in html
    assert not list(tmp_path.rglob("*.tmp"))


def test_images_of_some_models(tmp_path):
    arguments = make_run(tmp_path)
    report.main(report.parse_args([*arguments, "--models", "SwinIR-AMO"]))
    data = data_of(tmp_path / "results/demo/report.html")
    assert [s for s in data["sources"] if s.startswith("SwinIR")] == ["SwinIR-AMO"]
    assert len(data["images"][0]["files"]) == len(data["sources"])
    assert len([row for row in data["rows"] if row.startswith("SwinIR")]) > 1  # scores of all
    with pytest.raises(ValueError, match="--models SwinIR-X: no row of"):
        report.main(report.parse_args([*arguments, "--models", "SwinIR-X"]))


BAD = {
    "no results": (lambda root: shutil.rmtree(root / "results"), "no such folder"),
    "no per-image table": (lambda root: (root / "results/demo/table5_per_image.csv").unlink(),
                           "table5_per_image.csv: no such table"),
    "no scores": (lambda root: write_csv(root / "results/demo/table5_per_image.csv",
                                         ["model", "image", "q"], [("A", "img00", "")]),
                  "no scores"),
    "no SR folder": (lambda root: shutil.rmtree(root / "sr"), "sr: no such folder"),
    "no SR image": (lambda root: (root / "sr/SwinIR-AMO/img02.png").unlink(),
                    "SwinIR-AMO/img02.png: no such image"),
    "no LQ image": (lambda root: (root / "lq/img01.png").unlink(), "img01.png"),
    "another size": (lambda root: Image.new("RGB", (60, 64)).save(root / "sr/SwinIR-AMO/img02.png"),
                     "img02.png: 60x64, but the original is 64x64"),
    "other images": (lambda root: write_csv(root / "results/demo/table5_per_image.csv",
                                            ["model", "image", "q"], [("A", "x", "1")]),
                     "image x: in table5_per_image.csv, but not in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, case):
    spoil, message = BAD[case]
    arguments = report.parse_args(make_run(tmp_path))
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        report.main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*report.html*"))


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    arguments, page = report.parse_args(make_run(tmp_path)), tmp_path / "results/demo/report.html"
    page.write_text("old")

    def full(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="report.html: No space left on device"):
        report.main(arguments)
    assert page.read_text() == "old" and not list(page.parent.glob(".*"))


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    flags = [f"--{flag}={tmp_path / 'none'}" for flag in ("results", "sr", "gt", "lq")]
    result = subprocess.run([sys.executable, "-m", "paper.report", *flags], cwd=ROOT,
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == f"report.py: --results {tmp_path / 'none'}: no such folder\n"


def test_a_page_is_filled_in_one_pass_and_no_part_ends_its_script(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_page, "FOLDER", tmp_path)
    (tmp_path / "slider.js").write_text('const a = "</ScRipt><!--", b = "\\1 @DATA@";')
    (tmp_path / "x.html").write_text("<p>@TITLE@</p>"
                                     "<script>@DATA@</script><script>@SLIDER@</script>")
    html = paper_page.fill("x.html", {"a": "</script><!-- @TITLE@"}, TITLE="\\1 @SLIDER@")
    assert html == ('<p>\\1 @SLIDER@</p>'
                    '<script>{"a": "\\u003c/script>\\u003c!-- @TITLE@"}</script>'
                    '<script>const a = "\\x3c/ScRipt>\\x3c!--", b = "\\1 @DATA@";</script>')
    with pytest.raises(KeyError, match="TITLE"):
        paper_page.fill("x.html", {})


# ------------------------------------------------------------------------- the page


@pytest.fixture
def open_page(browser, run):
    """A function that opens the page; at the end nothing may have gone wrong or out."""
    trouble, contexts = [], []

    def opened(file=run[2], **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda message: trouble.append(message.text))
        page.on("request", lambda r: r.url.split(":")[0] in ("file", "data")
                or trouble.append(r.url))
        page.goto(file.as_uri())
        return page

    opened.trouble = trouble
    yield opened
    for context in contexts:
        context.close()
    assert not trouble


def knob(page) -> float:
    """Percent of the picture that shows the left image: the line, the clipping and the knob."""
    line, box = page.locator("#line").bounding_box(), page.locator("#picture").bounding_box()
    percent = 100 * (line["x"] + 1 - box["x"]) / box["width"]
    clip = page.evaluate("getComputedStyle($('left')).clipPath")
    assert float(re.search(r"(\d[\d.]*)%", clip)[1]) == pytest.approx(100 - percent, abs=1)
    value = page.locator("#knob").get_attribute("aria-valuenow")
    assert float(value) == pytest.approx(percent, abs=1)
    return percent


def shown(page) -> str:
    return page.locator("#shown").text_content().split(",")[0]


def order(page) -> list[str]:
    return page.locator("#list li span").all_text_contents()


def test_slider_sides_and_images_by_mouse_and_keyboard(open_page, run):
    page, files = open_page(), data_of(run[2])
    assert knob(page) == pytest.approx(50, abs=1) and shown(page) == "img00"
    box = page.locator("#picture").bounding_box()
    assert (box["width"] % 64, box["height"] % 64) == (0, 0)  # whole pixels
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 5, box["y"] + 50, steps=3)
    assert knob(page) == pytest.approx(20, abs=1)
    page.mouse.up()
    page.mouse.move(box["x"] + box["width"], box["y"] + 50)
    assert knob(page) == pytest.approx(20, abs=1)  # let go

    for key, percent in (("ArrowRight", 22), ("Shift+ArrowRight", 32), ("Shift+ArrowLeft", 22),
                         ("ArrowLeft", 20), ("ArrowLeft", 18), ("End", 100), ("Home", 0)):
        page.keyboard.press(key)
        assert knob(page) == pytest.approx(percent, abs=1), key
    for key, name in (("ArrowDown", "img01"), ("ArrowDown", "img02"), ("ArrowUp", "img01"),
                      ("n", "img02"), ("n", "img03"), ("n", "img03"), ("p", "img02")):
        page.keyboard.press(key)
        assert shown(page) == name, key
    assert page.locator("#list [aria-current=true]").inner_text().startswith("img02")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert page.evaluate("document.activeElement.id") == "knob" and outline == "solid"

    # Both sides; each pair of sources shows the stored pixels of the image at hand
    page.locator("#list button").first.click()
    for left, right in (("GT 02", "LQ, nearest"), ("LQ, bicubic", EVIL), ("SwinIR-AMO", "GT 01")):
        page.select_option("#leftOf", label=left)
        page.select_option("#rightOf", label=right)
        for side, source in (("left", left), ("right", right)):
            index = files["images"][0]["files"][files["sources"].index(source)]
            assert page.locator(f"#{side}").get_attribute("src") == files["files"][index]
            assert page.locator(f"#{side}Name").text_content().startswith(source)
    assert page.locator("#rightName").text_content() == "GT 01, positive"
    assert page.locator("#scores tr.left th").text_content() == "SwinIR-AMO (left)"
    page.locator("#list button").first.focus()
    page.keyboard.press("x")
    assert page.locator("#leftName").text_content() == "GT 01, positive"
    page.keyboard.press("ArrowDown")  # the focus goes along in the list
    assert page.evaluate("document.activeElement.innerText").startswith("img01")
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")


def test_sorting_by_score_and_by_disagreement(open_page):
    page = open_page()
    head = page.locator("#scores tr").first.locator("th").all_text_contents()
    assert head == ["img00", "musiq\xa0↑", "q\xa0↑", "lpips\xa0↓"]
    assert order(page) == list(NAMES) and not page.locator("#metric").is_visible()
    page.select_option("#sort", "best")
    page.select_option("#model", label=EVIL)
    page.select_option("#metric", label="q\xa0↑")
    assert order(page) == ["img03", "img02", "img01", "img00"]
    assert page.locator("#list small").all_text_contents()[0] == "q 40.00"
    page.select_option("#metric", label="lpips\xa0↓")
    assert order(page) == ["img00", "img01", "img03", "img02"]  # lower is better
    page.select_option("#sort", "worst")
    assert order(page) == ["img02", "img03", "img01", "img00"]
    page.select_option("#sort", "apart")
    page.select_option("#metric2", label="q\xa0↑")
    assert order(page) == ["img00", "img02", "img03", "img01"]
    assert page.locator("#list small").all_text_contents() == [
        "3 apart: 1, 4", "2 apart: 4, 2", "2 apart: 3, 1", "1 apart: 2, 3"]
    page.select_option("#metric2", label="musiq\xa0↑")  # all inf: ranks 2.5, each
    assert page.locator("#list small").first.text_content() == "1.5 apart: 1, 2.5"
    page.locator("#list button").first.click()
    page.keyboard.press("n")
    assert shown(page) == order(page)[1]  # next in the order on show
    page.select_option("#model", label="Gold Standard")  # has no lpips
    assert page.locator("#list small").all_text_contents() == ["not scored"] * 4


def test_light_dark_and_a_phone(open_page):
    back = "getComputedStyle(document.body).backgroundColor"
    page = open_page(color_scheme="light")
    light = page.evaluate(back)
    page.get_by_text("Light / dark").click()
    dark = page.evaluate(back)
    assert (light, dark) == ("rgb(244, 244, 244)", "rgb(25, 25, 25)")
    page.get_by_text("Light / dark").click()
    assert page.evaluate(back) == light
    assert open_page(color_scheme="dark").evaluate(back) == dark

    page = open_page(viewport={"width": 390, "height": 844}, device_scale_factor=3, has_touch=True,
                     is_mobile=True)
    page.select_option("#sort", "apart")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("[...document.querySelectorAll('button, select, td, th, p')].every("
                         "e => parseFloat(getComputedStyle(e).fontSize) >= 13)")
    box = page.locator("#picture").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    touch = page.context.new_cdp_session(page)
    for kind, at in (("touchStart", 0.5), ("touchMove", 0.6), ("touchMove", 0.8), ("touchEnd", 0)):
        point = {"x": box["x"] + at * box["width"], "y": box["y"] + 50}
        touch.send("Input.dispatchTouchEvent",
                   {"type": kind, "touchPoints": [point] if at else []})
    assert knob(page) == pytest.approx(80, abs=1)


def test_names_do_no_harm_and_the_network_is_forbidden(open_page):
    page = open_page()
    assert page.evaluate("window.hurt") is None
    assert EVIL in page.locator("#scores").text_content()
    assert page.locator("#tables").inner_text().count(EVIL) == 2  # name, label
    assert page.evaluate("document.scripts.length") == 2
    assert not page.locator("#broken").is_visible()
    refused = page.evaluate("""() => new Promise(done => {
        document.addEventListener("securitypolicyviolation", e => done(e.effectiveDirective));
        setTimeout(done, 3000, "nothing refused");
        fetch("/").catch(() => 0); })""")
    assert refused == "connect-src" and "Content Security Policy" in open_page.trouble.pop()
    open_page.trouble.clear()
