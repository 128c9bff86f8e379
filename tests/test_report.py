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
    write_csv(results / "table5_per_image.csv", columns, per_image, ["4 images <of> mine"])
    write_csv(results / "comparison.csv", ["table", "ours", "paper"], [("5", "1", "2")])
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


def test_the_papers_numbers_have_columns_and_rows_of_their_own(run):
    html = run[2].read_text()
    assert '<th>psnr</th><th class="paper">psnr (paper)</th>' in html
    assert ('<tr><th>SwinIR-UPos</th><td class="text">SwinIR-UPos*</td><td class="text">no</td>'
            '<td>27.3094</td><td class="paper">22.30</td>') in html
    assert ('<tr><th>SwinIR-AMO</th><td class="text">SwinIR-AMO</td><td class="text"></td>'
            '<td>27.1</td><td class="paper">22.08</td>') in html  # its "yes" is not of this run
    assert '<th class="paper">ssim (paper)</th>' in html and "<th>ssim</th>" not in html
    assert '<th>lambda a' not in html and "label (paper)" not in html  # a setting has one column
    below = html.index('<tr class="further"><th>&lt;script')  # ours alone, in a block of its own
    assert html.index("<th>SwinIR-AMO</th>") < html.index('<tr class="paper">') < below
    assert html.count('<tr class="further">') == 1 and '<tr class="paper">' not in html[below:]
    assert '<tr class="paper"><th>SwinIR-AMO+FT</th><td class="text">SwinIR-AMO + FT</td>' in html
    assert html.index("<summary>Table 5<") < html.index("<summary>Seeds swinir<")
    figure = base64.b64encode((run[0] / "results/demo/figure3.png").read_bytes()).decode()
    assert f'<img alt="Figure 3" src="data:image/png;base64,{figure}">' in html
    assert '<details class="paper"><summary>Comparison<' in html


def test_only_pictures_on_white_paper_are_plots(tmp_path):
    for name, image in (("plot", Image.new("RGB", (90, 60), "white")),
                        ("photo", Image.fromarray(smooth_image(np.random.default_rng(0), 60, 90)))):
        image.save(tmp_path / f"{name}.png")
        html = report.plot_html(tmp_path / f"{name}.png", {"photo": "Photo: <A>, CC"})
        assert ('<figure class="plot">' in html) == (name == "plot")
        assert ("<figcaption>Photo. Photo: &lt;A&gt;, CC<" in html) == (name == "photo")
    (tmp_path / "plot.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="plot.png: unreadable image"):
        report.plot_html(tmp_path / "plot.png", {})


def facts_of(page: Path) -> list[str]:
    return re.findall(r"<li>(.*?)(?=<li>|</ul></header>)", page.read_text())


def test_the_header_tells_what_the_records_tell(tmp_path):
    arguments, page = make_run(tmp_path), tmp_path / "results/demo/report.html"
    report.main(report.parse_args(arguments))
    assert facts_of(page) == ["data: 4 images &lt;of&gt; mine"] and "checked>" in page.read_text()
    for row, seed, commit in (("UPos", "7", "abc-dirty"), ("SwinIR-AMO", "7", "def"),
                              ("another", "8", "fff")):  # no row of this table
        (tmp_path / row).mkdir()
        (tmp_path / row / "config.json").write_text(
            json.dumps({"flags": {"seed": seed}, "commit": commit}))
    (tmp_path / "README.txt").write_text("Made up. The labels are simulated.\n")
    report.main(report.parse_args(arguments))
    assert facts_of(page)[1:] == ["seed: 7", "commit: abc-dirty, def", "labels are simulated"]
    assert "checked>" not in page.read_text()
    (tmp_path / "UPos/config.json").write_text("[]")
    with pytest.raises(ValueError, match="UPos/config.json: not the config.json of a run"):
        report.main(report.parse_args(arguments))
    report.main(report.parse_args([*arguments, "--runs", str(tmp_path / "results")]))
    assert facts_of(page)[1:] == ["labels are simulated"]


@pytest.mark.parametrize(("models", "pair"), [
    (["SwinIR-OrigsOnly", "SwinIR-UPos", "SwinIR-AMO+FT", "SwinIR-AMO+FT_full"],
     ["SwinIR-UPos", "SwinIR-AMO+FT"]),
    (["RealESRGAN-UPos", "SwinIR-UPos", "SwinIR-AMO+FT"], ["SwinIR-UPos", "SwinIR-AMO+FT"]),
    (["bicubic", "base", "tuned x1", "full", "no-reward"], ["base", "tuned x1"]),
    (["A", "SwinIR-UPos", "B"], ["A", "B"]),
])
def test_the_pair_that_the_page_opens_on(models, pair):
    assert report.opening_pair(models, None) == pair
    assert report.opening_pair(models, models[:2]) == models[:2]


def make_photos_run(root: Path) -> list[str]:
    """Two enlarged photos without ground truth; only "tuned x1" has made the second one."""
    for folder in ("lq", "results", "sr/base", "sr/tuned x1"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, models in (("a", ("base", "tuned x1")), ("b", ("tuned x1",))):
        Image.fromarray(smooth_image(rng, 12, 20)).save(root / "lq" / f"{name}.png")
        for model in models:
            Image.fromarray(smooth_image(rng, 48, 80)).save(root / "sr" / model / f"{name}.png")
    return [f"--{flag}={root / folder}" for flag, folder in
            (("results", "results"), ("sr", "sr"), ("lq", "lq"))]


def test_photos_without_ground_truth(tmp_path):
    arguments, page = make_photos_run(tmp_path), tmp_path / "results/report.html"
    with pytest.raises(FileNotFoundError, match="base/b.png: no such image"):
        report.main(report.parse_args(arguments))
    columns = ["model", "image", "q"]
    write_csv(tmp_path / "results/photos_per_image.csv", columns,
              [("base", "a", "1"), ("tuned x1", "a", "2")])
    write_csv(tmp_path / "results/captions.csv", ["image", "author", "licence"],
              [("b", "<B>", "CC-BY-4.0")])
    report.main(report.parse_args(arguments))
    data = data_of(page)
    assert data["sources"] == ["base", "tuned x1", "LQ, nearest", "LQ, bicubic"]
    assert data["open"] == [0, 1]
    assert [(image["name"], image["caption"]) for image in data["images"]] == [
        ("b", "Photo: <B>, CC-BY-4.0"), ("a", "")]  # without scores: first
    assert [file is None for file in data["images"][0]["files"]] == [True, False, False, False]
    assert (data["images"][0]["width"], data["images"][0]["height"]) == (80, 48)
    assert data["images"][0]["scores"] == [[""], [""]] and "GT" not in "".join(data["sources"])
    report.main(report.parse_args([*arguments, "--open", "tuned x1", "base"]))
    assert data_of(page)["open"] == [1, 0]
    (tmp_path / "results/photos_per_image.csv").unlink()
    shutil.copy(tmp_path / "sr/base/a.png", tmp_path / "sr/base/b.png")
    report.main(report.parse_args(arguments))  # no table at all
    data = data_of(page)
    assert (data["rows"], data["metrics"]) == (["base", "tuned x1"], [])
    assert [image["name"] for image in data["images"]] == ["a", "b"]


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
    "no ground truth": (lambda root: shutil.rmtree(root / "gt"), "gt: no such folder"),
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
    page = open_page(color_scheme="dark")
    assert page.evaluate(back) == dark
    figure = "figure => { figure.className = 'plot'; return getComputedStyle(figure.querySelector("
    figure += "'img')).filter }"  # as of a plot; the red one of this run is none
    assert page.locator("figure").get_attribute("class") is None
    assert page.locator("figure").evaluate(figure) == "brightness(0.75)"
    page.get_by_text("Light / dark").click()
    assert page.locator("figure").evaluate(figure) == "none"

    for scheme, colour in (("dark", dark), ("light", light)):
        page = open_page(viewport={"width": 390, "height": 844}, device_scale_factor=3,
                         has_touch=True, is_mobile=True, color_scheme=scheme)
        page.select_option("#sort", "apart")
        assert page.evaluate(back) == colour
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("[...document.querySelectorAll('button, select, td, th, p')].every("
                             "e => parseFloat(getComputedStyle(e).fontSize) >= 13)")
    assert not page.locator(".keys:visible").count() and page.get_by_text("Drag the line").count()
    for wide in page.locator("figure img, #tables details, #scores").all():  # scroll inside
        assert wide.bounding_box() is None or wide.bounding_box()["width"] <= 390
    box = page.locator("#picture").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    touch = page.context.new_cdp_session(page)
    for kind, at in (("touchStart", 0.5), ("touchMove", 0.6), ("touchMove", 0.8), ("touchEnd", 0)):
        point = {"x": box["x"] + at * box["width"], "y": box["y"] + 50}
        touch.send("Input.dispatchTouchEvent",
                   {"type": kind, "touchPoints": [point] if at else []})
    assert knob(page) == pytest.approx(80, abs=1)


def test_the_list_has_one_tab_stop_and_arrows_move_in_it(open_page):
    page = open_page()
    focused = "document.activeElement.innerText.trim()"
    page.locator("#sort").focus()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "img00"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    for key, name in (("ArrowDown", "img01"), ("End", "img03"), ("ArrowUp", "img02"),
                      ("Home", "img00"), ("ArrowUp", "img00"), ("ArrowDown", "img01")):
        page.keyboard.press(key)
        assert page.evaluate(focused) == shown(page) == name, key
        assert page.evaluate(outline) == "solid"
    assert knob(page) == pytest.approx(50, abs=1)  # Home and End are the list's
    page.keyboard.press("ArrowLeft")
    assert knob(page) == pytest.approx(48, abs=1)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "knob"  # past the other images
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focused) == "img01"


def test_the_papers_numbers_can_be_switched_off(open_page):
    page = open_page()
    cells = page.locator("#tables .paper:visible")
    assert page.locator("#papers").is_checked() and cells.count() > 20
    page.locator("#papers").click()
    assert cells.count() == 0 and page.locator("#tables td:visible").count() > 5


def test_a_photo_that_some_models_lack(open_page, tmp_path):
    arguments = make_photos_run(tmp_path)
    write_csv(tmp_path / "results/photos_per_image.csv", ["model", "image", "q"],
              [("base", "a", "1"), ("tuned x1", "a", "2")])
    report.main(report.parse_args(arguments))
    page = open_page(tmp_path / "results/report.html")
    assert shown(page) == "b" and not page.locator("#scores").is_visible()
    assert "image 1 of 2," in page.locator("#shown").text_content()
    assert page.get_by_text("2 images: first 1 without scores, then 1 of 1 test images, none left "
                            "out.").is_visible()
    assert page.locator("#leftName").text_content() == "LQ, bicubic"
    assert page.locator("#rightName").text_content() == "tuned x1"
    assert page.locator("#leftOf option:disabled").all_text_contents() == ["base"]
    page.keyboard.press("n")
    assert shown(page) == "a" and page.locator("#scores").is_visible()
    assert not page.locator("#leftOf option:disabled").count()
    assert not page.locator("#papers").is_visible()  # no table of the paper


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
