// Page 3: trainings, while they go and afterwards.
import { element } from "./viewer.js";
import { $, address, ask, pause, say, show } from "./app.js";
import { useAdapter } from "./scenes.js";

const state = { path: null, curves: {}, since: 0, watching: 0 };

export function setUpRuns() {
  for (const [id, wish] of [["savenow", "save"], ["stopnow", "stop"]]) $(id).onclick = async () => {
    await ask("/api/wish", {}, { path: state.path, wish });
    say(wish === "save" ? "asked to save after this step" : "asked to stop after this step; a checkpoint is saved first");
  };
}

// Ask while the page is seen, for the run that is shown every two seconds, for all runs, which the server has to look for,
// every twenty; nothing depends on it.
export async function watchRuns(on) {
  const turn = ++state.watching;
  for (let round = 0; on && turn === state.watching; round++) {
    try {
      if (round % 10 === 0) listRuns(await ask("/api/runs"));
      if (state.path) await look(turn);
    } catch (error) { say(error.message, true); }
    await pause(2000);
  }
}

function listRuns(runs) {
  state.path ??= runs[0]?.name;
  const focused = document.activeElement?.dataset?.run;
  $("runlist").replaceChildren(...(runs.length ? [] : [element("li", { textContent: "no run below the start folder" })]), ...runs.map((run) => {
    const button = element("button", { textContent: run.name, ariaPressed: String(run.name === state.path), onclick: () => { Object.assign(state, { path: run.name, curves: {}, since: 0 }); watchRuns(true); } });
    button.dataset.run = run.name;
    return element("li", {}, button, run.alive ? "running" : "");
  }));
  if (focused) document.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
}

async function look(turn) {
  const path = state.path, now = await ask("/api/run", { path, since: state.since });
  if (turn !== state.watching || path !== state.path) return;
  if (now.step < state.since) return void Object.assign(state, { curves: {}, since: 0 });  // the run was started anew
  for (const [name, points] of Object.entries(now.curves)) (state.curves[name] ??= []).push(...points);
  state.since = now.step;
  $("savenow").disabled = $("stopnow").disabled = !now.alive;
  $("runstate").textContent = `${path}: step ${state.since}${now.alive ? ", running" : ", ended"}${now.checkpoints.length ? `, saved: ${now.checkpoints.join(", ")}` : ""}`;
  $("charts").replaceChildren(...Object.entries(state.curves).map(([name, points]) => chart(name, points)));
  replaceWhenOther($("previews"), now.pictures, (one) => element("img", { src: address("/file", { path: one }), alt: `preview ${one.split("/").at(-1)}`, loading: "lazy" }));
  replaceWhenOther($("made"), now.adapters, (one) => element("li", { title: one.facts }, element("span", {}, one.path.split("/").at(-1), element("br"), element("small", { textContent: one.facts })),
    element("button", { textContent: "use", ariaLabel: `Use ${one.path} on page 2`, onclick: () => { useAdapter(one.path); show("scene"); } })));
}

function replaceWhenOther(host, values, made) {
  const known = JSON.stringify(values);
  if (host.dataset.known !== known) { host.dataset.known = known; host.replaceChildren(...values.map(made)); }
}

// A curve as SVG, with its range and its last value in words.
function chart(name, points) {
  const [steps, values] = [points.map(([step]) => step), points.map(([, value]) => value)];
  const low = Math.min(...values), high = Math.max(...values), first = steps[0], last = steps.at(-1), text = (value) => String(+value.toPrecision(4));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), path = document.createElementNS(svg.namespaceURI, "polyline");
  const place = ([step, value]) => `${300 * (step - first) / (last - first || 1)},${5 + 110 * (high - value) / (high - low || 1)}`;
  for (const [key, value] of [["viewBox", "0 0 300 120"], ["width", 300], ["height", 120], ["role", "img"], ["aria-label", `${name}: from ${text(values[0])} to ${text(values.at(-1))}`]]) svg.setAttribute(key, value);
  path.setAttribute("points", points.length > 1 ? points.map(place).join(" ") : "0,60 300,60");
  svg.append(path);
  return element("div", { className: "chart" }, element("strong", { textContent: `${name} ${text(values.at(-1))}` }), svg, element("div", {}, element("small", { textContent: `${text(low)} to ${text(high)}, steps ${first} to ${last}` })));
}
