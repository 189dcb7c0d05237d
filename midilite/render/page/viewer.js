// Scenes that turn in a page: the studio's, and in one file with everything it needs the scene.html of infer.py.
// three.js is the global THREE (render/scene_page.py says where it comes from and what is used of it).

// Where the camera is; views that share one turn together.
export const newOrbit = () => ({ yaw: 0.5, pitch: 0.25, distance: 0, target: new THREE.Vector3(), views: new Set() });

const POINT = 0.012;  // the size of a point of a surface

// One canvas: GLB files or points in it, and what may be done with its objects.
export class View {
  constructor(host, orbit, label) {
    this.host = host; this.orbit = orbit; this.objects = new Map(); this.content = null;
    this.state = { hidden: new Set(), marked: null, wireframe: false, grid: true };
    this.renderer = new THREE.WebGLRenderer({ antialias: true });
    this.renderer.outputEncoding = THREE.sRGBEncoding;  // colours in a GLB are linear light
    this.renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
    this.canvas = this.renderer.domElement;
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", `${label}: arrow keys turn, plus and minus zoom, 0 shows all`);
    this.scene = new THREE.Scene();
    this.scene.background = new THREE.Color(0xf4f5f7);
    this.camera = new THREE.PerspectiveCamera(40, 1, 0.01, 100);
    this.headlight = new THREE.DirectionalLight(0xffffff, 0.35);
    const key = new THREE.DirectionalLight(0xffffff, 0.45);
    key.position.set(0.45, 1, 0.6);
    this.scene.add(new THREE.AmbientLight(0xffffff, 0.5), this.headlight, this.headlight.target, key);
    host.append(this.canvas);
    orbit.views.add(this);
    listen(this);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(host);
  }

  // Show a GLB (ArrayBuffer); resolves to [{name, color}] of its objects.
  async show(glb) {
    const { scene } = await new Promise((done, failed) => new THREE.GLTFLoader().parse(glb, "", done, failed));
    this.put(scene);
    scene.traverse((part) => {
      if (!part.isMesh) return;
      this.objects.set(part.name, part);
      part.material.side = THREE.DoubleSide;
    });
    this.draw();
    const css = (mesh) => "#" + mesh.material.color.clone().convertLinearToSRGB().getHexString();
    return [...this.objects].map(([name, mesh]) => ({ name, color: css(mesh) }));
  }

  // Show clouds of points, [{name, color, points: [x, y, z, ...]}]; returns them.
  showPoints(clouds) {
    const group = new THREE.Group(), found = new Map();
    for (const { name, color, points } of clouds) {
      const shape = new THREE.BufferGeometry();
      shape.setAttribute("position", new THREE.Float32BufferAttribute(points, 3));
      const paint = new THREE.Color(color).convertSRGBToLinear();
      const part = new THREE.Points(shape, new THREE.PointsMaterial({ size: POINT, color: paint }));
      found.set(name, Object.assign(part, { name }));
      group.add(part);
    }
    this.put(group);
    this.objects = found;
    this.draw();
    return clouds;
  }

  put(content) {
    this.clear();
    this.content = content;
    this.scene.add(content);
    this.box = new THREE.Box3().setFromObject(content);
    if (this.box.isEmpty()) this.box.set(new THREE.Vector3(-1, -1, -1), new THREE.Vector3(1, 1, 1));  // no surface at all
    const size = this.box.getSize(new THREE.Vector3()).length() || 1;
    this.grid = new THREE.GridHelper(2 * size, 20, 0x8a8f98, 0xd0d3d8);
    this.grid.position.y = this.box.min.y - 0.002 * size;
    this.scene.add(this.grid);
    if (!this.orbit.distance) this.frame();
  }

  clear() {
    for (const part of [this.content, this.grid]) {
      part?.traverse((one) => { one.geometry?.dispose(); one.material?.dispose?.(); });
      if (part) this.scene.remove(part);
    }
    this.objects.clear(); this.content = this.grid = null;
  }

  // The camera where all is seen.
  frame() {
    const sphere = this.box.getBoundingSphere(new THREE.Sphere());
    Object.assign(this.orbit, { distance: 0.95 * (sphere.radius || 1) / Math.sin(Math.PI / 9), yaw: 0.5, pitch: 0.25 });
    this.orbit.target.copy(sphere.center);
    drawAll(this.orbit);
  }

  // Change {hidden: Set of names, marked: a name, wireframe, grid}.
  set(change) {
    Object.assign(this.state, change);
    const { hidden, marked, wireframe, grid } = this.state;
    for (const [name, mesh] of this.objects) {
      mesh.visible = !hidden.has(name);
      mesh.material.wireframe = wireframe;
      mesh.material.emissive?.copy(mesh.material.color).multiplyScalar(name === marked ? 0.6 : 0);
      if (mesh.isPoints) mesh.material.size = name === marked ? 2 * POINT : POINT;
    }
    if (this.grid) this.grid.visible = grid;
    this.draw();
  }

  draw() {
    this.due ??= requestAnimationFrame(() => { this.due = undefined; this.drawNow(); });
  }

  drawNow() {
    const { clientWidth: width, clientHeight: height } = this.host;
    if (!width || !height) return;
    const { yaw, pitch, distance, target } = this.orbit;
    const size = this.renderer.getSize(new THREE.Vector2());
    if (size.x !== width || size.y !== height) this.renderer.setSize(width, height);
    this.camera.aspect = width / height;
    this.camera.fov = width < height ? 40 * height / width : 40;
    this.camera.near = distance / 100; this.camera.far = distance * 20;
    this.camera.position.setFromSphericalCoords(distance || 1, Math.PI / 2 - pitch, yaw).add(target);
    this.camera.lookAt(target);
    this.camera.updateProjectionMatrix();
    this.headlight.position.copy(this.camera.position);
    this.headlight.target.position.copy(target);
    this.renderer.render(this.scene, this.camera);
  }

  // The name of the object at a place of the canvas, or undefined.
  pick(event) {
    const frame = this.canvas.getBoundingClientRect();
    const at = new THREE.Vector2((event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height);
    const ray = new THREE.Raycaster();
    ray.params.Points.threshold = POINT;
    ray.setFromCamera({ x: 2 * at.x - 1, y: 1 - 2 * at.y }, this.camera);
    return ray.intersectObjects([...this.objects.values()].filter((mesh) => mesh.visible))[0]?.object.name;
  }

  screenshot() {
    this.drawNow();  // in the same turn: what was drawn is kept no longer
    return new Promise((done) => this.canvas.toBlob(done, "image/png"));
  }

  close() {
    this.observer.disconnect(); this.orbit.views.delete(this); this.clear(); this.renderer.dispose();
    this.renderer.forceContextLoss(); this.canvas.remove();
  }
}

const drawAll = (orbit) => orbit.views.forEach((view) => view.draw());

function turn(orbit, dx, dy) {
  orbit.yaw -= dx;
  orbit.pitch = Math.max(-1.55, Math.min(1.55, orbit.pitch + dy));
  drawAll(orbit);
}

function zoom(orbit, factor) { orbit.distance *= factor; drawAll(orbit); }

function pan(view, dx, dy) {
  const scale = view.orbit.distance / view.host.clientHeight * 0.73;
  const right = new THREE.Vector3().setFromMatrixColumn(view.camera.matrix, 0);
  const up = new THREE.Vector3().setFromMatrixColumn(view.camera.matrix, 1);
  view.orbit.target.addScaledVector(right, -dx * scale).addScaledVector(up, dy * scale);
  drawAll(view.orbit);
}

// One finger or the left button turns, two fingers or another button move and zoom, a press without a way picks.
function listen(view) {
  const { canvas, orbit } = view, down = new Map();
  const spread = () => { const [a, b] = [...down.values()]; return Math.hypot(a.x - b.x, a.y - b.y) || 1; };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    down.set(event.pointerId, { x: event.clientX, y: event.clientY, way: 0 });
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = down.get(event.pointerId);
    if (!last) return;
    const dx = event.clientX - last.x, dy = event.clientY - last.y, before = down.size > 1 ? spread() : 0;
    Object.assign(last, { x: event.clientX, y: event.clientY, way: last.way + Math.abs(dx) + Math.abs(dy) });
    if (down.size > 1) { zoom(orbit, before / spread()); pan(view, dx / 2, dy / 2); }
    else if (event.buttons > 1 || event.shiftKey) pan(view, dx, dy);
    else turn(orbit, dx * 0.008, dy * 0.008);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => {
    if (end === "pointerup" && down.get(event.pointerId)?.way < 4) view.onpick?.(view.pick(event));
    down.delete(event.pointerId);
  });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(orbit, Math.exp(event.deltaY / 800)); }, { passive: false });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  const keys = {
    ArrowLeft: () => turn(orbit, 0.12, 0), ArrowRight: () => turn(orbit, -0.12, 0), ArrowUp: () => turn(orbit, 0, 0.12),
    ArrowDown: () => turn(orbit, 0, -0.12), "+": () => zoom(orbit, 0.85), "-": () => zoom(orbit, 1.18), 0: () => view.frame(),
  };
  canvas.addEventListener("keydown", (event) => { if (keys[event.key]) { event.preventDefault(); keys[event.key](); } });
}

export const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

export const save = (blob, name) => {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// Scenes side by side with one camera, one list of objects and buttons: [{title, and one of glb, clouds, picture}] ->
// {views, mark(name), close()}.
export async function stage(host, scenes, onmark = () => {}) {
  const orbit = newOrbit(), hidden = new Set(), looks = { wireframe: false, grid: true };
  const panes = element("div", { className: "panes" }), list = element("ul", { className: "objects" });
  const bar = element("div", { className: "bar", role: "toolbar", ariaLabel: "How the scene is shown" });
  host.replaceChildren(panes, element("div", { className: "side" }, bar, list));
  const views = [], found = new Map();
  for (const { title, glb, clouds, picture } of scenes) {
    const pane = picture ? element("img", { src: picture, alt: title }) : element("div", { className: "canvas" });
    panes.append(element("figure", {}, element("figcaption", { textContent: title }), pane));
    if (picture) continue;
    const view = Object.assign(new View(pane, orbit, title), { title });
    views.push(view);
    for (const { name, color } of await (glb ? view.show(glb) : view.showPoints(clouds))) found.set(name, color);
    view.onpick = (name) => mark(name ?? null);
  }
  const all = (change) => views.forEach((view) => view.set(change));
  const rows = new Map();
  function mark(name, tell = true) {
    all({ marked: name });
    rows.forEach((row, own) => row.classList.toggle("marked", own === name));
    if (tell) onmark(name);
  }
  function hide(names) {
    hidden.clear(); names.forEach((name) => hidden.add(name));
    rows.forEach((row, name) => { row.querySelector("input").checked = !hidden.has(name); });
    all({ hidden });
  }
  for (const [name, color] of found) {
    const box = element("input", { type: "checkbox", checked: true, onchange: () => hide([...found.keys()].filter((one) => one === name ? !box.checked : hidden.has(one))) });
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = color;
    const others = [...found.keys()].filter((one) => one !== name);
    const alone = element("button", { type: "button", textContent: "only", ariaLabel: `Show only ${name}`, onclick: () => hide(hidden.size === others.length && !hidden.has(name) ? [] : others) });
    const row = element("li", { onmouseenter: () => mark(name), onmouseleave: () => mark(null) }, element("label", {}, box, swatch, name), alone);
    row.addEventListener("focusin", () => mark(name));
    rows.set(name, row);
    list.append(row);
  }
  const toggle = (text, key) => {
    const button = element("button", { type: "button", textContent: text, ariaPressed: String(looks[key]) });
    button.onclick = () => { looks[key] = !looks[key]; button.ariaPressed = String(looks[key]); all(looks); };
    return button;
  };
  const shot = async () => { for (const view of views) save(await view.screenshot(), `${view.title}.png`); };
  const press = (text, onclick) => element("button", { type: "button", textContent: text, onclick });
  bar.append(toggle("Wireframe", "wireframe"), toggle("Floor", "grid"), press("Whole scene", () => views[0].frame()), press("Show all", () => hide([])), press("Screenshot", shot));
  return { views, mark: (name) => mark(name, false), close: () => views.forEach((view) => view.close()) };
}

// What scene.html does: what it shows stands in it (render/scene_page.py).
export function start() {
  const read = {
    "model/gltf-binary": (text) => ({ glb: Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer }),
    "application/json": (text) => ({ clouds: JSON.parse(text) }),
    "image/png": (text) => ({ picture: `data:image/png;base64,${text}` }),
  };
  const scenes = [...document.querySelectorAll("script[data-title]")];
  return stage(document.getElementById("stage"), scenes.map((one) => ({ title: one.dataset.title, ...read[one.type](one.textContent) })));
}
