// The slider of report.html and study.html: two images on top of each other and a line between them.
// The page has #slider with #picture (img #left and img #right) and #knob in it. Its CSS clips #left
// at --x and places the line and the knob there.
"use strict";
const $ = id => document.getElementById(id);
let x = 50;             // percent of the picture's width that shows the left image
let pressedAt = null;   // the event of the finger or mouse button that went down last

function moveTo(percent) {
  x = Math.min(100, Math.max(0, percent));
  $("slider").style.setProperty("--x", x + "%");
  $("knob").setAttribute("aria-valuenow", Math.round(x));
}

function percentOfKey(event) {  // where this key moves the line; undefined for any other key
  const step = event.shiftKey ? 10 : 2;
  return { ArrowLeft: x - step, ArrowRight: x + step, Home: 0, End: 100 }[event.key];
}

// Show images of w x h pixels at a whole number of device pixels per image pixel, as many as fit
// into the room. Without room for one, shrink them to its width and shrunkHeight. All room in CSS
// pixels; largest: of the longer side. Returns the device pixels per image pixel.
function resizePicture(w, h, { width, height, shrunkHeight = height, largest }) {
  const ratio = devicePixelRatio, fit = room => Math.min(width / w, room / h) * ratio;
  let scale = Math.floor(Math.min(fit(height), largest * ratio / Math.max(w, h)));
  if (scale < 1) scale = Math.min(1, fit(shrunkHeight));
  $("slider").style.width = w * scale / ratio + "px";
  $("picture").style.height = h * scale / ratio + "px";
  for (const id of ["left", "right"]) $(id).style.imageRendering = scale > 1 ? "pixelated" : "auto";
  return scale;
}

function drag(event) {
  const box = $("slider").getBoundingClientRect();
  moveTo(100 * (event.clientX - box.left) / box.width);
}

$("slider").addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  $("slider").setPointerCapture(event.pointerId);
  pressedAt = event;
  drag(event);
});
$("slider").addEventListener("pointermove", event => {
  if ($("slider").hasPointerCapture(event.pointerId)) drag(event);
});
$("slider").addEventListener("touchmove", event => {  // a flick would swallow the next tap
  const { clientX, clientY } = event.touches[0];
  const sideways = Math.abs(clientX - pressedAt.clientX) > Math.abs(clientY - pressedAt.clientY);
  if (sideways && event.touches.length === 1 && event.cancelable) event.preventDefault();
}, { passive: false });
