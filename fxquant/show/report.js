"use strict";
document.documentElement.classList.add("js");
const table = document.getElementById("table");
const rows = Array.from(table.tBodies);
const filter = document.getElementById("filter");
const state = document.getElementById("state");
const count = document.getElementById("count");

function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const d = row.dataset;
    const text = `${d.name} ${d.type} ${d.spec || "float"}`.toLowerCase();
    row.hidden = !(words.every((w) => text.includes(w)) && (!state.value || d.state === state.value));
    if (!row.hidden) shown += 1;
  }
  count.textContent = shown === rows.length ? `${rows.length} layers` : `${shown} of ${rows.length} layers`;
}

function sort(button) {
  const head = button.closest("th");
  const key = button.dataset.key;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const number = !["name", "type", "spec"].includes(key);
  const order = (a, b) => number ? a.dataset[key] - b.dataset[key]
    : a.dataset[key].localeCompare(b.dataset[key], undefined, { numeric: true });
  rows.sort((a, b) => down ? order(b, a) : order(a, b));
  table.append(...rows);
}

function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}

table.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.key) return sort(button);
  const open = button.closest("tbody").classList.toggle("shown");
  button.setAttribute("aria-expanded", String(open));
});
filter.addEventListener("input", show);
state.addEventListener("change", show);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("controls").hidden = false;
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    filter.focus();
  }
});
addEventListener("hashchange", reveal);
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#step-"]');
  if (link) document.getElementById(link.hash.slice(1)).open = true;
});
reveal();
show();
