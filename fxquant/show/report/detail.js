// --- details ----------------------------------------------------------------------------------------------------------
function drawDetail() {
  const { selected } = state, detail = $("detail");
  detail.scrollTop = 0;
  if (!selected) {
    detail.replaceChildren(h("div", { class: "pad" }, h("h3", {}, "Choose a layer"), h("p", { class: "muted" }, "Click a box or a row. Double-click a module, or click its triangle, to unfold it."),
      h("h4", {}, "Worst layers"), worst(DATA.layers)));
    return;
  }
  const alone = selected.kind === "module" && selected.layers.length === 1 && selected.layers[0].name === selected.path;
  const layer = alone ? selected.layers[0] : selected.kind === "node" ? selected.node.layer : null;
  const body = layer ? layerDetail(layer) : selected.kind === "module" ? moduleDetail(selected) : [];
  detail.replaceChildren(h("div", { class: "pad" }, heading(selected, layer), body, selected.kind === "node" && nodeDetail(selected.node)));
}
function heading(selected, layer) {
  const path = selected.kind === "module" ? selected.path : layer ? layer.name : selected.node.path || selected.node.name;
  const kind = DATA.modules[selected.kind === "module" ? selected.path : selected.node.path] || "";
  return [h("h3", {}, path), h("p", { class: "muted" }, layer ? `${layer.type}${layer.module ? ` (${layer.module})` : ""}` : kind || (selected.node ? selected.node.op : "module"))];
}
const fact = (name, value, title) => value !== null && value !== undefined && value !== "" && [h("dt", { title }, name), h("dd", {}, value)];
const chip = (spec) => h("span", { class: "tag", title: DATA.specs[spec] && DATA.specs[spec].words }, h("span", { class: "dot", style: { background: SPECS.includes(spec) ? formatColour(spec) : "var(--float)" } }), spec);
const layerLink = (layer, ...more) => h("li", {}, h("button", { type: "button", class: "link", onclick: () => selectLayer(layer) }, h("code", {}, layer.name)), ...more);

function layerDetail(q) {
  const o = seen(q), c = compared(q), spec = q.spec && DATA.specs[q.spec];
  return [
    h("dl", {},
      fact("weight", q.spec ? [chip(q.spec), h("span", { class: "muted" }, ` ${spec.words}`)] : `float, ${q.bits} bits`),
      fact("why in float", q.spec ? null : q.reason),
      fact("inputs", q.activation && [chip(q.activation), h("span", { class: "muted" }, ` ${DATA.specs[q.activation].words}`)]),
      fact("method", q.method),
      fact("shape", q.shape.join(" × ")),
      fact("size", q.spec ? `${size(q.before)} → ${size(q.after)}` : size(q.after)),
      fact("weight error", q.error === null ? null : percent(q.error), "‖W′ − W‖ / ‖W‖"),
      fact("output error", o && o.error !== null ? `${percent(o.error)} expected` : null, "of W′x against Wx, if the columns of x did not correlate; from sampled rows"),
      c && [fact("alone", c.alone), fact("in the model", c.inside)],
      fact("tied to", q.tied), fact("part of", q.part), fact("source", q.source)),
    o && o.weight && histogramChart(o.weight, { grid: spec && spec.grid, label: "Weight on the grid of its format", unit: "float weights divided by their scale; ticks: the format's values" }),
    inputChart(q, c && c.input, "the inputs compared on"),
    !(c && c.input) && inputChart(q, o && o.input, o && DATA.observed.inputs),
    o && o.scale && histogramChart(o.scale, { label: "Scales", unit: "binary logarithm of the scales" }),
    o && o.candidates.length > 0 && [h("h4", {}, "Other formats for this layer"), scatterChart([...o.candidates.map(([label, y, x]) => ({ label, y, x })), { label: q.spec, x: q.after, y: o.error, own: true }], { width: 340, height: 220, label: "Size against expected output error" }), h("p", { class: "note" }, "size against expected output error, rounded to nearest; the star is this model")],
    h("h4", {}, "What each pass did"),
    q.story === null ? h("p", { class: "muted" }, `Left out to keep this page small; fxquant explain OUT ${q.name} tells it.`) : h("pre", { class: "story", tabindex: 0 }, q.story.split("\n").map(storyLine)),
  ];
}
function inputChart(q, data, where) {
  if (!data) return null;
  const scaled = data[5] === "scale";
  return histogramChart(data, { grid: scaled && q.activation ? DATA.specs[q.activation].grid : null, label: "Input", unit: scaled ? `divided by its scale, on ${where}; ticks: the format's values` : `values on ${where}` });
}
function storyLine(text) {
  const kind = text.startsWith("    ") ? text[4] : " ";
  return h(kind === "+" ? "ins" : kind === "-" ? "del" : "span", {}, text || " ");
}

function moduleDetail(module) {
  const { layers } = module, quantized = layers.filter((q) => q.spec);
  return [
    h("dl", {},
      fact("holds", `${plural(module.count, "node")}, ${plural(layers.length, "layer")}, ${quantized.length} quantized`),
      layers.length > 0 && fact("size", `${size(bytesOf(layers, "before"))} → ${size(bytesOf(layers, "after"))}`),
      fact("formats", Array.from(new Set(quantized.map((q) => q.spec))).map(chip))),
    h("p", {}, h("button", { type: "button", class: "action", onclick: () => { showView("graph"); fold(module); drawDetail(); } }, state.unfolded.has(module.path) ? "Fold in the graph" : "Unfold in the graph")),
    layers.length > 0 && [h("h4", {}, "Worst layers"), worst(layers)],
  ];
}
function worst(layers) {
  const measure = MEASURES.find((m) => m.key === "accumulated") || MEASURES.find((m) => m.key === "expected") || MEASURES.find((m) => m.key === "error");
  const ranked = measure ? layers.filter((q) => q.spec && measure.of(q) !== null && measure.of(q) !== undefined).sort((a, b) => measure.of(b) - measure.of(a)).slice(0, 12) : [];
  if (!ranked.length) return h("p", { class: "muted" }, "No layer is quantized.");
  return [h("p", { class: "note" }, `by ${measure.label}`), h("ol", { class: "worst" }, ranked.map((q) => layerLink(q, h("span", { class: "side" }, percent(measure.of(q))))))];
}

function nodeDetail(node) {
  const c = !node.layer && COMPARED_NODES.get(node.name);
  const other = (list) => h("ul", { class: "nodes" }, list.slice(0, 40).map((n) => h("li", {}, h("button", { type: "button", class: "link", onclick: () => selectNode(n.name) }, h("code", {}, n.name)), h("span", { class: "side" }, n.type))), list.length > 40 && h("li", {}, `… ${list.length - 40} more`));
  return [
    c && h("dl", {}, fact(c.type, " "), fact("alone", c.alone), fact("in the model", c.inside)),
    h("h4", {}, "Node"), h("pre", { class: "story", tabindex: 0 }, h("span", {}, node.text)),
    node.inputs.length > 0 && [h("h4", {}, "Reads"), other(node.inputs)],
    node.constants.length > 0 && [h("h4", {}, "Tensors"), h("ul", { class: "nodes" }, node.constants.map((n) => h("li", {}, h("code", {}, n.constant), h("span", { class: "side" }, n.type))))],
    node.users.length > 0 && [h("h4", {}, "Read by"), other(node.users)],
    h("h4", {}, "This node after each pass"), h("ol", { class: "history" }, historyOf(node.name).map(([label, text]) => h("li", {}, h("code", {}, label), h("pre", {}, text)))),
  ];
}
/** The node's line after every pass that changed it. */
function historyOf(name) {
  const found = [];
  let last;
  DATA.steps.forEach((step, i) => {
    if (!step.runs) return;
    const node = parsed(i).get(name);
    const text = node ? node.text : "not there";
    if (text !== last && !(last === undefined && !node)) found.push([step.label, text]);
    last = text;
  });
  return found;
}
const parsedSteps = new Map();
function parsed(step) {
  if (!parsedSteps.has(step)) parsedSteps.set(step, new Map((linesOf(step) || []).map(parseLine).filter(Boolean).map((n) => [n.name, n])));
  return parsedSteps.get(step);
}
