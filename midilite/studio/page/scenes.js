// Page 2: what scene is wanted, how far it is, and results that turn, one or two with one camera.
import { element, save, stage } from "./viewer.js";
import { $, ask, fill, pause, say } from "./app.js";

const state = { picture: null, mask: null, adapters: [], results: [], shown: [], stage: null, job: null, labels: null };
let home;

export function setUpScenes(about) {
  home = about; state.results = home.results;
  fill($("model"), home.models);
  fill($("adapter"), home.adapters, "choose");
  $("adapter").onchange = () => { useAdapter($("adapter").value); $("adapter").value = ""; };
  $("wish").onsubmit = (event) => { event.preventDefault(); make().catch((error) => say(error.message, true)); };
  $("cancel").onclick = () => state.job && ask("/api/cancel", {}, { job: state.job });
  $("get").onclick = fetchFile;
  listResults();
}

export function showForm() {
  if (state.picture) $("chosen").textContent = `Of ${state.picture}`;
  $("adapters").replaceChildren(...state.adapters.map((one, i) => {
    const scale = element("input", { type: "number", step: "0.05", min: -10, max: 10, value: one.scale, ariaLabel: `Strength of ${one.path}`, onchange: () => { one.scale = +scale.value; } });
    return element("li", {}, element("label", { title: one.path }, one.path.split("/").slice(-2).join("/"), scale),
      element("button", { type: "button", textContent: "×", ariaLabel: `Without ${one.path}`, onclick: () => { state.adapters.splice(i, 1); showForm(); } }));
  }));
}

export function usePicture(picture, mask) { Object.assign(state, { picture, mask }); showForm(); }

export function useAdapter(path) {
  if (path && !state.adapters.some((one) => one.path === path)) state.adapters.push({ path, scale: 1 });
  showForm();
}

// One or two scenes, made one after the other and shown side by side.
async function make() {
  if (!state.picture) return say("mark the objects of a picture first", true);
  const number = (id) => ($(id).value === "" ? null : +$(id).value), { picture, mask, adapters } = state;
  const wish = { picture, mask, model: $("model").value, fast: $("fast").checked, layout: $("layout").checked, adapters, steps: number("steps"), guidance: number("guidance"), seed: number("seed"), depth: number("depth") };
  const others = {
    base: { ...wish, adapters: [] }, seed: { ...wish, seed: (wish.seed ?? 42) + 1 },
    half: { ...wish, adapters: adapters.map((one) => ({ ...one, scale: one.scale / 2 })) },
  };
  const wishes = [others[$("beside").value], wish].filter(Boolean);
  const jobs = [];
  for (const one of wishes) jobs.push((await ask("/api/job", {}, one)).job);
  const made = [];
  for (const job of jobs) made.push(await follow(job));
  state.results = await ask("/api/results");
  state.shown = made.filter(Boolean);
  if (state.shown.length) await present();
  listResults();
}

// Show how far a job is until it has ended; its result's name, or undefined.
async function follow(job) {
  state.job = job;
  $("progress").hidden = false;
  try {
    for (;;) {
      const now = await ask("/api/job", { job });
      $("bar").value = now.total ? now.done / now.total : 0;
      $("doing").textContent = now.total ? `${now.doing}: ${now.done} of ${now.total}` : now.doing;
      if (now.state === "done") { say(now.notes.join("; ") || "done"); return now.result; }
      if (now.state === "failed") return void say(now.doing, true);
      if (now.state === "cancelled") return void say("cancelled");
      await pause(250);
    }
  } finally { state.job = null; $("progress").hidden = true; }
}

const title = (one) => {
  const adapters = one.adapters.map((each) => `${each.path.split("/").slice(-2).join("/")} ${each.scale}`).join(", ");
  return [one.picture.split("/").at(-1).replace(/\.\w+$/, ""), one.model.split("/").at(-1), adapters || "no adapter", `seed ${one.seed ?? 42}`, one.fast ? "fast" : "", one.layout ? "layout fitted" : ""].filter(Boolean).join(" · ");
};

async function present() {
  const chosen = state.shown.map((name) => state.results.find((one) => one.name === name)).filter(Boolean);
  const scenes = [];
  for (const one of chosen) scenes.push({ title: title(one), glb: await (await ask("/api/download", { path: one.name })).arrayBuffer() });
  state.stage?.close();
  state.stage = await stage($("stage"), scenes, (name) => drawThumb(name));
  const first = chosen[0];
  state.names = first.labels.map((label) => (first.labels.some((each) => each >= 65536) ? `instance_${first.labels.indexOf(label) + 1}` : `instance_${label}`));
  fill($("part"), state.names, "the whole scene");
  $("shown").hidden = false;
  const [rgb, seg] = [`${first.name}/rgb.png`, `${first.name}/seg.png`];
  state.image = await createImageBitmap(await (await ask("/file", { path: rgb })).blob());
  state.labels = new Uint8Array(await (await ask("/api/mask", { picture: rgb, path: seg })).arrayBuffer());
  drawThumb(null);
}

// The picture; with a name, all but that object is pale. A click in it marks the object there.
function drawThumb(name) {
  const canvas = $("thumb"), { image, labels } = state, index = state.names.indexOf(name) + 1;
  canvas.width = image.width; canvas.height = image.height;
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  if (index) {
    const data = pen.getImageData(0, 0, image.width, image.height);
    for (let i = 0; i < labels.length; i++) if (labels[i] !== index) data.data[4 * i + 3] = 60;
    pen.putImageData(data, 0, 0);
  }
  canvas.onclick = (event) => {
    const scale = image.width / canvas.clientWidth, at = Math.floor(event.offsetY * scale) * image.width + Math.floor(event.offsetX * scale);
    const found = state.names[labels[at] - 1] ?? null;
    state.stage.mark(found); drawThumb(found);
  };
}

function listResults() {
  $("results").replaceChildren(...state.results.map((one) => {
    const box = element("input", { type: "checkbox", checked: state.shown.includes(one.name) });
    box.onchange = async () => {
      state.shown = [...state.shown.filter((name) => name !== one.name), ...(box.checked ? [one.name] : [])].slice(-2);
      if (state.shown.length) await present();
      listResults();
    };
    const again = element("button", { type: "button", textContent: "use", title: "its picture and settings", ariaLabel: `Use the settings of ${title(one)}`, onclick: () => reuse(one) });
    return element("li", {}, element("label", { title: `${one.made}, ${one.seconds} s` }, box, title(one)), again);
  }));
}

function reuse(one) {
  for (const id of ["steps", "guidance", "seed", "depth"]) $(id).value = one[id] ?? "";
  $("model").value = one.model; $("fast").checked = one.fast; $("layout").checked = one.layout;
  state.adapters = structuredClone(one.adapters);
  usePicture(one.picture, one.mask);
}

async function fetchFile() {
  const path = state.shown[0], object = $("part").value || null, format = $("format").value;
  const answer = await ask("/api/download", { path, object, format });
  save(await answer.blob(), `${object ?? "scene"}${format}`);
}
