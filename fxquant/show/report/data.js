// --- the data ---------------------------------------------------------------------------------------------------------
const DATA = JSON.parse($("data").textContent);
const LAYERS = new Map(DATA.layers.map((layer) => [layer.name, layer]));
const LAYER_OF_NODE = new Map(DATA.layers.map((layer) => [layer.node, layer]));
const seen = (layer) => (DATA.observed && DATA.observed.layers[layer.name]) || null;
const COMPARED_NODES = new Map(Object.values((DATA.comparison && DATA.comparison.layers) || {}).map((row) => [row.node, row]));
const compared = (layer) => (DATA.comparison && DATA.comparison.layers[layer.name]) || null;

/** The lines of the graph after a step, null where the page had no room for them. */
function linesOf(step) {
  const { runs } = DATA.steps[step];
  if (!runs) return null;
  const found = [];
  for (let i = 0; i < runs.length; i += 2) for (let k = 0; k < runs[i + 1]; k++) found.push(DATA.lines[runs[i] + k]);
  return found;
}

/** A line of a graph: `%name : type = target(arguments)  # module path`. */
function parseLine(text) {
  const at = text.lastIndexOf("  # ");
  const path = at < 0 ? "" : text.slice(at + 4);
  const rest = at < 0 ? text : text.slice(0, at);
  if (rest.startsWith("return ")) return { name: "output", op: "output", path, text, type: "", inputs: refs(rest) };
  const match = /^%(\S+?)(?: : (.*?))? = (.*)$/s.exec(rest);
  if (!match) return null;
  const [, name, type, value] = match;
  const call = /^([\w.]+)\((.*)\)$/s.exec(value);
  if (call) return { name, type: type || "", op: call[1], path, text, inputs: refs(call[2]) };
  return { name, type: type || "", op: value === "input" ? "input" : "constant", path, text, constant: value, inputs: [] };
}
const refs = (text) => Array.from(new Set(Array.from(text.matchAll(/%(\w+)/g), (m) => m[1])));

/** The graph after a step: nodes in order, with their users; constants are folded into the nodes that read them. */
const graphs = new Map();
function graphOf(step) {
  if (graphs.has(step)) return graphs.get(step);
  const lines = linesOf(step) || [];
  const all = new Map();
  for (const line of lines) {
    const node = parseLine(line);
    if (node) all.set(node.name, node);
  }
  const nodes = [];
  for (const node of all.values()) {
    node.users = [];
    node.constants = node.inputs.map((name) => all.get(name)).filter((n) => n && n.op === "constant");
    node.inputs = node.inputs.map((name) => all.get(name)).filter((n) => n && n.op !== "constant");
    if (node.op === "constant") continue;
    node.index = nodes.length;
    node.layer = LAYER_OF_NODE.get(node.name) || null;
    nodes.push(node);
  }
  for (const node of nodes) for (const source of node.inputs) source.users.push(node);
  const found = { nodes, root: modulesOf(nodes), byName: new Map(nodes.map((n) => [n.name, n])) };
  graphs.set(step, found);
  return found;
}

/** The tree of modules over nodes. A module with one node and nothing else is shown as that node. */
function modulesOf(nodes) {
  const root = { kind: "module", path: "", name: "model", parent: null, children: [], modules: new Map() };
  for (const node of nodes) {
    let at = root;
    for (const part of node.path ? node.path.split(".") : []) {
      if (!at.modules.has(part)) {
        const path = at.path ? `${at.path}.${part}` : part;
        const child = { kind: "module", path, name: part, parent: at, children: [], modules: new Map() };
        at.modules.set(part, child);
        at.children.push(child);
      }
      at = at.modules.get(part);
    }
    at.children.push({ kind: "node", node, parent: at, name: node.name });
  }
  join(root);
  gather(root);
  sum(root);
  return root;
}
function join(module) {
  module.children = module.children.map((child) => {
    if (child.kind === "node") return child;
    join(child);
    while (child.children.length === 1 && child.children[0].kind === "module") {
      const [only] = child.children;
      only.name = `${child.name}.${only.name}`;
      only.parent = module;
      child = only;
    }
    if (child.children.length > 1) return child;
    const [only] = child.children;
    return { kind: "node", node: only.node, parent: module, name: child.name };
  });
}

const RUN = 6;
/** More than RUN operators in a row that belong to a module itself, beside modules in it, are folded into one. */
function gather(module) {
  module.children.forEach((child) => { if (child.kind === "module") gather(child); });
  if (!module.children.some((child) => child.kind === "module")) return;
  const found = [];
  let run = [];
  const close = () => {
    if (run.length <= RUN) found.push(...run);
    else {
      const path = `${module.path}#${run[0].node.name}`;
      const folded = { kind: "module", path, name: `${run.length} operators`, parent: module, children: run, plain: true };
      run.forEach((child) => { child.parent = folded; });
      found.push(folded);
    }
    run = [];
  };
  for (const child of module.children) {
    if (child.kind === "node" && !child.node.layer && !["input", "output"].includes(child.node.op)) run.push(child);
    else { close(); found.push(child); }
  }
  close();
  module.children = found;
}

/** What a module holds: its layers, their bytes, its worst layer, its first node. */
function sum(item) {
  if (item.kind === "node") {
    item.layers = item.node.layer ? [item.node.layer] : [];
    item.first = item.last = item.node.index;
    item.count = 1;
    return item;
  }
  item.layers = [];
  item.count = 0;
  item.first = Infinity;
  item.last = -1;
  for (const child of item.children) {
    sum(child);
    item.layers.push(...child.layers);
    item.count += child.count;
    item.first = Math.min(item.first, child.first);
    item.last = Math.max(item.last, child.last);
  }
  return item;
}
const bytesOf = (layers, key) => layers.reduce((total, layer) => total + (layer.tied ? 0 : layer[key]), 0);

// --- colours ----------------------------------------------------------------------------------------------------------
const SPECS = Array.from(new Set(DATA.layers.filter((q) => q.spec).map((q) => q.spec)));
const PALETTE = 8; // --c0 to --c7 in the style
const MEASURES = [
  { key: "format", label: "format" },
  { key: "error", label: "weight error", of: (q) => q.error },
  { key: "expected", label: "expected output error", of: (q) => (seen(q) ? seen(q).error : null) },
  { key: "local", label: "output error, alone (compared)", of: (q) => (compared(q) ? compared(q).local : null) },
  { key: "accumulated", label: "output error, in the model (compared)", of: (q) => (compared(q) ? compared(q).accumulated : null) },
  { key: "after", label: "size", of: (q) => q.after, show: size },
].filter((m) => !m.of || DATA.layers.some((q) => q.spec && m.of(q) !== null && m.of(q) !== undefined));
const LEVELS = 6; // --e0 to --e5

function scaleOf(measure) {
  const values = DATA.layers.filter((q) => q.spec || measure.key === "after").map(measure.of).filter((v) => v !== null && v !== undefined && v > 0);
  const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  return { low, high, show: measure.show || percent };
}
function levelOf(value, { low, high }) {
  if (value === null || value === undefined) return null;
  if (!(high > low)) return 0;
  return Math.max(0, Math.min(LEVELS - 1, Math.floor((LEVELS * (value - low)) / (high - low))));
}
/** The colour of layers taken together: their format if it is one, their worst error. */
function colourOf(layers, measure, scale) {
  if (!layers.length) return null;
  if (measure.key === "format") {
    const kinds = new Set(layers.map((q) => q.spec));
    if (kinds.size > 1) return "var(--mixed)";
    const [spec] = kinds;
    return spec ? formatColour(spec) : "var(--float)";
  }
  const values = layers.map(measure.of).filter((v) => v !== null && v !== undefined);
  if (!values.length) return "var(--float)";
  const level = levelOf(measure.key === "after" ? values.reduce((a, b) => a + b, 0) : Math.max(...values), scale);
  return `var(--e${level})`;
}
const formatColour = (spec) => `var(--c${SPECS.indexOf(spec) % PALETTE})`;
