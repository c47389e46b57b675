// --- graph ------------------------------------------------------------------------------------------------------------
const camera = { x: 0, y: 0, k: 1 };

function drawGraph() {
  const graph = graphOf(state.step);
  connect(graph);
  const drawn = place(graph.root, state.unfolded);
  const svg = $("graph");
  svg.replaceChildren(s("defs", {}, s("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, s("path", { d: "M0 0L8 4L0 8Z" }))),
    s("g", { id: "world" }, drawModule(drawn)));
  svg.drawn = drawn;
  applyCamera();
}

function drawModule({ boxes, lines }) {
  const marks = marksOf();
  return [
    lines.map((line) => s("path", { d: pathOf(line), class: `edge${touches(line) ? " lit" : ""}`, "marker-end": "url(#arrow)" })),
    boxes.map((box) => drawBox(box, marks)),
  ];
}
const selectedNode = () => (state.selected && state.selected.kind === "node" ? state.selected.node : null);
const touches = ({ from, to }) => {
  const node = selectedNode();
  return node && (from.item.node === node || to.item.node === node);
};

function drawBox(box, marks) {
  const { item } = box;
  const at = `translate(${box.x.toFixed(1)} ${box.y.toFixed(1)})`;
  if (box.port) {
    return s("g", { transform: at, class: "box port", onclick: () => select({ kind: "node", node: item.node, name: item.node.name, layers: [] }) },
      s("rect", { width: box.w, height: box.h, rx: 9 }), s("text", { x: box.w / 2, y: 13, "text-anchor": "middle" }, item.name));
  }
  const chosen = state.selected && (item.kind === "node" ? state.selected.node === item.node : state.selected.path === item.path && state.selected.kind === "module");
  const hit = state.query && matches(item, state.query);
  const name = `box ${item.kind}${box.inside ? " open" : ""}${chosen ? " chosen" : ""}${hit ? " hit" : ""}`;
  if (box.inside) {
    return s("g", { transform: at, class: name },
      s("rect", { width: box.w, height: box.h, rx: 8, onclick: (e) => { e.stopPropagation(); select(item); } }),
      s("g", { class: "title", onclick: (e) => { e.stopPropagation(); fold(item); } }, s("rect", { width: box.w, height: GAP.head, rx: 8 }), s("text", { x: 12, y: 18 }, `▾ ${item.name}`)),
      drawModule(box.inside));
  }
  const colour = colourOf(item.layers, state.measure, state.scale);
  const mark = item.kind === "node" ? marks.get(item.node.name) : null;
  return s("g", { transform: at, class: `${name}${mark ? ` ${mark}` : ""}`, "data-path": item.kind === "module" ? item.path : null, "data-node": item.kind === "node" ? item.node.name : null,
    onclick: (e) => { e.stopPropagation(); select(item); }, ondblclick: item.kind === "module" ? () => fold(item) : null },
    s("title", {}, item.kind === "node" ? item.node.text : `${item.path}: ${plural(item.count, "node")}, ${plural(item.layers.length, "layer")}`),
    s("rect", { width: box.w, height: box.h, rx: 6 }),
    colour && s("rect", { class: "stripe", width: 7, height: box.h, rx: 3, style: { fill: colour } }),
    s("text", { x: 14, y: 16 }, clip(item.kind === "module" ? `▸ ${item.name}` : item.name, box.w, 7.1)),
    s("text", { x: 14, y: 31, class: "sub" }, clip(box.sub, box.w, 6.2)),
    item.kind === "module" && s("g", { class: "unfold", onclick: (e) => { e.stopPropagation(); fold(item); } }, s("rect", { width: 26, height: box.h }), s("title", {}, "Unfold")));
}
const clip = (text, width, each) => (each * text.length + 16 > width ? `${text.slice(0, Math.max(3, Math.floor((width - 22) / each)))}…` : text);

/** What the step changed, by node: `added` or `changed` against the step before. */
function marksOf() {
  const graph = graphOf(state.step);
  if (graph.marks) return graph.marks;
  graph.marks = new Map();
  const before = state.step > 0 ? linesOf(state.step - 1) : null;
  if (before) {
    const old = new Map(before.map(parseLine).filter(Boolean).map((n) => [n.name, n.text]));
    for (const node of graph.nodes) if (old.get(node.name) !== node.text) graph.marks.set(node.name, old.has(node.name) ? "changed" : "added");
  }
  return graph.marks;
}

// --- moving about -----------------------------------------------------------------------------------------------------
function applyCamera() {
  const world = $("world");
  if (world) world.setAttribute("transform", `translate(${camera.x} ${camera.y}) scale(${camera.k})`);
}
function zoom(factor, x, y) {
  const box = $("graph").getBoundingClientRect();
  const [cx, cy] = x === undefined ? [box.width / 2, box.height / 2] : [x - box.left, y - box.top];
  const k = Math.max(0.05, Math.min(3, camera.k * factor));
  camera.x = cx - ((cx - camera.x) * k) / camera.k;
  camera.y = cy - ((cy - camera.y) * k) / camera.k;
  camera.k = k;
  applyCamera();
}
function fit() {
  const svg = $("graph"), box = svg.getBoundingClientRect(), { w, h: tall } = svg.drawn;
  camera.k = Math.max(0.05, Math.min(1, box.width / (w + 20), box.height / (tall + 20)));
  if (camera.k < 0.35) camera.k = Math.min(1, box.width / (w + 20)); // a tall graph is read from its top
  camera.k = Math.max(0.25, camera.k);
  camera.x = (box.width - w * camera.k) / 2;
  camera.y = Math.max(10, (box.height - tall * camera.k) / 2);
  applyCamera();
}
/** Bring a box into the middle of the view. */
function center(test) {
  const find = (drawn, x, y) => {
    for (const box of drawn.boxes) {
      if (test(box.item) && !box.port) return [x + box.x + box.w / 2, y + box.y + Math.min(box.h, 200) / 2];
      const inner = box.inside && find(box.inside, x + box.x, y + box.y);
      if (inner) return inner;
    }
    return null;
  };
  const found = find($("graph").drawn, 0, 0);
  if (!found) return;
  const box = $("graph").getBoundingClientRect();
  camera.k = Math.max(camera.k, 0.6);
  camera.x = box.width / 2 - found[0] * camera.k;
  camera.y = box.height / 2 - found[1] * camera.k;
  applyCamera();
}
function fold(module) {
  if (state.unfolded.has(module.path)) state.unfolded.delete(module.path);
  else state.unfolded.add(module.path);
  drawGraph();
  if (state.unfolded.has(module.path)) center((item) => item === module);
}
function moveAbout() {
  const svg = $("graph");
  let last = null;
  svg.addEventListener("wheel", (e) => { e.preventDefault(); zoom(Math.exp(-e.deltaY * 0.0015), e.clientX, e.clientY); }, { passive: false });
  svg.addEventListener("pointerdown", (e) => { last = [e.clientX, e.clientY]; });
  svg.addEventListener("pointermove", (e) => {
    if (!last || !(e.buttons & 1)) return;
    camera.x += e.clientX - last[0];
    camera.y += e.clientY - last[1];
    last = [e.clientX, e.clientY];
    applyCamera();
  });
  addEventListener("pointerup", () => { last = null; });
  svg.addEventListener("keydown", (e) => {
    const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    if (moves[e.key]) { camera.x += moves[e.key][0]; camera.y += moves[e.key][1]; applyCamera(); }
    else if (e.key === "+" || e.key === "=") zoom(1.25);
    else if (e.key === "-") zoom(0.8);
    else if (e.key === "0") fit();
    else return;
    e.preventDefault();
  });
  $("zoom").addEventListener("click", (e) => {
    const what = e.target.dataset.zoom;
    if (what === "in") zoom(1.25);
    else if (what === "out") zoom(0.8);
    else if (what === "fit") fit();
    else if (what === "fold") { state.unfolded.clear(); drawGraph(); fit(); }
  });
}
