// Page 4: a folder of samples: pictures with outlines, points that turn, and what the check says.
import { element, newOrbit, View } from "./viewer.js";
import { $, address, ask, fill, say } from "./app.js";

let view = null, colors = [];

export function setUpData(home) {
  colors = home.colors;
  fill($("datasets"), home.data, "choose");
  $("datasets").onchange = () => $("datasets").value && open($("datasets").value);
}

async function open(path) {
  say("reading every sample");
  const { text, samples } = await ask("/api/data", { path });
  $("report").textContent = text;
  $("sheet").replaceChildren(...samples.map(({ name, notes }) => {
    const picture = element("img", { src: address("/api/sample", { path, name, what: "picture" }), alt: "", loading: "lazy" });
    return element("button", { onclick: () => turn(path, name) }, picture, name, ...notes.map((note) => element("div", { className: "bad", textContent: note })));
  }));
  say(`${samples.length} samples; press one to turn its surface points`);
}

async function turn(path, name) {
  const clouds = await ask("/api/sample", { path, name, what: "points" });
  view?.close();
  view = new View($("points"), newOrbit(), `surface points of ${name}`);
  view.showPoints(clouds.map((points, i) => ({ points, color: colors[i % colors.length] })));
}
