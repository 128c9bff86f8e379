"""Ask people which of two models' images look better, and test the answer (paper Sec. 12, Fig. 7).

    python user_study.py make --a SwinIR-AMO+FT=results/demo-sr/SwinIR-AMO+FT \\
        --b SwinIR-UPos=results/demo-sr/SwinIR-UPos --raters 12 --pairs 4 --seed 0 --out study
    python user_study.py analyze votes/*.json --key study/key.json --out results/user_study.csv

make.     In: two folders of 8-bit RGB PNGs with equal names and sizes (evaluate.py --save-sr).
          Out: a new folder with one page per rater, rater01.html ..., and key.json. A page is
          all that its rater gets: it works offline, on phones too, and ends with a download of
          the votes. It holds neither the models' names nor the files'; which side is which stands
          in key.json alone, which stays with the experimenter.
analyze.  In: the raters' votes_*.json and key.json. Out: one row per rater, then the summary.

A votes file carries a CRC32 over its votes and a token of its rater. That finds slips, such as a
truncated, mixed up or hand-edited file; it does not stop fraud, as the page holds all it takes.
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
from pathlib import Path

import numpy as np
import scipy
from PIL import Image
from scipy import stats

from models.checkpoint import write_csv
from models.hggt import png_size, read_rgb

PAPER = ("paper (Test-100, SwinIR-AMO+FT against SwinIR-UPos): mean 69.7 %, median 68.0 %, "
         "standard error 4.8 %, 95 % interval [60.2, 79.1], p < 0.01")

# One rater's page; @DATA@ becomes {study, rater, token, pairs: [{id, left, right}]}, the images as
# base64 PNG. The data stand before the program, so that a cut-off file shows its first paragraph.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Which image looks better?</title>
<style>
:root { color-scheme: light dark; --back: #ececec; --text: #1c1c1c; --soft: #5a5a5a;
  --line: #b4b4b4; --button: #fff; --accent: #1a5fb4 }
@media (prefers-color-scheme: dark) { :root { --back: #1b1b1b; --text: #ececec; --soft: #ababab;
  --line: #5c5c5c; --button: #2d2d2d; --accent: #8ab8f0 } }
[hidden] { display: none !important }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.4 system-ui, sans-serif }
main { max-width: 880px; margin: auto; padding: 8px 20px }
header { display: flex; justify-content: space-between; align-items: center; white-space: nowrap }
p { margin: 4px 0 }
progress { display: block; width: 100%; height: 8px; margin: 8px 0; accent-color: var(--accent) }
small, .names { color: var(--soft) }
.names { display: flex; justify-content: space-between; line-height: 24px; font-weight: 600 }
#slider { margin: auto; position: relative; cursor: ew-resize; user-select: none;
  -webkit-user-select: none; touch-action: pan-y pinch-zoom }
#picture { position: relative }
#picture img { position: absolute; width: 100%; height: 100%; -webkit-touch-callout: none }
#left { clip-path: inset(0 calc(100% - var(--x)) 0 0) }
#line { position: absolute; left: var(--x); width: 2px; margin-left: -1px; top: 24px; bottom: 24px;
  background: #fff; box-shadow: 0 0 0 1px #000a }
#rail { height: 48px; background: linear-gradient(var(--line) 0 0) center / 100% 4px no-repeat }
#knob { position: absolute; left: var(--x); bottom: 4px; width: 36px; height: 36px;
  margin-left: -20px; border: 2px solid #fff; border-radius: 50%; background: var(--accent) }
#knob svg { display: block; fill: none; stroke: var(--button); stroke-width: 2.5 }
#choice { display: grid; grid-template-columns: 1fr 1fr; gap: 12px }
button { font: inherit; color: inherit; background: var(--button); border: 2px solid var(--line);
  border-radius: 8px; padding: 4px 10px; cursor: pointer; touch-action: manipulation }
#choice button, #save { min-height: 52px; font-weight: 600; border-color: var(--accent) }
#save { background: var(--accent); color: var(--button); margin: 8px 0 }
button[aria-pressed=true] { box-shadow: 0 0 0 3px var(--accent) }
button[aria-pressed=true]::before { content: "\\2713  " }
button:disabled { opacity: .45; cursor: default }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
kbd { font: .8em monospace; border: 1px solid var(--line); border-radius: 4px; padding: 0 5px }
textarea { width: 100%; height: 8em; box-sizing: border-box; margin-top: 8px }
@media (hover: none) { .keys { display: none } }
</style>
<main>
<p id="broken">This page is incomplete or its script is blocked: please ask for the file again,
and open it in a browser.</p>
<div id="study" hidden>
  <header><button id="back">&larr; Back</button><small id="who"></small><b id="count"></b></header>
  <progress id="bar" value="0" aria-label="progress"></progress>
  <p id="unsaved" hidden><b>This browser keeps no progress: please finish in one sitting, without
  closing or reloading the page.</b></p>
  <section id="vote">
    <p><b>Which image looks better?</b> Two images lie on top of each other: drag the line<span
    class="keys"> (or press <kbd>&larr;</kbd> <kbd>&rarr;</kbd>)</span> to uncover the left or the
    right one. If unsure, go with your first impression.</p>
    <div id="slider">
      <div class="names"><span>left</span><small id="shrunk"></small><span>right</span></div>
      <div id="picture"><img id="right" alt="right image" draggable="false"><img id="left"
        alt="left image" draggable="false"></div>
      <div id="rail"></div><div id="line"></div>
      <div id="knob" role="slider" tabindex="0" aria-label="share of the picture that shows the left
 image" aria-valuemin="0" aria-valuemax="100"><svg viewBox="0 0 36 36"><path
        d="M14 11l-7 7 7 7M22 11l7 7-7 7"/></svg></div>
    </div>
    <div id="choice"><button data-choice="left">Left looks better <kbd class="keys">1</kbd></button
      ><button data-choice="right">Right looks better <kbd class="keys">2</kbd></button></div>
  </section>
  <section id="end" hidden>
    <p>Thank you, that was the last pair. Please save your votes and send the file to the person who
    gave you this page.</p>
    <p><button id="save">Download my votes</button></p>
    <p id="saved" role="status"></p>
    <details><summary>Does the download not work?</summary>Then send this text instead:
    <textarea id="text" readonly aria-label="votes as text"></textarea></details>
  </section>
</div>
</main>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const $ = id => document.getElementById(id);
const { study, rater, token, pairs } = JSON.parse($("data").textContent);
const buttons = [...document.querySelectorAll("[data-choice]")];
const storageKey = `user-study ${study} ${rater}`;
let votes = [];      // {id, choice, ms, zoom} of pairs 0, 1, ..., votes.length - 1
let at = 0;          // index of the pair on show; pairs.length: the end
let x = 50;          // slider: percent of the picture's width that shows the left image
let zoom = 100;      // device pixels per 100 image pixels
let from = null;     // where the finger or mouse went down
let shownAt = null;  // ms since the page's start; null while the images are being decoded

function crc32(text) {  // of ASCII
  let crc = -1;
  for (const c of text) {
    crc ^= c.charCodeAt(0);
    for (let k = 0; k < 8; k++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ((crc ^ -1) >>> 0).toString(16).padStart(8, "0");
}

function votesFile() {
  const lines = votes.map(v => `${v.id} ${v.choice} ${v.ms} ${v.zoom}`);
  const checksum = crc32([study, rater, token, ...lines].join("\\n"));
  return JSON.stringify({ study, rater, finished: true, votes, checksum }, null, 1) + "\\n";
}

function load() {  // storage may be absent, blocked or full; anything unexpected in it is dropped
  try {
    const kept = JSON.parse(localStorage.getItem(storageKey) || "[]");
    if (kept.length <= pairs.length && kept.every((v, i) => v.id === pairs[i].id)) votes = kept;
  } catch { votes = []; }
  keep();
}

function keep() {
  try { localStorage.setItem(storageKey, JSON.stringify(votes)); }
  catch { $("unsaved").hidden = false; }
}

function moveTo(percent) {
  x = Math.min(100, Math.max(0, percent));
  $("slider").style.setProperty("--x", x + "%");
  $("knob").setAttribute("aria-valuenow", Math.round(x));
}

function layout() {  // whole device pixels per image pixel; shrunk only if the window is smaller
  const { naturalWidth: w, naturalHeight: h } = $("left"), ratio = devicePixelRatio;
  if (at === pairs.length || !w) return;
  const others = document.querySelector("main").offsetHeight - $("picture").offsetHeight;
  const fit = height => Math.min($("vote").clientWidth / w, height / h) * ratio;
  const limit = 640 * ratio / Math.max(w, h);  // small images grow up to 640 CSS pixels
  let scale = Math.floor(Math.min(fit(innerHeight - others), limit));
  if (scale < 1) scale = Math.min(1, fit(Math.max(240, innerHeight - 112)));  // 112: rail, buttons
  $("slider").style.width = w * scale / ratio + "px";
  $("picture").style.height = h * scale / ratio + "px";
  for (const id of ["left", "right"]) $(id).style.imageRendering = scale > 1 ? "pixelated" : "auto";
  zoom = Math.max(1, Math.round(scale * 100));
  $("shrunk").textContent = scale < 1 ? `shrunk to ${zoom} %` : "";
}

async function show(index) {
  at = index;
  shownAt = null;
  const end = at === pairs.length;
  $("count").textContent = end ? "finished" : `pair ${at + 1} of ${pairs.length}`;
  $("bar").max = pairs.length;
  $("bar").value = votes.length;
  $("back").disabled = at === 0;
  $("vote").hidden = end;
  $("end").hidden = !end;
  $("saved").textContent = "";
  if (end) { $("text").value = votesFile(); return; }
  for (const b of buttons) {
    b.disabled = true;
    b.setAttribute("aria-pressed", b.dataset.choice === votes[at]?.choice);
  }
  for (const id of ["left", "right"]) $(id).src = "data:image/png;base64," + pairs[at][id];
  await Promise.allSettled([$("left").decode(), $("right").decode()]);
  if (at !== index) return;  // Back was pressed meanwhile
  moveTo(50);
  layout();
  for (const b of buttons) b.disabled = false;
  shownAt = performance.now();
}

function vote(choice) {
  if (shownAt === null) return;
  const ms = Math.round(performance.now() - shownAt);
  if (ms < 300) return;  // the second half of a double click
  votes[at] = { id: pairs[at].id, choice, ms: ms + (votes[at]?.ms || 0), zoom };
  keep();
  show(votes.length);
}

function back() { if (at > 0) show(at - 1); }

function drag(event) {
  const box = $("slider").getBoundingClientRect();
  moveTo(100 * (event.clientX - box.left) / box.width);
}

$("slider").addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  $("slider").setPointerCapture(event.pointerId);
  from = event;
  drag(event);
});
$("slider").addEventListener("pointermove", event => {
  if ($("slider").hasPointerCapture(event.pointerId)) drag(event);
});
$("slider").addEventListener("touchmove", event => {  // a flick would swallow the next tap
  const { clientX, clientY } = event.touches[0];
  const sideways = Math.abs(clientX - from.clientX) > Math.abs(clientY - from.clientY);
  if (sideways && event.touches.length === 1 && event.cancelable) event.preventDefault();
}, { passive: false });
for (const b of buttons) b.addEventListener("click", () => vote(b.dataset.choice));
$("back").addEventListener("click", back);
$("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([votesFile()], { type: "application/json" }));
  link.download = `votes_${study}_${rater}.json`;
  link.click();
  $("saved").textContent = `The file is ${link.download}, where your browser puts downloads.`;
});
addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || at === pairs.length) return;
  const step = event.shiftKey ? 10 : 2;
  if (event.key === "ArrowLeft") moveTo(x - step);
  else if (event.key === "ArrowRight") moveTo(x + step);
  else if (event.key === "Home") moveTo(0);
  else if (event.key === "End") moveTo(100);
  else if (event.key === "1" && !event.repeat) vote("left");
  else if (event.key === "2" && !event.repeat) vote("right");
  else return;
  event.preventDefault();
});
addEventListener("resize", layout);

$("broken").hidden = true;
$("study").hidden = false;
$("who").textContent = `${study} ${rater}`;
load();
show(votes.length);
</script>
</html>
"""


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


def checksum(study: str, rater: str, token: str, votes: list[dict]) -> str:
    """CRC32 of a votes file, eight hex digits; the page's votesFile() computes the same."""
    lines = [f"{v['id']} {v['choice']} {v['ms']} {v['zoom']}" for v in votes]
    return f"{zlib.crc32(chr(10).join([study, rater, token, *lines]).encode()):08x}"


# ------------------------------------------------------------------------- make


def refuse(problems: list[str], shown: int = 20) -> None:
    if problems:
        more = [f"and {len(problems) - shown} more problems"] if len(problems) > shown else []
        raise ValueError("\n".join(problems[:shown] + more))


def find_pairs(folders: list[Path]) -> tuple[list[str], str]:
    """Names of the PNGs that two folders share and a digest of all pixels; refuses unequal sets."""
    found = [{p.name for p in folder.glob("*.png")} for folder in folders]
    refuse([f"{folder}: no PNG files; save them with evaluate.py --save-sr"
            for folder, names in zip(folders, found, strict=True) if not names])
    refuse([f"{folder / name}: missing, but the other folder has it" for folder, mine, other in
            zip(folders, found, found[::-1], strict=True) for name in sorted(other - mine)])
    problems, equal, digest = [], [], hashlib.sha256()
    for name in sorted(found[0]):
        files = [folder / name for folder in folders]
        try:
            sizes = [png_size(file) for file in files]
            images = [read_rgb(file) for file in files]
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if sizes[0] != sizes[1]:
            (h, w), (h_other, w_other) = sizes[1], sizes[0]
            problems.append(f"{files[1]}: {w}x{h}, but {files[0]} is {w_other}x{h_other}")
            continue
        if np.array_equal(*images):
            equal.append(name)
        for image in images:
            digest.update(f"{name} {image.shape} ".encode() + image.tobytes())
    refuse(problems)
    if len(equal) == len(found[0]):
        raise ValueError(f"{folders[1]}: the same images as in {folders[0]}; give two models")
    if equal:
        print(f"user_study.py: warning: {len(equal)} pairs of equal images, the first {equal[0]}",
              file=sys.stderr)
    return sorted(found[0]), digest.hexdigest()


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
        plan[rater] = {
            "token": hashlib.sha256(f"{study} {rater} {digest}".encode()).hexdigest()[:16],
            "pairs": [
                {"id": f"{rater}-{k + 1:02d}", "image": names[image], "left": "a" if left else "b"}
                for k, (image, left) in enumerate(zip(images[i], a_left[i], strict=True))
            ],
        }
    return {"study": study, **settings, "plan": plan}


def encode(file: Path) -> str:
    """An image as base64 PNG, without its metadata, which may name the model."""
    buffer = io.BytesIO()
    Image.fromarray(read_rgb(file)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make(args: argparse.Namespace) -> None:
    # Inputs
    (name_a, folder_a), (name_b, folder_b) = args.a, args.b
    if name_a == name_b:
        raise ValueError(f"--b {name_b}: the name of --a; give the two models different names")
    if args.raters < 1 or args.pairs < 1 or args.seed < 0:
        raise ValueError("--raters and --pairs: at least 1; --seed: at least 0")
    names, digest = find_pairs([Path(folder_a), Path(folder_b)])
    if args.pairs > len(names):
        raise ValueError(f"--pairs {args.pairs}: there are {len(names)} images only, and no rater "
                         "may see one twice")
    if args.raters * args.pairs % len(names):
        step = len(names) // math.gcd(len(names), args.raters)
        raise ValueError(f"--pairs {args.pairs}: {args.raters} raters would not see each of the "
                         f"{len(names)} images equally often; give a multiple of {step}")
    key = make_key(args, names, digest)
    key_text = json.dumps(key, indent=1) + "\n"

    # An existing folder is left as it is
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        old, pages = out / "key.json", [out / f"{rater}.html" for rater in key["plan"]]
        if not old.is_file() or old.read_bytes() != key_text.encode():
            raise ValueError(f"{out}: exists with other content; give a new folder (--out)")
        refuse([f"{page}: missing; delete {out} to make the study anew" for page in pages
                if not page.is_file()])
        print(f"{out}: holds this study already, nothing written")
        return

    # Pages and key, all or nothing
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        encoded = {n: {"a": encode(Path(folder_a, n)), "b": encode(Path(folder_b, n))}
                   for n in names}
        for rater, plan in key["plan"].items():
            data = {"study": key["study"], "rater": rater, "token": plan["token"], "pairs": []}
            for pair in plan["pairs"]:
                image, left = encoded[pair["image"]], pair["left"]
                right = "b" if left == "a" else "a"
                data["pairs"].append({"id": pair["id"], "left": image[left],
                                      "right": image[right]})
            page = PAGE.replace("@DATA@", json.dumps(data))
            (temporary / f"{rater}.html").write_text(page, encoding="utf-8")
        (temporary / "key.json").write_text(key_text, encoding="utf-8")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    views, size = args.raters * args.pairs // len(names), len(page) / 1e6
    print(f"{out}: study {key['study']}, {args.raters} pages of {args.pairs} pairs (about "
          f"{size:.1f} MB each), every one of the {len(names)} images {views} times.\n"
          "Send each rater their raterNN.html alone; keep key.json, which says who is who.")


# ------------------------------------------------------------------------- analyze


def read_json(path: str | Path) -> dict:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or truncated ({error}); get it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}; get the file again")
    return data


def read_key(path: str | Path) -> dict:
    """What `make` wrote; ValueError if it is damaged, or names a file outside of its folder."""
    key = read_json(path)
    try:
        whole = (
            re.fullmatch("[0-9a-f]{8}", key["study"]) and re.fullmatch("[0-9a-f]{64}",
                                                                       key["pixels_sha256"])
            and type(key["raters"]) is int and key["plan"]
            and all(is_model_name(key[m]) for m in "ab")
            and all(re.fullmatch(r"rater\d+", rater) and type(plan["token"]) is str
                    and plan["pairs"] and all(
                        type(pair["id"]) is str and pair["left"] in ("a", "b")
                        and pair["image"] == Path(pair["image"]).name for pair in plan["pairs"])
                    for rater, plan in key["plan"].items())
        )
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not the key.json of a study, or damaged (--key)")
    return key


def read_votes(path: str, key: dict) -> tuple[str, list[dict]]:
    """(rater, votes) of one file; ValueError names the file if it is not whole and of this study.

    Votes are {id, choice "left" or "right", ms on show, zoom in device pixels per 100 pixels}.
    """
    data = read_json(path)
    study, rater, votes = data.get("study"), data.get("rater"), data.get("votes")
    if study != key["study"]:
        raise ValueError(f"{path}: of study {study}, the key is of study {key['study']}")
    if not isinstance(rater, str) or rater not in key["plan"]:
        raise ValueError(f"{path}: rater {rater} is not one of this study's {key['raters']}")
    plan = key["plan"][rater]
    fields = {"id": str, "choice": str, "ms": int, "zoom": int}
    if not isinstance(votes, list) or not all(
        isinstance(v, dict) and {k: type(x) for k, x in v.items()} == fields
        and v["choice"] in ("left", "right") for v in votes
    ):
        raise ValueError(f"{path}: malformed votes; get the file again")
    ids, known = [v["id"] for v in votes], [pair["id"] for pair in plan["pairs"]]
    unknown = [i for i in ids if i not in known]
    if unknown:
        raise ValueError(f"{path}: pair {unknown[0]} is not one of {rater}'s")
    if len(set(ids)) < len(known) or data.get("finished") is not True:
        raise ValueError(f"{path}: unfinished, {len(set(ids))} of {len(known)} pairs; let the "
                         "rater go on")
    if len(ids) > len(known):
        raise ValueError(f"{path}: votes twice on a pair; get the file again")
    if data.get("checksum") != checksum(study, rater, plan["token"], votes):
        raise ValueError(f"{path}: the checksum does not fit, so it was edited; get the file again")
    return rater, votes


def analyze(args: argparse.Namespace) -> None:
    # Inputs: all bad files are listed before anything is counted
    key = read_key(args.key)
    votes, files, problems = {}, {}, []
    for path in args.votes:
        try:
            rater, cast = read_votes(path, key)
            if rater in files:
                raise ValueError(f"{path}: {rater} again, as in {files[rater]}; give one of them")
            votes[rater], files[rater] = cast, path
        except (ValueError, OSError) as error:
            problems.append(str(error))
    refuse(problems, shown=len(problems))
    missing = [rater for rater in key["plan"] if rater not in votes]
    if missing:
        print(f"user_study.py: warning: {len(votes)} of {key['raters']} raters; missing "
              f"{', '.join(missing)}", file=sys.stderr)

    # Preferences: sides are mapped to models by the key alone
    rows, preferences = [], []
    for rater in (r for r in key["plan"] if r in votes):
        side = {pair["id"]: pair["left"] for pair in key["plan"][rater]["pairs"]}
        for_a = sum((v["choice"] == "left") == (side[v["id"]] == "a") for v in votes[rater])
        preferences.append(100 * for_a / len(side))
        rows.append([rater, len(side), for_a, f"{preferences[-1]:.2f}"])
    s = summarise(np.array(preferences))
    every = [v for cast in votes.values() for v in cast]
    lefts = 100 * sum(v["choice"] == "left" for v in every) / len(every)
    shrunk = sum(v["zoom"] < 100 for v in every)

    # Table
    lines = [
        f"study {key['study']}: percent of votes for {key['a']} over {key['b']}, {len(votes)} of "
        f"{key['raters']} raters, {len(every)} votes; sides hidden and balanced",
        "value: percent, but for t and p, one-sided t-test of the raters' mean against 50 %; "
        "standard error: sample deviation over the root of the raters; intervals 95 %",
        f"left chosen in {lefts:.1f} % of the votes, either model; {shrunk} votes on images shrunk "
        "to fit the screen",
        f"images: whole, RGB, 8 bit, as they are; sha256 {key['pixels_sha256'][:12]}",
        f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}",
        PAPER,
    ]
    rows += [[name, "", "", "" if math.isnan(x) else f"{x:.2f}" if name != "p" else f"{x:.4g}"]
             for name, x in s.items()]
    write_csv(args.out, ["rater", "pairs", "for_a", "value"], rows, lines)

    def interval(kind: str) -> str:
        low, high = s[f"{kind}_low"], s[f"{kind}_high"]
        return "undefined" if math.isnan(low) else f"[{low:.1f}, {high:.1f}]"

    print(lines[0])
    for rater, n, for_a, percent in rows[: len(votes)]:
        print(f"  {rater}  {for_a:3d} of {n}  {float(percent):5.1f} %")
    alone = len(votes) == 1
    se = "undefined for one rater" if alone else f"{s['standard_error']:.1f} %"
    test = f"t = {s['t']:.2f}, p = {s['p']:.2g}"
    if math.isnan(s["t"]):
        test = "undefined for one rater" if alone else "undefined, all raters have one preference"
    print(f"mean {s['mean']:.1f} %, median {s['median']:.1f} %, standard error {se}\n"
          f"95 % interval, normal: {interval('normal')}; Student's t: {interval('t')}\n"
          f"mean above 50 %, one-sided t-test: {test}\n{lines[2]}\n{PAPER}")


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
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    commands = parser.add_subparsers(required=True, metavar="make|analyze")
    sub = commands.add_parser("make", help="write the raters' pages and the key", **layout)
    sub.set_defaults(main=make)
    add = sub.add_argument
    add("--a", required=True, type=name_and_folder, metavar="NAME=DIR",
        help="model whose preference is measured, and its PNGs")
    add("--b", required=True, type=name_and_folder, metavar="NAME=DIR",
        help="model that it is compared with, and its PNGs of the same names")
    add("--out", required=True, metavar="DIR", help="study folder to make")
    add("--raters", type=int, default=12, help="raters, each with a page (default: the paper's 12)")
    add("--pairs", type=int, default=25, help="image pairs per rater (default: the paper's 25)")
    add("--seed", type=int, default=0, help="seed of groups, order and sides (default: 0)")
    sub = commands.add_parser("analyze", help="check and count the votes", **layout)
    sub.set_defaults(main=analyze)
    add = sub.add_argument
    add("votes", nargs="+", metavar="FILE", help="votes_*.json of the raters")
    add("--key", required=True, metavar="FILE", help="key.json of the study")
    add("--out", required=True, metavar="FILE", help="table to write (.csv)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()
    try:
        args.main(args)
    except (ValueError, OSError) as error:  # bad input: lines that name file or flag
        if os.environ.get("DEBUG"):
            raise
        for line in str(error).splitlines():
            print(f"user_study.py: {line}", file=sys.stderr)
        sys.exit(2)
