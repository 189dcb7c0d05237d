// Page 1: a picture and its objects. A pixel belongs to what was painted by hand there, else to what the server found.
import { element } from "./viewer.js";
import { $, ask, fill, say, show } from "./app.js";
import { usePicture } from "./scenes.js";

const NONE = 255, MOST_UNDONE = 30;
const state = { picture: null, width: 0, height: 0, objects: [], chosen: -1, tool: "object", zoom: 1, left: 0, top: 0, undo: [], points: [], asked: 0 };
let home, canvas, pen, bitmap, overlay;

export function setUpPicture(about) {
  home = about; canvas = $("canvas"); pen = canvas.getContext("2d"); overlay = document.createElement("canvas");
  fill($("known"), home.pictures, "choose");
  $("known").onchange = () => $("known").value && openPicture($("known").value);
  $("file").onchange = () => $("file").files[0] && bring($("file").files[0]);
  const board = $("board");
  board.ondragover = (event) => { event.preventDefault(); board.classList.add("over"); };
  board.ondragleave = () => board.classList.remove("over");
  board.ondrop = (event) => { event.preventDefault(); board.classList.remove("over"); if (event.dataTransfer.files[0]) bring(event.dataTransfer.files[0]); };
  document.querySelectorAll("[data-tool]").forEach((button) => { button.onclick = () => choose(button.dataset.tool); });
  $("undo").onclick = undo; $("opacity").oninput = draw;
  $("zoom").oninput = () => zoomTo(+$("zoom").value, canvas.width / 2, canvas.height / 2);
  $("empty").onclick = () => { remember(); add(); refresh(); choose("brush"); };
  $("open").onclick = loadMask; $("savemask").onclick = saveMask; $("make").onclick = make;
  new ResizeObserver(draw).observe(board);
  listen();
}

// Bring a file to size here, where the browser can read it; HEIC and the like are sent as they are.
async function bring(file) {
  say(`reading ${file.name}`);
  let body = file;
  try {
    const whole = await createImageBitmap(file), scale = Math.min(1, home.longest / Math.max(whole.width, whole.height));
    const small = element("canvas", { width: Math.round(whole.width * scale), height: Math.round(whole.height * scale) });
    const context = small.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(whole, 0, 0, small.width, small.height);
    body = await new Promise((done) => small.toBlob(done, "image/png"));
  } catch { say(`${file.name} is read by the server`); }
  openPicture((await ask("/api/picture", { name: file.name }, body)).picture);
}

export async function openPicture(path) {
  bitmap = await createImageBitmap(await (await ask("/file", { path })).blob());
  Object.assign(state, { picture: path, width: bitmap.width, height: bitmap.height, objects: [], chosen: -1, undo: [], points: [], zoom: 1, left: 0, top: 0 });
  state.asked++;
  overlay.width = state.width; overlay.height = state.height;
  state.found = new Uint8Array(state.width * state.height); state.painted = state.found.slice().fill(NONE);
  $("hint").hidden = true; $("zoom").value = 1;
  refresh();
  say("getting to know the picture");
  const { mask } = await ask("/api/look", { path });
  state.mask = mask;
  say(mask ? "click on each object, or load the mask beside the picture" : "click on each object");
}

async function loadMask() {
  if (!state.picture) return say("choose a picture first", true);
  const path = state.mask ?? prompt("The mask's path, below the start folder");
  if (!path) return;
  const answer = await ask("/api/mask", { picture: state.picture, path });
  remember();
  const labels = new Uint8Array(await answer.arrayBuffer());
  state.objects = []; state.found.fill(0);
  JSON.parse(decodeURIComponent(answer.headers.get("X-Names"))).forEach((name) => add(name));
  state.painted = labels.map((label) => label || NONE);
  refresh();
}

const labels = () => state.painted.map((hand, i) => (hand === NONE ? state.found[i] : hand));

async function saveMask() {
  if (!state.picture) return say("choose a picture first", true);
  const names = JSON.stringify(state.objects.map((one) => one.name));
  state.mask = (await ask("/api/mask", { picture: state.picture, names }, labels())).mask;
  say(`saved as ${state.mask}`);
  return state.mask;
}

async function make() {
  const mask = await saveMask();
  if (mask) { usePicture(state.picture, mask); show("scene"); $("wish").requestSubmit(); }
}

// ---- objects

function add(name) {
  state.objects.push({ name: name ?? `object ${state.objects.length + 1}`, inside: [], outside: [] });
  state.chosen = state.objects.length - 1;
}

function remove(index) {
  remember();
  state.objects.splice(index, 1);
  const less = (label) => (label === NONE || label <= index ? label : label === index + 1 ? 0 : label - 1);
  state.found = state.found.map(less);
  state.painted = state.painted.map((label) => (label === index + 1 ? NONE : less(label)));
  state.chosen = Math.min(state.chosen, state.objects.length - 1);
  refresh(); find();
}

function remember() {
  const { objects, chosen, found, painted } = state;
  state.undo.push({ objects: structuredClone(objects), chosen, found: found.slice(), painted: painted.slice() });
  if (state.undo.length > MOST_UNDONE) state.undo.shift();
}

function undo() {
  if (!state.undo.length) return;
  state.asked++;  // an answer that is on its way belongs to what is undone
  Object.assign(state, state.undo.pop());
  refresh();
}

// Ask for all objects anew; of answers that overtake each other the last one counts.
async function find() {
  if (!state.objects.some((one) => one.inside.length)) return;
  const turn = ++state.asked, { picture, objects } = state;
  canvas.ariaBusy = "true";
  try {
    const answer = await ask("/api/objects", {}, { picture, objects: objects.map(({ inside, outside }) => ({ inside, outside })) });
    const found = new Uint8Array(await answer.arrayBuffer());
    if (turn === state.asked) { state.found = found; refresh(); say(`${objects.length} object${objects.length > 1 ? "s" : ""} marked`); }
  } finally { if (turn === state.asked) canvas.ariaBusy = "false"; }
}

function refresh() {
  $("objects").replaceChildren(...state.objects.map((one, i) => {
    const name = element("input", { type: "text", value: one.name, ariaLabel: `Name of object ${i + 1}`, oninput: () => { one.name = name.value; } });
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = home.colors[i];
    const row = element("li", { className: i === state.chosen ? "marked" : "" }, swatch, name,
      element("button", { textContent: "edit", ariaPressed: String(i === state.chosen), ariaLabel: `Edit ${one.name}`, onclick: () => { state.chosen = i; if (state.tool === "object") choose("inside"); refresh(); } }),
      element("button", { textContent: "×", ariaLabel: `Delete ${one.name}`, onclick: () => remove(i) }));
    return row;
  }));
  $("undo").disabled = !state.undo.length;
  paint(); draw();
}

// ---- drawing

function paint() {
  if (!state.picture) return;
  const image = new ImageData(state.width, state.height), colors = home.colors.map((text) => parseInt(text.slice(1), 16));
  const words = new Uint32Array(image.data.buffer), all = labels();
  for (let i = 0; i < all.length; i++) {
    if (!all[i]) continue;
    const color = colors[all[i] - 1];
    words[i] = 0xff000000 | (color & 255) << 16 | color & 0xff00 | color >> 16;
  }
  overlay.getContext("2d").putImageData(image, 0, 0);
}

const fit = () => Math.min(canvas.width / state.width, canvas.height / state.height) * state.zoom;
const origin = () => ({ x: (canvas.width - state.width * fit()) / 2 + state.left, y: (canvas.height - state.height * fit()) / 2 + state.top });

function draw() {
  const { clientWidth, clientHeight } = $("board");
  if (!clientWidth || !pen) return;
  canvas.width = clientWidth; canvas.height = clientHeight;
  if (!bitmap) return;
  const { x, y } = origin(), scale = fit();
  pen.setTransform(scale, 0, 0, scale, x, y);
  pen.drawImage(bitmap, 0, 0);
  pen.globalAlpha = +$("opacity").value; pen.drawImage(overlay, 0, 0); pen.globalAlpha = 1;
  state.objects.forEach((one, i) => {
    for (const [strokes, color] of [[one.inside, home.colors[i]], [one.outside, "#000000"]]) strokes.forEach((stroke) => line(stroke, color, scale));
  });
  if (state.points.length) line(state.tool === "box" ? corners(state.points) : state.points, "#ffffff", scale);
}

function line(points, color, scale) {
  pen.lineWidth = 3 / scale; pen.strokeStyle = color; pen.fillStyle = color;
  pen.beginPath();
  points.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.stroke();
  for (const [radius, fill] of [[6, "#ffffff"], [4, color]]) { pen.beginPath(); pen.fillStyle = fill; pen.arc(...points[0], radius / scale, 0, 7); pen.fill(); }
}

const corners = (points) => { const [a, b] = [points[0], points.at(-1)]; return [a, [b[0], a[1]], b, [a[0], b[1]], a]; };

// Paint a shape by hand into the chosen object, or the eraser's nothing.
function fillShape(draws) {
  const shape = new OffscreenCanvas(state.width, state.height).getContext("2d");
  draws(shape);
  const inked = shape.getImageData(0, 0, state.width, state.height).data, label = state.tool === "eraser" ? 0 : state.chosen + 1;
  for (let i = 0; i < state.painted.length; i++) if (inked[4 * i + 3] > 127) state.painted[i] = label;
  refresh();
}

function fillPolygon(points) {
  fillShape((shape) => { shape.beginPath(); points.forEach(([x, y]) => shape.lineTo(x, y)); shape.fill(); });
}

function fillLine(points) {
  fillShape((shape) => {
    Object.assign(shape, { lineWidth: +$("brush").value, lineCap: "round", lineJoin: "round" });
    shape.beginPath(); shape.moveTo(...points[0]); [points[0], ...points].forEach(([x, y]) => shape.lineTo(x, y)); shape.stroke();
  });
}

// ---- the pointer and keys

function choose(tool) {
  state.tool = tool; state.points = [];
  document.querySelectorAll("[data-tool]").forEach((button) => { button.ariaPressed = String(button.dataset.tool === tool); });
  canvas.style.cursor = tool === "move" ? "grab" : "crosshair";
  draw();
}

function zoomTo(zoom, x, y) {
  const before = fit(), old = origin(), spot = [(x - old.x) / before, (y - old.y) / before];
  state.zoom = Math.max(1, Math.min(8, zoom));
  if (state.zoom === 1) state.left = state.top = 0;
  else { const now = origin(), scale = fit(); state.left += x - (now.x + spot[0] * scale); state.top += y - (now.y + spot[1] * scale); }
  $("zoom").value = state.zoom;
  draw();
}

function finish() {
  const { tool, points } = state;
  state.points = [];
  if (!points.length) return;
  remember();
  if (tool === "object" || (state.chosen < 0 && tool !== "eraser")) add();
  if (tool === "object" || tool === "inside") state.objects[state.chosen].inside.push(points);
  else if (tool === "outside") state.objects[state.chosen].outside.push(points);
  else if (tool === "polygon") return fillPolygon(points);
  else if (tool === "box") return fillPolygon(corners(points));
  else return fillLine(points);
  refresh(); find();
}

function listen() {
  const place = (event) => {
    const frame = canvas.getBoundingClientRect(), { x, y } = origin(), scale = fit();
    const clamp = (value, most) => Math.round(10 * Math.max(0, Math.min(most - 1, value))) / 10;
    return [clamp((event.clientX - frame.left - x) / scale, state.width), clamp((event.clientY - frame.top - y) / scale, state.height)];
  };
  let down = null;
  canvas.onpointerdown = (event) => {
    if (!state.picture) return;
    canvas.setPointerCapture(event.pointerId);
    down = { x: event.clientX, y: event.clientY };
    if (state.tool === "polygon") state.points.push(place(event));
    else if (state.tool !== "move" && event.button === 0) state.points = [place(event)];
    draw();
  };
  canvas.onpointermove = (event) => {
    if (!down) return;
    if (state.tool === "move" || event.buttons > 1) {
      state.left += event.clientX - down.x; state.top += event.clientY - down.y;
      down = { x: event.clientX, y: event.clientY };
    } else if (state.tool !== "polygon" && state.points.length) {
      const now = place(event), last = state.points.at(-1);
      if (Math.hypot(now[0] - last[0], now[1] - last[1]) * fit() > 4) state.points.push(now);
    }
    draw();
  };
  canvas.onpointerup = () => { down = null; if (state.tool !== "polygon" && state.tool !== "move") finish(); };
  canvas.ondblclick = () => state.tool === "polygon" && finish();
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); const frame = canvas.getBoundingClientRect(); zoomTo(state.zoom * Math.exp(-event.deltaY / 500), event.clientX - frame.left, event.clientY - frame.top); }, { passive: false });
  canvas.oncontextmenu = (event) => event.preventDefault();
  const tools = { o: "object", a: "inside", r: "outside", b: "brush", e: "eraser", p: "polygon", x: "box", m: "move" };
  document.addEventListener("keydown", (event) => {
    if ($("picture").hidden || event.target.matches("input[type=text], input[type=number], select")) return;
    if ((event.ctrlKey || event.metaKey) && event.key === "z") { event.preventDefault(); undo(); }
    else if (event.key === "Enter" && state.tool === "polygon") finish();
    else if (event.key === "Escape") { state.points = []; draw(); }
    else if (tools[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) choose(tools[event.key]);
  });
}
