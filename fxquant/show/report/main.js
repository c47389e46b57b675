// --- state ------------------------------------------------------------------------------------------------------------
const LAST = DATA.steps.length - 1;
const state = { step: LAST, open: new Set(), unfolded: new Set(), selected: null, query: null, hits: [], measure: MEASURES[0], scale: null, view: "graph", drawn: new Set() };

function itemOf(test, item = graphOf(state.step).root) {
  if (item.parent !== undefined && item.parent !== null && test(item)) return item;
  for (const child of item.children || []) {
    const found = itemOf(test, child);
    if (found) return found;
  }
  return null;
}
/** Choose a module or a node: it is shown in the tree, in the graph, and in detail. */
function select(item, reveal = false) {
  state.selected = item;
  if (reveal) unfoldTo(item);
  drawGraph();
  if (reveal && state.view === "graph") center((other) => other === item || (item.node && other.node === item.node));
  openTo(item);
  drawTree();
  const row = $("tree").querySelector('[aria-selected="true"] > .row');
  if (row) row.scrollIntoView({ block: "nearest" });
  if (state.view === "table") drawTable();
  drawDetail();
  const name = item.kind === "module" ? item.path : item.node.layer ? item.node.layer.name : item.node.name;
  history.replaceState(null, "", `#model/${encodeURIComponent(name)}`);
}
const parents = (item) => { const found = []; for (let at = item.parent; at && at.parent; at = at.parent) found.push(at); return found; };
const unfoldTo = (item) => parents(item).forEach((module) => state.unfolded.add(module.path));
const openTo = (item) => parents(item).forEach((module) => state.open.add(module.path));

function selectLayer(layer) {
  if (state.step !== LAST) setStep(LAST);
  selectNode(layer.node);
}
function selectNode(name, step = state.step) {
  show("model");
  if (step !== state.step) setStep(step);
  const item = itemOf((i) => i.kind === "node" && i.node.name === name);
  if (item) select(item, true);
}
function setStep(step) {
  state.step = step;
  $("step").value = String(step);
  state.selected = null;
  drawModel();
}

// --- the model --------------------------------------------------------------------------------------------------------
function drawModel() {
  state.scale = state.measure.of ? scaleOf(state.measure) : null;
  drawLegend();
  drawTree();
  if (state.view === "table") drawTable();
  drawGraph();
  drawDetail();
}
function drawLegend() {
  const { measure, scale } = state;
  const swatch = (colour, text) => h("span", { class: "swatch" }, h("span", { class: "dot", style: { background: colour } }), text);
  const marks = state.step > 0 && marksOf().size ? [h("span", { class: "swatch added" }, "new"), h("span", { class: "swatch changed" }, "changed")] : [];
  if (measure.key === "format") $("legend").replaceChildren(...SPECS.slice(0, PALETTE).map((spec) => swatch(formatColour(spec), spec)), swatch("var(--float)", "float"), ...marks);
  else $("legend").replaceChildren(swatch("var(--e0)", scale.show(scale.low)), ...Array.from({ length: LEVELS - 2 }, (_, i) => swatch(`var(--e${i + 1})`, "")), swatch(`var(--e${LEVELS - 1})`, scale.show(scale.high)), ...marks);
}
function showView(view) {
  state.view = view;
  $("view-graph").setAttribute("aria-pressed", String(view === "graph"));
  $("view-table").setAttribute("aria-pressed", String(view === "table"));
  $("graph").toggleAttribute("hidden", view !== "graph");
  $("layers").hidden = view !== "table";
  $("zoom").hidden = view !== "graph";
  if (view === "table") drawTable();
}
let waiting = 0;
function onSearch() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    state.query = words.length ? words : null;
    drawTree();
    drawGraph();
    if (state.view === "table") drawTable();
  }, 60);
}

// --- parts of the page ------------------------------------------------------------------------------------------------
const PARTS = {
  overview: () => {},
  model: () => { drawModel(); fit(); },
  passes: () => showChanges(Math.max(0, LAST - 1), LAST),
  tradeoff: drawTradeoff,
};
function show(part) {
  for (const name of Object.keys(PARTS)) $(name).hidden = name !== part;
  for (const link of $("tabs").children) link.setAttribute("aria-current", link.hash === `#${part}` ? "page" : "false");
  document.body.dataset.part = part;
  if (state.drawn.has(part) || (LAST < 0 && part !== "tradeoff")) return;
  state.drawn.add(part);
  PARTS[part]();
}
function follow() {
  const [part, rest] = decodeURIComponent(location.hash.slice(1)).split(/\/(.*)/s);
  show(part in PARTS ? part : "overview");
  if (rest === undefined || LAST < 0) return;
  if (part === "passes" && DATA.steps[+rest]) showChanges(Math.max(0, +rest - 1), +rest);
  if (part !== "model") return;
  const item = itemOf((i) => (i.kind === "module" ? i.path === rest : i.node.name === rest || (i.node.layer && i.node.layer.name === rest)));
  if (item && item !== state.selected) select(item, true);
}

function start() {
  const steps = () => DATA.steps.map((step, i) => h("option", { value: i, disabled: !step.runs }, step.label));
  $("colour").append(...MEASURES.map((m, i) => h("option", { value: i }, m.label)));
  for (const id of ["step", "from", "to"]) $(id).append(...steps());
  $("step").value = String(LAST);
  const first = LAST >= 0 ? graphOf(LAST).root.children.filter((c) => c.kind === "module") : [];
  for (const module of first) if (module.count > 40 || first.length === 1) { state.open.add(module.path); state.unfolded.add(module.path); }
  $("search").addEventListener("input", onSearch);
  $("search").addEventListener("keydown", (e) => {
    if (e.key === "Enter" && state.hits.length) {
      const at = state.hits.indexOf(state.selected);
      select(state.hits[(at + 1) % state.hits.length], true);
    }
  });
  $("colour").addEventListener("change", (e) => { state.measure = MEASURES[+e.target.value]; drawModel(); });
  $("step").addEventListener("change", (e) => setStep(+e.target.value));
  $("view-graph").addEventListener("click", () => showView("graph"));
  $("view-table").addEventListener("click", () => showView("table"));
  for (const id of ["from", "to"]) $(id).addEventListener("change", () => showChanges(+$("from").value, +$("to").value));
  $("lines").addEventListener("input", (e) => { changes.words = e.target.value.toLowerCase().split(/\s+/).filter(Boolean); drawDiff(); });
  $("tree").addEventListener("keydown", treeKeys);
  moveAbout();
  document.addEventListener("keydown", (e) => {
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName) || e.ctrlKey || e.metaKey || e.altKey) return;
    const part = Object.keys(PARTS)[+e.key - 1];
    if (part) location.hash = part;
    else if (e.key === "/") { e.preventDefault(); show("model"); $("search").focus(); }
  });
  addEventListener("hashchange", follow);
  document.documentElement.classList.add("js");
  follow();
}
start();
