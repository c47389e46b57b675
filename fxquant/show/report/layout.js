// --- layout -----------------------------------------------------------------------------------------------------------
/* Layered drawing of one module at a time: what a module holds are boxes, an edge between two nodes is one between the
   two boxes that hold them, and a folded module is a box like a node. So an unfolded module costs what is in it, and
   nothing else. Values from outside a module enter it as ports in its first row. */
const GAP = { x: 22, y: 30, pad: 14, head: 26 };
const textWidth = (text) => 7.1 * text.length + 22;

/** Edges of every module: pairs of its boxes, found once a graph. `ports`: source node -> boxes that read it. */
function connect(graph) {
  if (graph.connected) return;
  graph.connected = true;
  const chain = new Map();
  const walk = (module, above) => {
    module.edges = new Map();
    module.ports = new Map();
    for (const child of module.children) {
      const path = [...above, child];
      if (child.kind === "node") chain.set(child.node, path);
      else walk(child, path);
    }
  };
  walk(graph.root, []);
  for (const node of graph.nodes) {
    const to = chain.get(node);
    for (const source of node.inputs) {
      const from = chain.get(source);
      let k = 0;
      while (k < from.length && from[k] === to[k]) k++;
      const module = k ? to[k - 1] : graph.root;
      const targets = module.edges.get(from[k]) || module.edges.set(from[k], new Set()).get(from[k]);
      targets.add(to[k]);
      for (let depth = k; depth < to.length - 1; depth++) {
        const { ports } = to[depth];
        (ports.get(source) || ports.set(source, new Set()).get(source)).add(to[depth + 1]);
      }
    }
  }
}

/** Sizes and places of all boxes of an unfolded module, inner ones first. Places are relative to the module. */
function place(module, unfolded) {
  const boxes = module.children.map((item) => boxOf(item, unfolded));
  const byItem = new Map(boxes.map((box) => [box.item, box]));
  const edges = [];
  for (const [from, targets] of module.edges) for (const to of targets) edges.push([byItem.get(from), byItem.get(to)]);
  for (const [source, targets] of module.ports) {
    const port = { item: { kind: "port", node: source, name: source.name, first: source.index }, w: textWidth(source.name) - 10, h: 18, port: true };
    boxes.push(port);
    for (const to of targets) edges.push([port, byItem.get(to)]);
  }
  const forward = edges.filter(([a, b]) => a.item.first < b.item.first);
  const rows = layered(boxes, forward);
  const width = Math.max(...rows.map((row) => row.width), module.parent ? textWidth(module.name) + 10 : 0);
  let y = module.parent ? GAP.head + GAP.pad : GAP.pad;
  for (const row of rows) {
    for (const box of row.boxes) {
      box.x += GAP.pad + (width - row.width) / 2;
      box.y = y + (row.height - box.h) / 2;
    }
    y += row.height + GAP.y;
  }
  return { boxes: boxes.filter((box) => !box.dummy), lines: forward.map((edge) => route(edge)), w: width + 2 * GAP.pad, h: y - GAP.y + GAP.pad };
}

function boxOf(item, unfolded) {
  if (item.kind === "module" && unfolded.has(item.path)) {
    const inside = place(item, unfolded);
    return { item, inside, w: inside.w, h: inside.h };
  }
  const sub = item.kind === "node" ? subtitle(item) : item.layers.length ? plural(item.layers.length, "layer") : plural(item.count, "node");
  return { item, sub, w: Math.max(76, Math.min(300, Math.max(textWidth(item.name) + (item.kind === "module" ? 14 : 0), 6.2 * sub.length + 24))), h: 38 };
}
const subtitle = (item) => (item.node.layer && item.node.layer.spec) || item.node.op.replace(/^aten\./, "");

/** Rows of boxes: each below all that it reads. An edge over several rows takes a place in each of them. */
function layered(boxes, edges) {
  const order = [...boxes].sort((a, b) => a.item.first - b.item.first || (b.port ? 1 : 0) - (a.port ? 1 : 0));
  for (const box of order) Object.assign(box, { rank: 0, above: [], below: [], x: 0 });
  const outgoing = new Map(order.map((box) => [box, []]));
  for (const [a, b] of edges) outgoing.get(a).push(b);
  for (const box of order) for (const to of outgoing.get(box)) to.rank = Math.max(to.rank, box.rank + 1);
  for (const box of order) { // what reads nothing stands right above its first reader
    const readers = outgoing.get(box);
    if (!box.port && box.rank === 0 && readers.length) box.rank = Math.max(0, Math.min(...readers.map((r) => r.rank)) - 1);
  }
  const rows = [];
  const put = (box) => (rows[box.rank] || (rows[box.rank] = [])).push(box);
  order.forEach(put);
  for (const box of order) thread(box, outgoing.get(box), put);
  const filled = rows.filter(Boolean);
  for (let sweep = 0; sweep < 3; sweep++) {
    filled.forEach((row) => sortBy(row, "above"));
    [...filled].reverse().forEach((row) => sortBy(row, "below"));
  }
  filled.forEach((row) => sortBy(row, "above"));
  return spread(filled);
}

/** One chain of dummy boxes from a box down to its furthest reader, which all its readers hang on. */
function thread(box, readers, put) {
  const last = Math.max(0, ...readers.map((r) => r.rank));
  box.chain = [box];
  for (let rank = box.rank + 1; rank < last; rank++) {
    const dummy = { dummy: true, rank, w: 6, h: 6, above: [], below: [], x: 0, item: { first: box.item.first } };
    link(box.chain[box.chain.length - 1], dummy);
    box.chain.push(dummy);
    put(dummy);
  }
  for (const reader of readers) link(box.chain[Math.max(0, reader.rank - 1 - box.rank)], reader);
}
function link(a, b) {
  a.below.push(b);
  b.above.push(a);
}
function sortBy(row, side) {
  row.forEach((box, i) => { box.at = i; });
  const mean = (box) => (box[side].length ? box[side].reduce((sum, other) => sum + other.position, 0) / box[side].length : box.position ?? box.at);
  row.forEach((box) => { box.key = mean(box); });
  row.sort((a, b) => a.key - b.key || a.at - b.at);
  const wide = row.reduce((sum, box) => sum + box.w + GAP.x, 0);
  let x = -wide / 2;
  for (const box of row) {
    box.position = x + box.w / 2;
    x += box.w + GAP.x;
  }
}

/** Places along a row: as near to the middle of what is above as its neighbours allow. */
function spread(rows) {
  let left = Infinity, right = -Infinity;
  for (const row of rows) {
    let edge = -Infinity, drift = 0;
    for (const box of row) {
      const want = (box.above.length ? box.above.reduce((sum, b) => sum + b.x + b.w / 2, 0) / box.above.length : box.position) - box.w / 2;
      box.x = Math.max(want, edge);
      drift += box.x - want;
      edge = box.x + box.w + GAP.x;
    }
    for (const box of row) box.x -= drift / row.length;
    for (const box of row) { left = Math.min(left, box.x); right = Math.max(right, box.x + box.w); }
  }
  for (const row of rows) for (const box of row) box.x -= left;
  return rows.map((boxes) => ({ boxes, width: right - left, height: Math.max(...boxes.map((b) => b.h)) }));
}

/** The points of an edge, through the dummies of its source. */
function route([from, to]) {
  const via = from.chain.slice(1, Math.max(1, to.rank - from.rank));
  return { from, to, via };
}
function pathOf({ from, to, via }) {
  let x = from.x + from.w / 2, y = from.y + from.h;
  let d = `M${x.toFixed(1)} ${y.toFixed(1)}`;
  for (const point of [...via.map((v) => [v.x + v.w / 2, v.y + v.h / 2]), [to.x + to.w / 2, to.y]]) {
    const middle = (y + point[1]) / 2;
    d += `C${x.toFixed(1)} ${middle.toFixed(1)} ${point[0].toFixed(1)} ${middle.toFixed(1)} ${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
    [x, y] = point;
  }
  return d;
}
