// --- trade-offs -------------------------------------------------------------------------------------------------------
function drawTradeoff() {
  const o = DATA.observed, part = $("tradeoff");
  if (!o || !o.totals.length) {
    part.replaceChildren(h("p", { class: "muted" }, "What other formats would cost is seen when a model is compiled; this program was not compiled by fxquant.compile, or nothing in it is quantized."));
    return;
  }
  const rest = DATA.bytes.after - o.nbytes;
  const points = o.totals.map(([label, y, x]) => ({ label, y, x: x + rest }));
  if (o.error !== null) points.push({ label: "this model", x: DATA.bytes.after, y: o.error, own: true });
  const front = frontOf(points);
  part.replaceChildren(
    h("h2", {}, "Size against error"),
    h("p", { class: "muted" }, `All quantized layers in one format, rounded to nearest: the size of the whole model against the expected relative error of a layer's output, root mean square over the layers. From ${o.rows} rows of each weight${o.inputs ? ` and ${o.inputs}` : ""}; methods such as GPTQ get more out of a format. The line joins what nothing beats in both.`),
    h("figure", {}, scatterChart(points, { width: 1000, height: 460, label: "Size of the model against expected output error, a point for each format" })),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Candidates" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Format", "Model size", "Expected output error", ""].map((t, i) => h("th", { scope: "col", class: i === 1 || i === 2 ? "n" : null }, t)))),
      h("tbody", {}, [...points].sort((a, b) => a.x - b.x).map((p) => h("tr", { class: p.own ? "final" : null },
        h("th", { scope: "row" }, p.own ? h("b", {}, p.label) : h("span", { class: "tag" }, p.label)),
        h("td", { class: "n" }, size(p.x)), h("td", { class: "n" }, percent(p.y)), h("td", {}, front.includes(p) ? "nothing is smaller and better" : "")))))));
}
