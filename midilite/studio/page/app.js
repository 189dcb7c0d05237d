// The frame: tabs, messages, and how the server is asked.
import { openPicture, setUpPicture } from "./objects.js";
import { setUpScenes, showForm } from "./scenes.js";
import { setUpRuns, watchRuns } from "./runs.js";
import { setUpData } from "./data.js";

export const $ = (id) => document.getElementById(id);

export function say(text, bad = false) { $("message").textContent = text; $("message").classList.toggle("bad", bad); }

// The answer of the server; errors are said and thrown. `body` makes it a request that changes something.
export async function ask(path, query = {}, body) {
  const given = Object.entries(query).filter(([, value]) => value != null);
  const plain = body === undefined || body instanceof Blob || ArrayBuffer.isView(body);
  const options = body === undefined ? {} : { method: "POST", headers: { "X-Studio": "1" }, body: plain ? body : JSON.stringify(body) };
  const answer = await fetch(`${path}?${new URLSearchParams(given)}`, options).catch(() => {
    throw fail("the studio does not answer: is it still running?");
  });
  if (!answer.ok) throw fail((await answer.json().catch(() => ({}))).error ?? `error ${answer.status}`);
  return answer.headers.get("Content-Type").startsWith("application/json") ? answer.json() : answer;
}

function fail(text) { say(text, true); return new Error(text); }

export const address = (path, query) => `${path}?${new URLSearchParams(query)}`;
export const fill = (select, values, first) => select.replaceChildren(...(first == null ? [] : [new Option(first, "")]), ...values.map((one) => new Option(one, one)));
export const pause = (ms) => new Promise((done) => setTimeout(done, ms));

const tabs = [...document.querySelectorAll('[role="tab"]')];

export function show(name) {
  for (const tab of tabs) {
    const on = tab.id === `tab-${name}`;
    tab.ariaSelected = String(on); tab.tabIndex = on ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !on;
  }
  history.replaceState(null, "", `#${name}`);  // the hash itself would take the focus from the tab
  watchRuns(name === "runs");
}

tabs.forEach((tab, i) => {
  tab.onclick = () => show(tab.id.slice(4));
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { const next = tabs[(i + step + tabs.length) % tabs.length]; next.focus(); next.click(); }
  };
});

const home = await ask("/api/home");
$("folder").textContent = `of ${home.folder}`;
setUpPicture(home); setUpScenes(home); setUpRuns(); setUpData(home);
showForm();
const wanted = location.hash.slice(1);
show(tabs.some((tab) => tab.id === `tab-${wanted}`) ? wanted : "picture");
const asked = new URLSearchParams(location.search).get("picture");
if (asked) openPicture(asked);
