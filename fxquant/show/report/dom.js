// --- elements ---------------------------------------------------------------------------------------------------------
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** An element; text becomes text nodes, so no name in the data is ever read as markup. */
function make(ns, tag, props, children) {
  const found = ns ? document.createElementNS(ns, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(found.style, value);
    else found.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) found.append(child);
  return found;
}
const h = (tag, props, ...children) => make(null, tag, props, children);
const s = (tag, props, ...children) => make(SVG, tag, props, children);

// --- figures, as the command line writes them -------------------------------------------------------------------------
function size(bytes) {
  let value = bytes;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (value < 1024 || unit === "TiB") return unit === "B" ? `${Math.floor(value)} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1024;
  }
}
function percent(fraction) {
  if (fraction === null || fraction === undefined) return "–";
  const value = 100 * fraction;
  return value === 0 ? "0 %" : value >= 0.01 ? `${value.toFixed(2)} %` : `${value.toExponential(1)} %`;
}
function seconds(value) {
  if (value === null) return "–";
  if (value >= 60) return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
  return value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`;
}
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const number = (x) => Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(1) : String(+x.toPrecision(3));
