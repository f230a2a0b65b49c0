"use strict";
// Draws the page from the JSON beside it. `chosen` holds the numbers of at most two points; everything follows from it.
const data = JSON.parse(document.getElementById("data").textContent);
const done = data.points.filter((p) => p.state === "done" && "metric" in p.values);
const better = data.objectives.metric === "min" ? "min" : "max";
let chosen = [];
let sorted = { key: "metric", down: better === "max" };

const COSTS = { packed: "packed weights", size: "exported file", bops: "BOPs", latency: "CPU p50 (ms)" };
const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const node = tag in DRAWN ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
const DRAWN = { svg: 1, g: 1, line: 1, circle: 1, path: 1, text: 1, title: 1 };

function short(x) {
  for (const [factor, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(x) >= factor) return `${Number((x / factor).toPrecision(3))}${unit}`;
  }
  return String(Number(x.toPrecision(4)));
}
const show = (key, x) =>
  x === undefined || x === null ? "-" : key === "size" || key === "packed" ? `${short(x)}B` : short(x);
const label = (p) => Object.entries(p.params).map(([k, v]) => `${k}=${v}`).join(" ");
const mark = (number) => (chosen[0] === number ? " a" : chosen[1] === number ? " b" : "");

// -- scales and axes ---------------------------------------------------------------------------------------------------

const W = 400, H = 300, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 34;

function scale(values, from, to) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  const a = low - pad, b = high + pad;
  const at = (v) => from + ((v - a) / (b - a)) * (to - from);
  const rough = (b - a) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let t = Math.ceil(a / step) * step; t <= b; t += step) ticks.push(Number(t.toPrecision(10)));
  return { at, ticks };
}

function axes(svg, x, y, xKey, width = W) {
  for (const t of y.ticks) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.at(t), y2: y.at(t) }));
    svg.append(element("text", { x: LEFT - 6, y: y.at(t) + 4, "text-anchor": "end" }, short(t)));
  }
  for (const t of x.ticks) {
    svg.append(element("text", { x: x.at(t), y: H - BOTTOM + 16, "text-anchor": "middle" }, show(xKey, t)));
  }
}

// -- Pareto plots ------------------------------------------------------------------------------------------------------

function front(cost) {
  const sign = better === "max" ? -1 : 1;
  const ordered = done.filter((p) => cost in p.values)
    .sort((p, q) => p.values[cost] - q.values[cost] || sign * (p.values.metric - q.values.metric));
  const kept = [];
  for (const p of ordered) {
    if (!kept.length || sign * (p.values.metric - kept.at(-1).values.metric) < 0) kept.push(p);
  }
  return kept;
}

function pareto(cost) {
  const shown = done.filter((p) => cost in p.values);
  const references = [...new Set(shown.map((p) => p.float).filter((v) => v !== null))];
  const heights = [...shown.map((p) => p.values.metric), ...shown.map((p) => p.ptq).filter((v) => v !== null), ...references];
  const x = scale(shown.map((p) => p.values[cost]), LEFT, W - RIGHT), y = scale(heights, H - BOTTOM, TOP);
  const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "data-cost": cost });
  axes(svg, x, y, cost);
  for (const value of references) {
    svg.append(element("line", { class: "float", x1: LEFT, x2: W - RIGHT, y1: y.at(value), y2: y.at(value) },
      element("title", {}, `float ${short(value)}`)));
    svg.append(element("text", { class: "quiet", x: W - RIGHT, y: y.at(value) - 4, "text-anchor": "end" }, "float"));
  }
  const line = front(cost).map((p, i, all) =>
    `${i ? `H${x.at(p.values[cost])}V` : `M${x.at(p.values[cost])},`}${y.at(all[i].values.metric)}`);
  if (line.length > 1) svg.append(element("path", { class: "frontline", d: line.join("") }));
  for (const p of shown) {
    const cx = x.at(p.values[cost]);
    if (p.ptq === null) continue;
    svg.append(element("line", { class: "gain", x1: cx, x2: cx, y1: y.at(p.ptq), y2: y.at(p.values.metric) }));
    svg.append(element("circle", { class: "ptq", cx, cy: y.at(p.ptq), r: 3 }, element("title", {}, `PTQ ${short(p.ptq)}`)));
  }
  for (const p of shown) {
    const text = `point ${p.number}: ${label(p)}\n${data.metric} ${short(p.values.metric)}, ${COSTS[cost]} ${show(cost, p.values[cost])}`;
    svg.append(element("circle", {
      class: `point${data.front.includes(p.number) ? " front" : ""}${mark(p.number)}`, "data-number": p.number,
      cx: x.at(p.values[cost]), cy: y.at(p.values.metric), r: 6, tabindex: 0, role: "button", "aria-label": text,
      onclick: () => choose(p.number), onkeydown: (e) => e.key === "Enter" && choose(p.number),
    }, element("title", {}, text)));
  }
  return element("figure", {}, element("figcaption", {}, `${data.metric} against ${COSTS[cost]}`), svg);
}

// -- the chosen points -------------------------------------------------------------------------------------------------

function card(p, letter) {
  const link = element("a", { href: `${p.folder}/` }, p.folder);
  const facts = Object.entries(p.values).map(([k, v]) => `${k === "metric" ? data.metric : k} ${show(k, v)}`);
  if (p.ptq !== null) facts.push(`PTQ ${short(p.ptq)}`);
  if (p.float !== null) facts.push(`float ${short(p.float)}`);
  const rows = Object.entries(p.config).map(([k, v]) => element("tr", {}, element("td", {}, k), element("td", {}, v)));
  const warning = p.verified === false ? [element("p", { class: "bad" }, "NOT VERIFIED: the file falls short of training")] : [];
  return element("div", { class: `card ${letter}`, "data-number": p.number },
    element("h3", {}, `point ${p.number}: ${label(p)}`), element("div", {}, facts.join(" · ")), ...warning,
    element("div", {}, "run: ", link),
    element("div", { class: "config" }, element("table", {}, element("tbody", {}, ...rows))));
}

function difference(p, q) {
  const keys = [...new Set([...Object.keys(p.config), ...Object.keys(q.config)])];
  const rows = keys.filter((k) => p.config[k] !== q.config[k]).map((k) =>
    element("tr", {}, ...[k, p.config[k] ?? "(absent)", q.config[k] ?? "(absent)"].map((t) => element("td", {}, t))));
  return element("div", { class: "diff" }, element("h2", {}, `What differs: ${rows.length === 1 ? "1 setting" : `${rows.length} settings`}`),
    element("table", {}, element("thead", {}, element("tr", {}, ...["", `point ${p.number}`, `point ${q.number}`].map((t) =>
      element("th", {}, t)))), element("tbody", {}, ...rows)));
}

function drawChosen() {
  const points = chosen.map((number) => data.points.find((p) => p.number === number));
  const cards = points.map((p, i) => card(p, "ab"[i]));
  const parts = cards.length ? [element("div", { class: "cards" }, ...cards)] : [];
  if (points.length === 2) parts.push(difference(...points));
  document.getElementById("chosen").replaceChildren(...parts);
}

// -- table, heat map, curves -------------------------------------------------------------------------------------------

function drawTable() {
  const keys = ["metric", ...["size", "packed", "bops", "latency", "avg_bits"].filter((k) => done.some((p) => k in p.values))];
  const value = (p, key) => (key === "number" ? p.number : key === "ptq" ? p.ptq : p.values[key]);
  const order = (p, q) => {
    const [a, b] = [value(p, sorted.key), value(q, sorted.key)];
    return (a ?? Infinity) === (b ?? Infinity) ? 0 : a === undefined || a === null ? 1 : b === undefined || b === null ? -1 : (sorted.down ? b - a : a - b);
  };
  const sort = (key) => () => { sorted = { key, down: sorted.key === key ? !sorted.down : false }; drawTable(); };
  const head = [["number", "point"], [null, "parameters"], ["ptq", "PTQ"], ...keys.map((k) => [k, k === "metric" ? data.metric : k])];
  const rows = [...data.points].sort(order).map((p) => element("tr", { class: mark(p.number).trim(), onclick: () => choose(p.number) },
    element("td", { class: "number" }, `${data.front.includes(p.number) ? "★ " : ""}${p.number}`), element("td", {}, label(p)),
    element("td", { class: "number" }, p.ptq === null ? "-" : short(p.ptq)),
    ...keys.map((k) => element("td", { class: `number${k === "metric" && p.state !== "done" ? " bad" : ""}`, title: p.error },
      k === "metric" && p.state !== "done" ? p.state : show(k, p.values[k])))));
  document.getElementById("table").replaceChildren(
    element("thead", {}, element("tr", {}, ...head.map(([key, text]) =>
      element("th", { class: key ? "number" : "", onclick: key ? sort(key) : null, title: data.meanings[key] }, text)))),
    element("tbody", {}, ...rows));
}

function heat(key, title, shown, names) {
  const cell = (bits) => bits
    ? element("td", { style: `background:hsl(205 70% ${Math.max(28, 96 - bits * 6)}%);color:${bits > 7 ? "#fff" : "#1f2933"}` }, String(bits))
    : element("td", {}, "");
  const rows = shown.map((p) => {
    const bits = Object.fromEntries(p.layers.map((l) => [l.name, l[key]]));
    return element("tr", { class: mark(p.number).trim(), onclick: () => choose(p.number) },
      element("td", { class: "name" }, `${p.number}  ${p.label}`), ...names.map((n) => cell(bits[n])));
  });
  const head = element("tr", {}, element("th", {}, title), ...names.map((n) => element("th", { class: "layer" }, n || "(model)")));
  return element("table", { class: "heat" }, element("thead", {}, head), element("tbody", {}, ...rows));
}

function drawHeat() {
  const shown = done.filter((p) => p.layers.length).sort((p, q) => (p.values.packed ?? 0) - (q.values.packed ?? 0));
  const named = (key) => [...new Set(shown.flatMap((p) => p.layers.filter((l) => l[key]).map((l) => l.name)))];
  document.getElementById("heat").replaceChildren(
    heat("weight_bits", "weights", shown, named("weight_bits")), heat("act_bits", "inputs", shown, named("act_bits")));
}

function drawCurves() {
  const name = document.getElementById("curve").value;
  const finite = (p) => p.curves[name].filter((c) => c[1] !== null); // null: NaN or an infinity
  const shown = data.points.filter((p) => name in p.curves && finite(p).length);
  const width = 900, svg = element("svg", { viewBox: `0 0 ${width} ${H}` });
  if (shown.length) {
    const all = shown.flatMap(finite);
    const x = scale(all.map((c) => c[0]), LEFT, width - RIGHT), y = scale(all.map((c) => c[1]), H - BOTTOM, TOP);
    axes(svg, x, y, "step", width);
    svg.append(element("text", { class: "quiet", x: width - RIGHT, y: H - 4, "text-anchor": "end" }, "step"));
    const last = [...shown].sort((p, q) => chosen.includes(p.number) - chosen.includes(q.number));
    for (const p of last) {
      const d = p.curves[name].map(([s, v], i, all) =>
        v === null ? "" : `${i && all[i - 1][1] !== null ? "L" : "M"}${x.at(s)},${y.at(v)}`).join("");
      const text = element("title", {}, `point ${p.number}: ${label(p)}`);
      svg.append(element("path", { class: `curve${mark(p.number)}`, d, onclick: () => choose(p.number) }, text));
      const [s, v] = finite(p).at(-1);
      svg.append(element("circle", { class: `point${mark(p.number)}`, cx: x.at(s), cy: y.at(v), r: 3, onclick: () => choose(p.number) }));
    }
  }
  document.getElementById("curves").replaceChildren(svg);
}

function choose(number) {
  if (chosen.includes(number)) chosen = chosen.filter((n) => n !== number);
  else chosen = chosen.length < 2 ? [...chosen, number] : [chosen[0], number];
  draw();
}

function draw() {
  const costs = Object.keys(COSTS).filter((cost) => done.some((p) => cost in p.values));
  document.getElementById("plots").replaceChildren(...costs.map(pareto));
  drawChosen(); drawTable(); drawHeat(); drawCurves();
}

const names = [...new Set(data.points.flatMap((p) => Object.keys(p.curves)))];
const select = document.getElementById("curve");
select.append(...names.map((n) => element("option", { value: n }, n)));
select.value = names.find((n) => n.startsWith("val/")) ?? names[0] ?? "";
select.addEventListener("change", drawCurves);
const over = Object.entries(data.objectives).map(([k, v]) => `${k} ${v}`).join(", ");
document.getElementById("summary").textContent =
  `${done.length} of ${data.points.length} points finished; ${data.front.length} on the Pareto front (${over})`;
document.getElementById("legend").textContent =
  `Filled: ${data.exported ? "exported" : "result"}; orange: on the front over all objectives; hollow: calibrated only (PTQ); dashed: float.`;
draw();
