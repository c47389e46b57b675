// --- tree -------------------------------------------------------------------------------------------------------------
/** Whether a node or a module is what was searched for: every word in its name, type, format or operator. */
function matches(item, words) {
  const layer = item.kind === "node" && item.node.layer;
  const text = (item.kind === "module" ? item.path : `${item.node.path} ${item.node.name} ${item.node.op} ${layer ? `${layer.name} ${layer.type} ${layer.spec || "float"}` : ""}`).toLowerCase();
  return words.every((word) => text.includes(word));
}
/** The items that match, and what holds them. */
function search(words) {
  const hits = [], kept = new Set();
  const walk = (item) => {
    const hit = matches(item, words);
    if (hit) hits.push(item);
    let inside = false;
    for (const child of item.children || []) inside = walk(child) || inside;
    if (hit || inside) kept.add(item);
    return hit || inside;
  };
  graphOf(state.step).root.children.forEach(walk);
  return { hits, kept };
}

function drawTree() {
  const { root } = graphOf(state.step);
  const found = state.query ? search(state.query) : null;
  state.hits = found ? found.hits : [];
  $("found").textContent = found ? `${plural(found.hits.length, "match").replace("matchs", "matches")}` : "";
  const tree = $("tree");
  tree.replaceChildren(...root.children.filter((c) => !found || found.kept.has(c)).map((c) => row(c, 1, found)));
  if (!root.children.length) tree.append(h("p", { class: "muted pad" }, "The page has no room for this graph; fxquant inspect --diff prints it."));
  const first = tree.querySelector('[aria-selected="true"]') || tree.querySelector('[role="treeitem"]');
  if (first) first.tabIndex = 0;
}
function row(item, level, found) {
  const module = item.kind === "module";
  const open = module && (state.open.has(item.path) || (found && found.kept.has(item)));
  const colour = colourOf(item.layers, state.measure, state.scale);
  const label = module ? (item.layers.length ? size(bytesOf(item.layers, "after")) : "") : (item.node.layer && (item.node.layer.spec || "float")) || "";
  const li = h("div", { role: "treeitem", "aria-level": level, "aria-expanded": module ? String(Boolean(open)) : null, "aria-selected": String(isChosen(item)), tabindex: -1, class: "item" },
    h("div", { class: `row${found && matches(item, state.query) ? " hit" : ""}`, style: { paddingLeft: `${12 * level - 4}px` }, onclick: () => { if (module) toggle(item, li, level, found); select(item, true); } },
      h("span", { class: "twist" }, module ? (open ? "▾" : "▸") : ""),
      h("span", { class: "dot", style: { background: colour || "transparent" } }),
      h("span", { class: `label${item.layers.length ? "" : " faint"}` }, item.name),
      h("span", { class: "side" }, label)));
  li.item = item;
  if (open) li.append(group(item, level, found));
  return li;
}
const group = (item, level, found) => h("div", { role: "group" }, item.children.filter((c) => !found || found.kept.has(c)).map((c) => row(c, level + 1, found)));
const isChosen = (item) => Boolean(state.selected) && (item.kind === "module" ? state.selected.kind === "module" && state.selected.path === item.path : state.selected.node === item.node);

function toggle(item, li, level, found) {
  const open = li.getAttribute("aria-expanded") === "true";
  li.setAttribute("aria-expanded", String(!open));
  li.querySelector(".twist").textContent = open ? "▸" : "▾";
  if (open) { state.open.delete(item.path); li.lastChild.remove(); }
  else { state.open.add(item.path); li.append(group(item, level, found)); }
}
function treeKeys(e) {
  const items = Array.from($("tree").querySelectorAll('[role="treeitem"]'));
  const at = items.indexOf(document.activeElement);
  const now = items[at];
  if (!now) return;
  const { item } = now, level = +now.getAttribute("aria-level"), expanded = now.getAttribute("aria-expanded");
  const go = (to) => { if (to) { items.forEach((i) => { i.tabIndex = -1; }); to.tabIndex = 0; to.focus(); } };
  if (e.key === "ArrowDown") go(items[at + 1]);
  else if (e.key === "ArrowUp") go(items[at - 1]);
  else if (e.key === "Home") go(items[0]);
  else if (e.key === "End") go(items[items.length - 1]);
  else if (e.key === "ArrowRight") { if (expanded === "false") toggle(item, now, level, null); else if (expanded === "true") go(items[at + 1]); }
  else if (e.key === "ArrowLeft") { if (expanded === "true") toggle(item, now, level, null); else go(items.slice(0, at).reverse().find((i) => +i.getAttribute("aria-level") === level - 1)); }
  else if (e.key === "Enter" || e.key === " ") select(item, true);
  else return;
  e.preventDefault();
}

// --- the table of layers ----------------------------------------------------------------------------------------------
const COLUMNS = [
  { key: "name", label: "Layer", text: (q) => q.name },
  { key: "type", label: "Type", text: (q) => q.type },
  { key: "spec", label: "Format", text: (q) => (q.spec || "float") + (q.activation ? `, inputs ${q.activation}` : "") },
  { key: "after", label: "Size", right: true, text: (q) => size(q.after), of: (q) => q.after },
  { key: "error", label: "Weight error", right: true, text: (q) => percent(q.error), of: (q) => q.error ?? -1 },
  { key: "expected", label: "Expected output error", right: true, text: (q) => percent(seen(q) && seen(q).error), of: (q) => (seen(q) ? seen(q).error : -1) },
  { key: "local", label: "Output error, alone", right: true, text: (q) => percent(compared(q) && compared(q).local), of: (q) => (compared(q) ? compared(q).local : -1), only: () => DATA.comparison },
  { key: "accumulated", label: "in the model", right: true, text: (q) => percent(compared(q) && compared(q).accumulated), of: (q) => (compared(q) ? compared(q).accumulated : -1), only: () => DATA.comparison },
  { key: "reason", label: "Why in float", text: (q) => q.reason || "" },
];
const sorting = { key: null, down: false };

function drawTable() {
  const columns = COLUMNS.filter((c) => !c.only || c.only());
  let rows = DATA.layers.filter((q) => !state.query || state.query.every((w) => `${q.name} ${q.type} ${q.spec || "float"}`.toLowerCase().includes(w)));
  const by = columns.find((c) => c.key === sorting.key);
  if (by) rows = [...rows].sort((a, b) => (by.of ? by.of(a) - by.of(b) : by.text(a).localeCompare(by.text(b), undefined, { numeric: true })));
  if (sorting.down) rows.reverse();
  $("layers").replaceChildren(h("table", {},
    h("thead", {}, h("tr", {}, columns.map((c) => h("th", { scope: "col", class: c.right && "n", "aria-sort": sorting.key === c.key ? (sorting.down ? "descending" : "ascending") : null },
      h("button", { type: "button", onclick: () => { sorting.down = sorting.key === c.key ? !sorting.down : Boolean(c.of); sorting.key = c.key; drawTable(); } }, c.label))))),
    h("tbody", {}, rows.map((q) => h("tr", { class: `${q.spec ? "" : "float"}${state.selected && state.selected.layers.includes(q) && state.selected.kind === "node" ? " chosen" : ""}`, onclick: () => selectLayer(q) },
      columns.map((c) => (c.key === "name" ? h("th", { scope: "row" }, h("button", { type: "button", class: "link", onclick: () => selectLayer(q) }, h("code", {}, q.name))) : h("td", { class: c.right && "n" }, c.text(q)))))))));
  if (state.query) $("found").textContent = `${rows.length} of ${plural(DATA.layers.length, "layer")}`;
}
