"""One self-contained page of a run: its tables, plots, and sliders between its images.

    python report.py --results results/paper --sr results/paper/sr \\
        --gt datasets/HGGT/Test/GT/Test-100 \\
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR

In:  --results with table5_per_image.csv and, as far as they are there, the other tables and the
     PNG plots; SR images of evaluate.py --save-sr; --paper's tables.
Out: --results/report.html, which needs no network and no other file. Images are lossless WebP,
     each stored once however many models made it.

A page with all images of a large set would be too large for a browser. --images sets how many it
has; they are evenly spaced by name, and the page lists the others.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from models.checkpoint import read_csv, replacing
from models.hggt import LABEL_VALUES, load_sets, read_rgb

GOLD = "Gold Standard"
LOWER_BETTER = ("lpips", "lpips_st", "dists")
MAX_PIXELS = 40e6  # of all images by default; 1.5 to 2 bytes of the page per pixel
# In the order of the page; what else is in the folder is not on it
TABLES = ("table5.csv", "table[78].csv", "orderings.csv", "seeds_*.csv", "table[12346].csv",
          "structured_noise.csv", "user_study*.csv", "comparison.csv")
PLOTS = ("perception_distortion.png", "tradeoff.png", "crops*.png", "figure[2-8].png")

# @NAME@ becomes a part of `main`: escaped HTML, and DATA as JSON without "<".
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --back: light-dark(#f4f4f4, #191919);
  --text: light-dark(#1c1c1c, #ececec); --soft: light-dark(#5a5a5a, #ababab);
  --line: light-dark(#c4c4c4, #505050); --panel: light-dark(#fff, #252525);
  --accent: light-dark(#1a5fb4, #8ab8f0); --mark: light-dark(#dfeafa, #20364f) }
[hidden] { display: none !important }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.4 system-ui, sans-serif }
header, main { max-width: 1500px; margin: auto; padding: 0 12px }
header { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center }
h1 { font-size: 1.4em; margin: 8px 0; overflow-wrap: anywhere }
h2 { font-size: 1.2em; margin: 24px 0 8px }
p { margin: 8px 0 }
a { color: var(--accent) }
small, .soft, figcaption { color: var(--soft) }
td small { font-size: 12px }
button, select { font: inherit; color: inherit; background: var(--panel); max-width: 100%;
  border: 1px solid var(--line); border-radius: 6px; padding: 4px 8px; min-height: 36px }
button, summary { cursor: pointer }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
kbd { font: .85em monospace; border: 1px solid var(--line); border-radius: 4px; padding: 0 5px }
.bar { display: flex; flex-wrap: wrap; gap: 8px 12px; margin: 8px 0 }
.bar label { display: flex; gap: 6px; align-items: center; min-width: 0; white-space: nowrap }
.bar select { min-width: 0 }
.scroll { overflow: auto; max-width: 100% }
#grid { display: grid; gap: 16px; grid-template-columns: 190px minmax(0, 1fr) fit-content(40em) }
#list { list-style: none; margin: 0; padding: 4px; overflow: auto; max-height: 720px }
#list button { display: grid; grid-template-columns: 44px 1fr; gap: 0 8px; width: 100%;
  text-align: left; margin-bottom: 6px; align-items: center; overflow-wrap: anywhere }
#list img { width: 44px; height: 44px; object-fit: cover; grid-row: 1 / 3 }
#list [aria-current=true] { background: var(--mark); border-color: var(--accent) }
#slider { margin: auto; position: relative; cursor: ew-resize; user-select: none;
  -webkit-user-select: none; touch-action: pan-y pinch-zoom }
#names { display: flex; justify-content: space-between; gap: 16px; font-weight: 600;
  overflow-wrap: anywhere }
#rightName { text-align: right }
#picture { position: relative }
#picture img { position: absolute; width: 100%; height: 100%; -webkit-touch-callout: none }
#left { clip-path: inset(0 calc(100% - var(--x)) 0 0) }
#line { position: absolute; left: var(--x); width: 2px; margin-left: -1px; bottom: 0; top: 0;
  background: #fff; box-shadow: 0 0 0 1px #000a; pointer-events: none }
#rail { position: relative; height: 44px;
  background: linear-gradient(var(--line) 0 0) center / 100% 4px no-repeat }
#knob { position: absolute; left: var(--x); top: 6px; width: 32px; height: 32px;
  margin-left: -16px; border: 2px solid #fff; border-radius: 50%; background: var(--accent) }
table { border-collapse: collapse; background: var(--panel); font-size: 13px }
th, td { border: 1px solid var(--line); padding: 3px 6px; text-align: right; white-space: nowrap }
tr:first-child th { white-space: normal; vertical-align: bottom }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--panel); z-index: 1 }
#tables .scroll { max-height: 80vh }
td.text { text-align: left }
td.long { white-space: normal; min-width: 18em }
tr.left th, tr.right th, tr.left td, tr.right td { background: var(--mark); font-weight: 600 }
details { margin: 12px 0 }
summary { font-weight: 600; min-height: 28px }
.notes { margin: 4px 0; font-size: 13px; color: var(--soft) }
ul { margin: 4px 0; padding-left: 20px; overflow-wrap: anywhere }
figure { margin: 16px 0 }
figure img { display: block; max-width: 100%; min-width: min(640px, 200vw); height: auto }
@media (max-width: 1150px) { #grid { grid-template-columns: 180px minmax(0, 1fr) }
  #scores { grid-column: 1 / 3 } }
@media (max-width: 700px) { #grid { grid-template-columns: minmax(0, 1fr) }
  #scores { grid-column: 1 } #list { display: flex; gap: 8px }
  #list li { flex: 0 0 150px } #list button { height: 100% } }
</style>
<header><h1>@TITLE@</h1><nav><a href="#viewer">Images</a> <a href="#plots">Plots</a>
<a href="#tables">Tables</a></nav><button id="theme">Light / dark</button></header>
<main>
<p id="broken">The images are not shown: this page is incomplete or its script is blocked.</p>
<section id="viewer" hidden>
  <h2>Images</h2>
  @CHOICE@
  <div class="bar">
    <label>Left <select id="leftOf"></select></label><button id="swap">Swap <kbd>X</kbd></button>
    <label>Right <select id="rightOf"></select></label>
  </div>
  <div class="bar">
    <label>Sort by <select id="sort"><option value="name">name</option><option value="best"
    >score, best first</option><option value="worst">score, worst first</option><option
    value="apart">largest disagreement of two metrics</option></select></label>
    <label>metric <select id="metric"></select></label>
    <label>and <select id="metric2"></select></label>
    <label>of <select id="model"></select></label>
  </div>
  <div id="grid">
    <ol id="list" aria-label="test images"></ol>
    <div id="stage"><div id="slider">
      <div id="names"><span id="leftName"></span><span id="rightName"></span></div>
      <div id="picture"><img id="right" draggable="false"><img id="left" draggable="false"
        ><div id="line"></div></div>
      <div id="rail"><div id="knob" role="slider" tabindex="0" aria-label="share of the picture
 that shows the left image" aria-valuemin="0" aria-valuemax="100"></div></div></div>
      <p class="soft" id="shown" role="status"></p></div>
    <div id="scores" class="scroll" tabindex="0" role="region" aria-label="scores"></div>
  </div>
  <p class="soft">Drag the line, or use the keys: <kbd>&larr;</kbd> <kbd>&rarr;</kbd> move it (with
  <kbd>Shift</kbd> further, <kbd>Home</kbd> <kbd>End</kbd> to the edges); <kbd>&uarr;</kbd>
  <kbd>&darr;</kbd> previous and next image once the picture or the list has been clicked or reached
  with <kbd>Tab</kbd>; <kbd>P</kbd> <kbd>N</kbd> the same from anywhere; <kbd>X</kbd> swaps the
  sides. Scores: &uarr; higher is better, &darr; lower. Disagreement: difference of the image's
  ranks by the two metrics, among the images shown here; rank 1 is the best.</p>
</section>
<section id="plots"><h2>Plots</h2>@PLOTS@</section>
<section id="tables"><h2>Tables</h2>
<p class="soft">Small numbers are the paper's, of SBS180K, HGGT and RealSR v3; grey rows are in the
paper alone. Compare them with ours only where the data are the same.</p>@TABLES@</section>
</main>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const $ = id => document.getElementById(id);
const { images, sources, rows, metrics, lower, files } = JSON.parse($("data").textContent);
let at = 0;                       // index into images
let order = images.map((_, i) => i);
let x = 50;                       // percent of the picture's width that shows the left image

function make(tag, text = "", set = {}) {
  const element = Object.assign(document.createElement(tag), set);
  element.textContent = text;
  return element;
}

function score(image, row, metric) {  // null: not scored
  const text = images[image].scores[row]?.[metric] || "";
  const value = text === "inf" ? Infinity : text === "" ? NaN : Number(text);
  return isNaN(value) ? null : value;
}
const show = value => value === null ? "" : value === Infinity ? "inf" : value.toPrecision(4);
const sign = metric => lower.includes(metrics[metric]) ? -1 : 1;
const arrow = metric => metrics[metric] + (sign(metric) < 0 ? "\\xa0\\u2193" : "\\xa0\\u2191");

function ranks(row, metric) {  // per image; 1 is the best, equal scores share their mean rank
  const q = images.map((_, i) => score(i, row, metric)).map(v => v === null ? v : v * sign(metric));
  return q.map(a => a === null ? null : q.filter(b => b !== null && b > a).length
    + (q.filter(b => b === a).length + 1) / 2);
}

function sort() {
  const how = $("sort").value, row = Number($("model").value);
  const [a, b] = [Number($("metric").value), Number($("metric2").value)];
  $("metric").parentElement.hidden = $("model").parentElement.hidden = how === "name";
  $("metric2").parentElement.hidden = how !== "apart";
  const [ra, rb] = [ranks(row, a), ranks(row, b)];
  const apart = ra.map((r, i) => r === null || rb[i] === null ? null : Math.abs(r - rb[i]));
  const key = { name: ra.map(() => 0), best: ra, worst: ra.map(r => r === null ? r : -r),
    apart: apart.map(d => d === null ? d : -d) }[how];
  order = images.map((_, i) => i).sort((i, j) => key[i] === key[j] ? i - j
    : key[i] === null ? 1 : key[j] === null ? -1 : key[i] - key[j]);
  $("list").replaceChildren(...order.map(i => {
    const button = make("button"), item = make("li");
    const note = how === "name" ? "" : how !== "apart" ? `${metrics[a]} ${show(score(i, row, a))}`
      : apart[i] === null ? "not scored" : `${apart[i]} apart: ${ra[i]}, ${rb[i]}`;
    const lq = files[images[i].files[sources.indexOf("LQ, nearest")]];
    button.append(make("img", "", { src: lq, alt: "" }), make("span", images[i].name),
                  make("small", note));
    button.dataset.image = i;
    button.addEventListener("click", () => open(i));
    item.append(button);
    return item;
  }));
  open(at);
}

function moveTo(percent) {
  x = Math.min(100, Math.max(0, percent));
  $("slider").style.setProperty("--x", x + "%");
  $("knob").setAttribute("aria-valuenow", Math.round(x));
}

function layout() {  // whole device pixels per image pixel; shrunk only if the window is smaller
  const { width: w, height: h } = images[at], ratio = devicePixelRatio;
  const fit = Math.min($("stage").clientWidth / w, Math.max(240, innerHeight - 150) / h) * ratio;
  const limit = 768 * ratio / Math.max(w, h);  // small images grow up to 768 CSS pixels
  const scale = fit < 1 ? fit : Math.max(1, Math.floor(Math.min(fit, limit)));
  $("slider").style.width = w * scale / ratio + "px";
  $("picture").style.height = h * scale / ratio + "px";
  for (const side of ["left", "right"])
    $(side).style.imageRendering = scale > 1 || sources[$(side + "Of").value].startsWith("LQ")
      ? "pixelated" : "auto";
  $("shown").textContent = `${images[at].name}, ${w} x ${h}, image ${order.indexOf(at) + 1} of `
    + `${images.length}, shown at ${Math.round(scale * 100)} %`;
}

function open(image) {
  at = image;
  for (const side of ["left", "right"]) {
    const source = Number($(side + "Of").value), label = images[at].labels[source] || "";
    $(side).src = files[images[at].files[source]];
    $(side).alt = `${sources[source]}, ${images[at].name}`;
    $(side + "Name").textContent = sources[source] + (label && `, ${label}`);
  }
  const table = make("table"), head = table.insertRow();
  head.append(make("th", images[at].name), ...metrics.map((_, m) => make("th", arrow(m))));
  rows.forEach((name, row) => {
    const line = table.insertRow(), sides = ["left", "right"].filter(
      side => sources[$(side + "Of").value] === name);
    line.className = sides.join(" ");
    line.append(make("th", name + sides.map(side => ` (${side})`).join("")),
                ...metrics.map((_, m) => make("td", show(score(at, row, m)))));
  });
  $("scores").replaceChildren(table);
  const inList = $("list").contains(document.activeElement);
  for (const button of $("list").querySelectorAll("button")) {
    const current = Number(button.dataset.image) === at;
    button.setAttribute("aria-current", current);
    if (!current) continue;
    if (inList) button.focus({ preventScroll: true });
    const list = $("list"), a = button.getBoundingClientRect(), b = list.getBoundingClientRect();
    list.scrollTop += Math.min(0, a.top - b.top - 4) + Math.max(0, a.bottom - b.bottom + 4);
    list.scrollLeft += Math.min(0, a.left - b.left - 4) + Math.max(0, a.right - b.right + 4);
  }
  layout();
}

function go(by) {
  const place = order.indexOf(at) + by;
  if (place >= 0 && place < order.length) open(order[place]);
}

function swap() {
  [$("leftOf").value, $("rightOf").value] = [$("rightOf").value, $("leftOf").value];
  open(at);
}

function drag(event) {
  const box = $("slider").getBoundingClientRect();
  moveTo(100 * (event.clientX - box.left) / box.width);
}

$("slider").addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  $("slider").setPointerCapture(event.pointerId);
  drag(event);
  event.preventDefault();
  $("knob").focus({ preventScroll: true });
});
$("slider").addEventListener("pointermove", event => {
  if ($("slider").hasPointerCapture(event.pointerId)) drag(event);
});
addEventListener("keydown", event => {
  const { key, target } = event, step = event.shiftKey ? 10 : 2;
  if (event.ctrlKey || event.altKey || event.metaKey || target.closest("select, .scroll")) return;
  const inside = $("viewer").contains(target), free = inside || target === document.body;
  if (key === "ArrowLeft" && free) moveTo(x - step);
  else if (key === "ArrowRight" && free) moveTo(x + step);
  else if (key === "Home" && inside) moveTo(0);
  else if (key === "End" && inside) moveTo(100);
  else if (key === "ArrowUp" && inside || key.toLowerCase() === "p") go(-1);
  else if (key === "ArrowDown" && inside || key.toLowerCase() === "n") go(1);
  else if (key.toLowerCase() === "x") swap();
  else return;
  event.preventDefault();
});
addEventListener("resize", layout);
$("swap").addEventListener("click", swap);
$("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = (root.style.colorScheme || (dark ? "dark" : "light")) === "dark"
    ? "light" : "dark";
});

const options = (id, names, chosen) => $(id).append(...names.map((name, i) =>
  make("option", name, { value: i, selected: i === chosen })));
const models = rows.filter(row => sources.includes(row));
options("leftOf", sources, 0);
options("rightOf", sources, models.length - 1);
options("model", rows, rows.indexOf(models.at(-1)));
options("metric", metrics.map((_, m) => arrow(m)), 0);
options("metric2", metrics.map((_, m) => arrow(m)), 1);
for (const id of ["leftOf", "rightOf"]) $(id).addEventListener("change", () => open(at));
for (const id of ["sort", "metric", "metric2", "model"]) $(id).addEventListener("change", sort);
$("broken").hidden = true;
$("viewer").hidden = false;
moveTo(50);
sort();
</script>
</html>
"""


# ------------------------------------------------------------------------- parts of the page


def title_of(path: Path) -> str:
    """table5.csv: Table 5; seeds_swinir.csv: Seeds swinir"""
    words = re.sub(r"(?<=[a-z])(?=[0-9])", " ", path.stem).replace("_", " ")
    return words[0].upper() + words[1:]


def notes_html(lines: list[str]) -> str:
    """The first line as it is, the others to unfold."""
    lines = [escape(line) for line in lines]
    more = f"<summary>Notes</summary><ul><li>{'<li>'.join(lines[1:])}</ul>"
    return (f'<p class="soft">{lines[0]}</p>' if lines else "") + (
        f'<details class="notes">{more}</details>' if lines[1:] else "")


def table_html(path: Path, paper: Path) -> str:
    """A CSV as HTML; if `paper` is there, its numbers beside ours, then the rows that it has alone.

    Columns without any value are left out. Comment lines of the CSV stand below as notes.
    """
    ours, notes = read_csv(path)
    theirs = read_csv(paper)[0] if paper.is_file() else []
    key = next((k for k in ("model", "pyiqa_name") if theirs and k in theirs[0]), "")
    printed = {row[key]: row for row in theirs}
    mine = {row[key] for row in ours} if key else set()
    header = list(dict.fromkeys(c for row in (*ours, *theirs) for c in row))
    header = [c for c in header if any(row.get(c) for row in (*ours, *theirs))]
    titles = [escape(column.replace("_", " ")) for column in header]
    lines = [f"<tr><th>{'</th><th>'.join(titles)}</th></tr>"]
    for row in (*ours, *({key: name} for name in printed if name not in mine)):
        beside, line = printed.get(row.get(key, ""), {}), ""
        for i, column in enumerate(header):
            text, other = row.get(column, ""), beside.get(column, "")
            is_number = bool(re.fullmatch(r"[-+]?[\d.]+%?", text or other))
            if not is_number or column == "lambda_a":  # a setting, no result
                text, other = text or other, ""
            kind = "" if is_number else " class=text" if len(text) < 40 else ' class="text long"'
            content = escape(text) + (f" <small>{escape(other)}</small>" if other else "")
            line += f"<td{kind}>{content}</td>" if i else f"<th>{content}</th>"
        lines.append(f"<tr>{line}</tr>" if row in ours else f'<tr class="soft">{line}</tr>')
    title = escape(title_of(path))
    return (f"<details{' open' if path.name.startswith('table') else ''}><summary>{title}</summary>"
            f'{notes_html(notes)}<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{title}"><table>{"".join(lines)}</table></div></details>')


def plot_html(path: Path) -> str:
    title, data = escape(title_of(path)), base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><figcaption>{title}</figcaption><div class="scroll" tabindex="0" '
            f'role="region" aria-label="{title}"><img alt="{title}" '
            f'src="data:image/png;base64,{data}"></div></figure>')


def evenly_spaced(names: list[str], count: int) -> list[str]:
    """`count` of the names, at the quantiles (i + 1/2) / count of their order."""
    count = min(count, len(names))
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


def gather_images(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """All that the script of the page needs, and lines on which images it has.

    The data: images [{name, width, height, files: index into files per source, labels per source,
    scores: rows x metrics, text of the CSV}], sources, rows, metrics, lower (better), files (URLs).
    """
    table, _ = read_csv(args.results / "table5_per_image.csv", ["model", "image"])
    scores = {(row["model"], row["image"]): row for row in table}
    rows, names = (list(dict.fromkeys(row[c] for row in table)) for c in ("model", "image"))
    # No reference first: the gold standard's rows, which come first, have no other
    metrics = list(dict.fromkeys(c for row in table for c in row
                                 if c not in ("model", "image") and row[c]))
    if not metrics:
        raise ValueError(f"{args.results / 'table5_per_image.csv'}: no scores; run evaluate.py")
    for flag, folder in (("--sr", args.sr), ("--gt", args.gt), ("--lq", args.lq)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder")
    sets, models = load_sets(args.gt), [row for row in rows if row != GOLD]
    if unknown := [name for name in args.models or () if name not in models]:
        raise ValueError(f"--models {unknown[0]}: no row of {args.results / 'table5.csv'}; these "
                         f"are {' '.join(models)}")
    models = [row for row in models if row in (args.models or models)]
    index = {name: i for i, name in enumerate(sets.names)}
    if absent := [name for name in names if name not in index]:
        raise ValueError(f"image {absent[0]}: in table5_per_image.csv, but not in {args.gt}")
    members = [f"GT {Path(path).parent.name}" for path in sets.paths[0]]
    sources = [*models, *members, "LQ, nearest", "LQ, bicubic"]
    height, width = sets.sizes[index[names[0]]].tolist()
    fitting = int(MAX_PIXELS // (height * width * len(sources)))
    shown = evenly_spaced(sorted(names), args.images or max(1, fitting))
    for path in (args.sr / model / f"{name}.png" for model in models for name in shown):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image; run evaluate.py with --save-sr")

    files: dict[str, int] = {}  # equal pixels are stored once

    def store(image: np.ndarray) -> int:
        buffer = io.BytesIO()  # of WebP's settings the fastest within 4 % of the smallest file
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=50, method=2)
        url = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return files.setdefault(url, len(files))

    images, values = [], {value: label for label, value in LABEL_VALUES.items()}
    for name in shown:
        i = index[name]
        height, width = sets.sizes[i].tolist()
        paths = [*(args.sr / model / f"{name}.png" for model in models), *map(Path, sets.paths[i])]
        stored = []
        for path, scale in (*((path, 1) for path in paths), (args.lq / f"{name}.png", 4)):
            image = read_rgb(path)
            if (image.shape[0] * scale, image.shape[1] * scale) != (height, width):
                raise ValueError(f"{path}: {image.shape[1]}x{image.shape[0]}, but the original is "
                                 f"{width}x{height}; are --sr, --gt and --lq of the same data?")
            stored.append(store(image))
        bicubic = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        stored.append(store(np.asarray(bicubic)))
        labels = [] if sets.labels is None else [values[v] for v in sets.labels[i].tolist()[1:]]
        images.append({
            "name": name, "width": width, "height": height, "files": stored,
            "labels": ["" for _ in models] + [""] + labels,
            "scores": [[scores.get((row, name), {}).get(m, "") for m in metrics] for row in rows],
        })  # fmt: skip
    left_out = [name for name in sorted(names) if name not in shown]
    rule = ", evenly spaced by name; --images N sets how many." if left_out else ", none left out."
    return {"images": images, "sources": sources, "rows": rows, "metrics": metrics,
            "lower": LOWER_BETTER, "files": list(files)}, [
                f"{len(shown)} of {len(names)} test images{rule}",
                *([f"Left out: {', '.join(left_out)}"] if left_out else [])]


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    if not args.results.is_dir():
        raise FileNotFoundError(f"--results {args.results}: no such folder")
    if not args.paper.is_dir():
        raise FileNotFoundError(f"--paper {args.paper}: no such folder")
    data, lines = gather_images(args)
    tables = [table_html(path, args.paper / path.name)
              for pattern in TABLES for path in sorted(args.results.glob(pattern))]
    plots = [plot_html(path)
             for pattern in PLOTS for path in sorted(args.results.glob(pattern))]
    parts = {
        "TITLE": escape(f"Report: {args.results.resolve().name}"), "CHOICE": notes_html(lines),
        "PLOTS": "".join(plots) or "<p>None in this folder.</p>",
        "TABLES": "".join(tables) or "<p>None in this folder.</p>",
        "DATA": json.dumps(data).replace("<", "\\u003c"),  # a name may not end the script
    }  # fmt: skip
    page = re.sub("@([A-Z]+)@", lambda found: parts[found[1]], PAGE)  # one pass: parts stay as is
    out = args.results / "report.html"
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {len(tables)} tables, {len(plots)} plots\n"
          + "\n".join(lines))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--results", required=True, type=Path, metavar="DIR",
        help="folder of the tables and plots; report.html goes there as well")
    add("--sr", required=True, type=Path, metavar="DIR", help="SR images, DIR/MODEL/NAME.png")
    add("--gt", required=True, type=Path, metavar="DIR", help="the test set they were scored on")
    add("--lq", required=True, type=Path, metavar="DIR", help="its low-quality images, NAME.png")
    add("--paper", type=Path, default=Path(__file__).resolve().parent / "paper", metavar="DIR",
        help="the paper's table1.csv to table8.csv (default: paper/ beside this script)")
    add("--images", type=int, metavar="N",
        help="test images on the page, evenly spaced by name (default: as many as keep it below "
        "about 80 MB)")
    add("--models", nargs="+", metavar="NAME",
        help="rows of the tables whose images are on the page (default: all)")
    args = parser.parse_args(argv)
    if args.images is not None and args.images < 1:
        parser.error("--images: at least 1")
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:  # bad input: one line that names file or flag
        if os.environ.get("DEBUG"):
            raise
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)
