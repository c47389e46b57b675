// --- passes: a timeline, and two graphs side by side -------------------------------------------------------------------
function drawTimeline() {
  const longest = Math.max(...DATA.steps.map((step) => step.seconds), 1e-9);
  const largest = Math.max(...DATA.steps.map((step) => step.error || 0), 1e-12);
  $("timeline").replaceChildren(h("ol", {}, DATA.steps.map((step, i) => h("li", { "aria-current": i === changes.to ? "step" : null },
    h("button", { type: "button", onclick: () => showChanges(Math.max(0, i - 1), i) },
      h("b", {}, step.label),
      h("span", { class: "bar", title: seconds(step.seconds) }, h("span", { style: { width: `${(100 * step.seconds) / longest}%` } })),
      h("span", { class: "note" }, `${step.seconds === null ? "" : `${seconds(step.seconds)} · `}${plural(step.rewrites, "rewrite")}${step.declines ? ` · ${plural(step.declines, "decline")}` : ""}`),
      h("span", { class: "bar warm" }, h("span", { style: { width: `${(100 * (step.error || 0)) / largest}%` } })),
      h("span", { class: "note" }, `error ${percent(step.error)}${step.nbytes === null ? "" : ` · ${size(step.nbytes)}`}`))))));
}
const changes = { from: 0, to: 0, words: [] };

function showChanges(from, to) {
  Object.assign(changes, { from, to });
  $("from").value = String(from);
  $("to").value = String(to);
  drawTimeline();
  drawDiff();
}

/** Pairs of lines `[before, after]`; null on one side where a line was added or removed. Lines of a graph are unique, so
    the longest common subsequence is the longest increasing run of places (patience). */
function align(old, now) {
  const place = new Map(old.map((line, i) => [line, i]));
  const shared = now.map((line, i) => [place.get(line), i]).filter(([at]) => at !== undefined);
  const tails = [], previous = [];
  shared.forEach(([at], i) => {
    let low = 0, high = tails.length;
    while (low < high) { const mid = (low + high) >> 1; if (shared[tails[mid]][0] < at) low = mid + 1; else high = mid; }
    previous[i] = low ? tails[low - 1] : -1;
    tails[low] = i;
  });
  const kept = [];
  for (let i = tails.length ? tails[tails.length - 1] : -1; i >= 0; i = previous[i]) kept.push(shared[i]);
  kept.reverse().push([old.length, now.length]);
  const rows = [];
  let a = 0, b = 0;
  for (const [i, j] of kept) {
    rows.push(...pairUp(old.slice(a, i), now.slice(b, j)));
    if (i < old.length) rows.push([old[i], now[j]]);
    a = i + 1;
    b = j + 1;
  }
  return rows;
}
/** Lines between two that stayed: those that define the same node stand side by side. */
function pairUp(removed, added) {
  const name = (line) => line.split(" ", 1)[0];
  const after = new Map(added.map((line, i) => [name(line), i]));
  const rows = [];
  let b = 0;
  for (const line of removed) {
    const at = after.get(name(line));
    if (at === undefined || at < b) { rows.push([line, null]); continue; }
    while (b < at) rows.push([null, added[b++]]);
    rows.push([line, added[b++]]);
  }
  while (b < added.length) rows.push([null, added[b++]]);
  return rows;
}

const CHUNK = 400;
function drawDiff() {
  const [old, now] = [linesOf(changes.from), linesOf(changes.to)], diff = $("diff");
  if (!old || !now) {
    $("changed").textContent = "";
    diff.replaceChildren(h("p", { class: "muted pad" }, "A graph of this size was left out to keep the page small; fxquant inspect --diff prints it."));
    return;
  }
  const rows = align(old, now);
  const [there, here] = [new Set(old), new Set(now)];
  const moved = (row) => (row[0] === null && there.has(row[1])) || (row[1] === null && here.has(row[0]));
  const same = (row) => row[0] === row[1] || moved(row);
  const wanted = (row) => changes.words.every((w) => `${row[0] || ""} ${row[1] || ""}`.toLowerCase().includes(w));
  const [added, removed] = [rows.filter((r) => r[0] !== r[1] && r[1] !== null && !moved(r)).length, rows.filter((r) => r[0] !== r[1] && r[0] !== null && !moved(r)).length];
  $("changed").textContent = added || removed ? `${added} lines added, ${removed} removed` : "the graph did not change";
  const shown = [];
  let skipped = 0;
  const near = new Set();
  rows.forEach((row, i) => { if (!same(row) && wanted(row)) for (let k = i - 2; k <= i + 2; k++) near.add(k); });
  rows.forEach((row, i) => {
    if (moved(row) || !near.has(i) || (changes.words.length && !wanted(row))) { skipped += moved(row) && row[1] === null ? 0 : 1; return; }
    if (skipped) shown.push(skipped);
    skipped = 0;
    shown.push(row);
  });
  if (skipped && shown.length) shown.push(skipped);
  diff.replaceChildren(h("div", { class: "sides head" }, h("div", {}, DATA.steps[changes.from].label), h("div", {}, DATA.steps[changes.to].label)));
  append(diff, shown, 0);
}
function append(diff, shown, at) {
  diff.append(...shown.slice(at, at + CHUNK).map(diffRow));
  if (at + CHUNK < shown.length) {
    const more = h("button", { type: "button", class: "action", onclick: () => { more.remove(); append(diff, shown, at + CHUNK); } }, `Show more of ${shown.length} rows`);
    diff.append(more);
  }
}
function diffRow(row) {
  if (typeof row === "number") return h("div", { class: "sides gap" }, plural(row, "unchanged line"));
  const [before, after] = row;
  if (before === after) return h("div", { class: "sides" }, cell(before, ""), cell(after, ""));
  const [head, tail] = before && after ? sharedEnds(before, after) : [0, 0];
  return h("div", { class: "sides" }, cell(before, "del", head, tail), cell(after, "ins", head, tail));
}
function cell(text, kind, head = 0, tail = 0) {
  if (text === null) return h("div", { class: "none" });
  const name = (parseLine(text) || {}).name;
  const parts = kind && (head || tail) ? [text.slice(0, head), h("b", {}, text.slice(head, text.length - tail)), text.slice(text.length - tail)] : text;
  return h(kind || "div", { title: name ? "Click to see this node in the graph" : null, onclick: name && (() => { if (!getSelection().toString()) selectNode(name, kind === "del" ? changes.from : changes.to); }) }, parts);
}
/** How many characters two lines share at their start and at their end, in whole words. */
function sharedEnds(a, b) {
  const [x, y] = [a, b].map((t) => t.match(/\w+|\s+|./gs) || []);
  const most = Math.min(x.length, y.length);
  let head = 0, tail = 0;
  while (head < most && x[head] === y[head]) head++;
  while (tail < most - head && x[x.length - 1 - tail] === y[y.length - 1 - tail]) tail++;
  return [x.slice(0, head).join("").length, tail ? x.slice(-tail).join("").length : 0];
}
