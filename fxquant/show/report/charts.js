// --- charts -----------------------------------------------------------------------------------------------------------
/** Bars of a histogram `[low, high, counts, below, above, unit]`, over ticks at the values of a grid. Heights are square
    roots of counts, so that tails can be seen. */
function histogramChart(data, { grid = null, label, unit }) {
  const [low, high, counts, below, above] = data;
  const W = 330, H = 84, base = 60, top = Math.max(1, ...counts);
  const x = (value) => ((value - low) / (high - low)) * W;
  const step = W / counts.length;
  const bars = counts.map((count, i) => {
    if (!count) return null;
    const tall = Math.max(1, (base - 6) * Math.sqrt(count / top));
    const from = low + ((high - low) * i) / counts.length;
    return s("rect", { x: (i * step).toFixed(2), y: (base - tall).toFixed(2), width: Math.max(0.6, step - 0.6).toFixed(2), height: tall.toFixed(2), class: "hist" },
      s("title", {}, `${number(from)} to ${number(from + (high - low) / counts.length)}: ${count}`));
  });
  const ticks = (grid || []).filter((v) => v >= low && v <= high).map((v) => `M${x(v).toFixed(2)} ${base + 1}v8`).join("");
  const aside = below || above ? `; ${below} below and ${above} above are not drawn` : "";
  return h("figure", { class: "chart" },
    h("figcaption", {}, label),
    s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${label}: from ${number(low)} to ${number(high)}${aside}` },
      bars,
      s("path", { d: `M0 ${base}H${W}`, class: "axis" }),
      ticks && s("path", { d: ticks, class: "ticks" }),
      s("text", { x: 0, y: H - 2 }, number(low)),
      low < 0 && high > 0 && s("text", { x: x(0), y: H - 2, "text-anchor": "middle" }, "0"),
      s("text", { x: W, y: H - 2, "text-anchor": "end" }, number(high))),
    h("p", { class: "note" }, unit + aside));
}

/** Points `{label, x (bytes), y (error), own}`, the best of them joined: none is smaller and better. */
function scatterChart(points, { width, height, label, onpick }) {
  const L = 56, R = 16, T = 12, B = 34;
  const usable = points.filter((p) => p.x > 0 && p.y > 0);
  if (!usable.length) return h("p", { class: "muted" }, "Nothing to draw.");
  const lx = usable.map((p) => p.x), ly = usable.map((p) => Math.log10(p.y));
  const pad = (a, b, part) => (b > a ? [a - part * (b - a), b + part * (b - a)] : [a - 1, b + 1]);
  const [x0, x1] = pad(Math.min(...lx), Math.max(...lx), 0.06), [y0, y1] = pad(Math.min(...ly), Math.max(...ly), 0.08);
  const px = (v) => L + ((v - x0) / (x1 - x0)) * (width - L - R);
  const py = (v) => T + ((y1 - Math.log10(v)) / (y1 - y0)) * (height - T - B);
  const front = frontOf(usable);
  const labels = labelPlaces(width > 400 ? usable : usable.filter((p) => p.own || front.includes(p)), (p) => [px(p.x), py(p.y)], width);
  const step = niceStep(x1 - x0, 5);
  const xs = [];
  for (let v = Math.ceil(x0 / step) * step; v <= x1; v += step) xs.push(v);
  const ys = [];
  for (let e = Math.floor(y0); e <= Math.ceil(y1); e++) for (const m of [1, 2, 5]) if (Math.log10(m) + e >= y0 && Math.log10(m) + e <= y1) ys.push(m * 10 ** e);
  return s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "scatter" },
    xs.map((v) => [s("path", { d: `M${px(v)} ${T}V${height - B}`, class: "gridline" }), s("text", { x: px(v), y: height - B + 14, "text-anchor": "middle" }, size(v))]),
    ys.map((v) => [s("path", { d: `M${L} ${py(v)}H${width - R}`, class: "gridline" }), s("text", { x: L - 6, y: py(v) + 4, "text-anchor": "end" }, `${+(100 * v).toPrecision(2)} %`)]),
    s("path", { d: front.map((p, i) => `${i ? "L" : "M"}${px(p.x).toFixed(1)} ${py(p.y).toFixed(1)}`).join(""), class: "front" }),
    usable.map((p) => s("g", { class: `point${p.own ? " own" : ""}${front.includes(p) ? " best" : ""}`, onclick: onpick && (() => onpick(p)) },
      s("title", {}, `${p.label}: ${size(p.x)}, error ${percent(p.y)}`),
      p.own ? s("path", { d: star(px(p.x), py(p.y), 9) }) : s("circle", { cx: px(p.x).toFixed(1), cy: py(p.y).toFixed(1), r: 4.5 }),
      labels.has(p) && s("text", labels.get(p), p.label))));
}
/** A place for the label of each point where it covers no other; none where there is no such place. */
function labelPlaces(points, at, width) {
  const taken = points.map((p) => ({ x: at(p)[0] - 5, y: at(p)[1] - 5, w: 10, h: 10, of: p }));
  const found = new Map();
  const order = [...points].sort((a, b) => (b.own ? 1 : 0) - (a.own ? 1 : 0));
  for (const p of order) {
    const [x, y] = at(p), w = 6.6 * p.label.length, h = 13;
    const places = [[x + 9, y - 6], [x + 9, y + 15], [x - 9 - w, y - 6], [x - 9 - w, y + 15], [x - w / 2, y - 12], [x - w / 2, y + 22]];
    const free = places.find(([a, b]) => a > 0 && a + w < width && !taken.some((t) => t.of !== p && a < t.x + t.w && t.x < a + w && b - 11 < t.y + t.h && t.y < b - 11 + h));
    if (!free) continue;
    taken.push({ x: free[0], y: free[1] - 11, w, h });
    found.set(p, { x: free[0].toFixed(1), y: free[1].toFixed(1) });
  }
  return found;
}

/** The points that no other beats in both size and error, by size. */
function frontOf(points) {
  const sorted = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
  const found = [];
  for (const p of sorted) if (!found.length || p.y < found[found.length - 1].y) found.push(p);
  return found;
}
function niceStep(span, count) {
  const unit = 2 ** Math.floor(Math.log2(span / count));
  return [1, 2, 4].map((m) => m * unit).find((v) => span / v <= count) || 4 * unit;
}
function star(x, y, r) {
  const points = Array.from({ length: 10 }, (_, i) => {
    const a = (Math.PI * i) / 5 - Math.PI / 2, k = i % 2 ? 0.45 * r : r;
    return `${(x + k * Math.cos(a)).toFixed(1)} ${(y + k * Math.sin(a)).toFixed(1)}`;
  });
  return `M${points.join("L")}Z`;
}
