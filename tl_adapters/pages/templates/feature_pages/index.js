"use strict";
/* The index: columns in typed arrays, an order per column, one pass over it for the filters, a page of rows. */
const began = performance.now();
const PAGE = 200;
const N = data.columns.layer.length;
const NONE = -1;
const packed = (record, kind) =>
  Object.fromEntries(Object.entries(record).map(([key, list]) => [key, kind.from(list)]));
const column = packed(data.columns, Float64Array);
const lists = packed(data.lists, Int32Array);
const effects = data.effects.map((list) => Float64Array.from(list));
const WIDTH = data.width; // tokens per list
const text = (i) => data.strings[i] ?? "";

const state = { q: "", layer: "", region: "", category: "", word: 0, sort: "layer", down: false, page: 0,
                densityFrom: "", densityTo: "", effectFrom: "", effectTo: "" };
const START = { ...state };
const INPUTS = { q: "q", layer: "layer", region: "region", category: "category", word: "word",
                 densityFrom: "density-from", densityTo: "density-to",
                 effectFrom: "effect-from", effectTo: "effect-to" };

// ---------------------------------------------------------------- order and filters

const orders = new Map();
const values = (key) => (key === "effect" ? effects[state.word] : column[key]);

/** Rows by a column, smallest first; texts by the alphabet, and rows without one at the end both ways. */
function order(key) {
  const name = key === "effect" ? `effect ${state.word}` : key;
  if (!orders.has(name)) {
    const rows = Int32Array.from({ length: N }, (_, i) => i);
    let by = values(key);
    if (key === "label" || key === "category" || key === "region") {
      const small = (i) => text(i).toLowerCase();
      const used = [...new Set(by)].filter((i) => i !== NONE).sort((a, b) => (small(a) < small(b) ? -1 : 1));
      const rank = new Map(used.map((string, place) => [string, place]));
      by = by.map((string) => rank.get(string) ?? Infinity);
    }
    if (key !== "layer") rows.sort((a, b) => (by[a] === by[b] ? a - b : by[a] - by[b])); // rows come by layer and index
    orders.set(name, { rows, by });
  }
  return orders.get(name);
}

/** The rows that pass every filter but those named. */
function test(but = []) {
  const checks = [];
  const bounds = (key, array) => {
    const [low, high] = [state[`${key}From`], state[`${key}To`]];
    if (low !== "") checks.push((i) => array[i] >= Number(low));
    if (high !== "") checks.push((i) => array[i] <= Number(high));
  };
  if (state.layer !== "" && !but.includes("layer")) checks.push((i) => column.layer[i] === Number(state.layer));
  if (!but.includes("density")) bounds("density", column.density);
  if (state.region !== "") checks.push((i) => column.region[i] === Number(state.region));
  if (state.category !== "") checks.push((i) => column.category[i] === Number(state.category));
  if (effects.length) bounds("effect", effects[state.word]);
  if (state.q.trim()) checks.push(searched());
  return (i) => checks.every((check) => check(i));
}

/** Rows whose name, label, category or tokens hold the text, in any case. Every text is looked at once. */
function searched() {
  const asked = state.q.replaceAll("·", " ").replaceAll("↵", "\n").toLowerCase();
  const id = /^\s*(\d+)\s*[./]\s*(\d*)\s*$/.exec(asked);
  if (id) return (i) => column.layer[i] === Number(id[1]) && String(column.index[i]).startsWith(id[2]);
  const holds = Uint8Array.from(data.strings, (string) => string.toLowerCase().includes(asked));
  const among = Object.values(lists);
  return (i) => {
    if (holds[column.label[i]] || holds[column.category[i]]) return true;
    for (const list of among) for (let j = i * WIDTH; j < (i + 1) * WIDTH; j++) if (holds[list[j]]) return true;
    return false;
  };
}

/** The chosen rows in their order. */
function chosen() {
  const { rows, by } = order(state.sort);
  const passes = test();
  const found = [], last = [];
  for (let k = 0; k < N; k++) {
    const i = rows[state.down ? N - 1 - k : k];
    if (passes(i)) (by[i] === Infinity ? last : found).push(i);
  }
  return found.concat(last);
}

// ---------------------------------------------------------------- table

const tokens = (key, i) => {
  const ids = [...lists[key].subarray(i * WIDTH, (i + 1) * WIDTH)].filter((id) => id !== NONE);
  return el("td", {}, ids.map((id) => token(text(id))));
};
const figure = (written, title) => el("td", { class: "number", title }, written);
const name = (i) => `${column.layer[i]}.${column.index[i]}`;
const anyLabel = column.label.some((i) => i !== NONE);

const COLUMNS = [
  { key: "layer", title: data.kind === "neuron" ? "Neuron" : "Feature", cell: (i) => el("td", { class: "name" },
    column.page[i] ? el("a", { href: address(column.layer[i], column.index[i]) }, name(i)) : name(i)) },
  { key: "label", title: "Label", cell: (i) => el("td", { class: "label" }, text(column.label[i]), " ",
    column.category[i] === NONE ? null : el("span", { class: "chip" }, text(column.category[i]))), shown: anyLabel },
  { key: null, title: "Fires on", cell: (i) => tokens("fires_on", i) },
  { key: null, title: "Top logits", cell: (i) => tokens("promotes", i) },
  { key: null, title: "Bottom logits", cell: (i) => tokens("suppresses", i) },
  { key: "density", title: "Density", number: true, cell: (i) => figure(percent(column.density[i]),
    `${oneIn(column.density[i])} tokens; ${whole(column.firings[i])} firings`) },
  { key: "mean", title: "Mean", number: true,
    cell: (i) => figure(number(column.mean[i]), "Mean activation where it fires") },
  { key: "max", title: "Max", number: true, cell: (i) => figure(number(column.max[i]), "Largest activation") },
  { key: "decoder_norm", title: "Decoder", number: true,
    cell: (i) => figure(number(column.decoder_norm[i]), "Norm of what it writes") },
  { key: "region", title: "Mostly in", cell: (i) => el("td", { class: "region" }, text(column.region[i]), " ",
    el("small", {}, percent(column.region_share[i]))) },
  { key: "effect", title: "Effect", number: true, shown: effects.length > 0, cell: (i) => {
    const effect = effects[state.word][i];
    return el("td", { class: `number ${effect < 0 ? "minus" : "plus"}` }, signed(effect));
  } },
].filter((c) => c.shown !== false);

function drawHead() {
  const cells = COLUMNS.map((c) => {
    const title = c.key === "effect" ? ["On ", token(data.words[state.word])] : [c.title];
    if (!c.key) return el("th", { scope: "col" }, title);
    const sorted = state.sort === c.key ? (state.down ? "descending" : "ascending") : null;
    const button = el("button", { type: "button", "data-sort": c.key }, title);
    button.addEventListener("click", () => {
      state.down = state.sort === c.key ? !state.down : Boolean(c.number);
      state.sort = c.key;
      state.page = 0;
      draw();
      byId("head").querySelector(`[data-sort="${c.key}"]`).focus();
    });
    return el("th", { scope: "col", "aria-sort": sorted, class: c.number ? "number" : null }, button);
  });
  byId("head").replaceChildren(...cells);
}

// ---------------------------------------------------------------- density by layer

const STEP = 0.25; // decades
const logs = column.density.map((d) => Math.log10(Math.max(d, 1e-12)));
const lowest = N ? Math.floor(Math.min(0, logs.reduce((a, b) => Math.min(a, b), 0)) / STEP) * STEP : -1;
const levels = Math.max(1, Math.round(-lowest / STEP));
const level = (i) => Math.min(levels - 1, Math.floor((logs[i] - lowest) / STEP));
const bound = (power) => String(Number((10 ** power).toPrecision(4)));

/** How many of the features that pass the other filters are in each field. */
function drawHeat() {
  const within = (low, x, high) => Math.max(low, Math.min(high, x));
  const cell = { width: within(9, 560 / data.layers.length, 26), height: within(6, 150 / levels, 12) };
  const left = 56, bottom = 30;
  const width = left + cell.width * data.layers.length + 8, height = 6 + cell.height * levels + bottom;
  const place = new Map(data.layers.map((layer, x) => [layer, x]));
  const counts = new Float64Array(levels * data.layers.length);
  const passes = test(["layer", "density"]);
  for (let i = 0; i < N; i++) if (passes(i)) counts[place.get(column.layer[i]) * levels + level(i)]++;
  const most = Math.log1p(counts.reduce((a, b) => Math.max(a, b), 1));
  const parts = [];
  data.layers.forEach((layer, x) => {
    for (let y = 0; y < levels; y++) {
      const from = y === 0 ? "" : bound(lowest + y * STEP), to = y === levels - 1 ? "" : bound(lowest + (y + 1) * STEP);
      const count = counts[x * levels + y];
      const here = state.layer === String(layer) && state.densityFrom === from && state.densityTo === to;
      const rect = el("svg:rect", {
        x: left + x * cell.width, y: 6 + (levels - 1 - y) * cell.height, width: cell.width - 1, height: cell.height - 1,
        class: `cell${here ? " chosen" : ""}`, "data-count": count,
        style: { fill: `rgb(var(--cell) / ${count ? 0.12 + 0.88 * (Math.log1p(count) / most) : 0.04})` },
      }, el("svg:title", {}, `layer ${layer}, density ${from || "0"} to ${to || "1"}: ${whole(count)}`));
      rect.addEventListener("click", () => {
        Object.assign(state, here ? { layer: "", densityFrom: "", densityTo: "" }
          : { layer: String(layer), densityFrom: from, densityTo: to }, { page: 0 });
        draw();
      });
      parts.push(rect);
    }
    if (x % Math.ceil(data.layers.length / 28) === 0) {
      const at = { x: left + (x + 0.5) * cell.width, y: height - bottom + 16, "text-anchor": "middle" };
      parts.push(el("svg:text", at, String(layer)));
    }
  });
  for (let y = 0; y <= levels; y += 1) {
    const power = lowest + y * STEP;
    if (Number.isInteger(power)) {
      const at = { x: left - 6, y: 10 + (levels - y) * cell.height, "text-anchor": "end" };
      parts.push(el("svg:text", at, bound(power)));
    }
  }
  parts.push(el("svg:text", { x: left, y: height - 2 }, "layer"));
  const heat = byId("heat");
  heat.setAttribute("viewBox", `0 0 ${width} ${height}`);
  heat.setAttribute("width", width);
  heat.setAttribute("height", height);
  heat.setAttribute("aria-label", `Number of ${data.kind}s by layer and density`);
  heat.replaceChildren(...parts);
}

// ---------------------------------------------------------------- all of it

function draw() {
  for (const [key, id] of Object.entries(INPUTS)) {
    if (byId(id).value !== String(state[key])) byId(id).value = state[key];
  }
  const found = chosen();
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  state.page = Math.max(0, Math.min(state.page, pages - 1));
  const start = state.page * PAGE, shown = found.slice(start, start + PAGE);
  drawHead();
  byId("rows").replaceChildren(...shown.map((i) => el("tr", { "data-name": name(i) }, COLUMNS.map((c) => c.cell(i)))));
  byId("nothing").hidden = found.length > 0;
  byId("table").hidden = found.length === 0;
  byId("count").textContent = found.length
    ? `${whole(start + 1)}–${whole(start + shown.length)} of ${whole(found.length)}` : "none";
  if (found.length < N) byId("count").append(` (${whole(N)} in all)`);
  byId("previous").disabled = state.page === 0;
  byId("next").disabled = state.page >= pages - 1;
  drawHeat();
  writeAddress();
}

function writeAddress() {
  const kept = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== START[key]) kept.set(key, String(value));
  const hash = kept.toString();
  remembered(hash);
  const here = location.pathname + location.search;
  if (location.hash.slice(1) !== hash) history.replaceState(null, "", hash ? `#${hash}` : here);
}

/** The state that an address names; what it cannot mean is left out. */
function readAddress(hash) {
  const asked = new URLSearchParams(hash);
  const options = (id) => [...byId(id).options].map((option) => option.value);
  const take = (key, allowed) => (asked.has(key) && allowed(asked.get(key)) ? asked.get(key) : START[key]);
  const finite = (value) => value !== "" && Number.isFinite(Number(value));
  for (const key of ["layer", "region", "category"]) state[key] = take(key, (value) => options(key).includes(value));
  for (const key of ["densityFrom", "densityTo", "effectFrom", "effectTo"]) state[key] = take(key, finite);
  state.q = asked.get("q") ?? "";
  state.word = Number(take("word", (value) => Number(value) in effects));
  state.page = Number(take("page", (value) => /^\d+$/.test(value)));
  state.sort = take("sort", (value) => COLUMNS.some((c) => c.key === value));
  state.down = asked.get("down") === "true";
}

function options(id, first, entries) {
  byId(id).replaceChildren(...(first === null ? [] : [el("option", { value: "" }, first)]),
    ...entries.map(([value, title]) => el("option", { value }, title)));
}

function begin() {
  const used = (key) => [...new Set(column[key])].filter((i) => i !== NONE);
  options("layer", "all", data.layers.map((layer) => [layer, String(layer)]));
  options("region", "anywhere", data.regions.filter((i) => used("region").includes(i)).map((i) => [i, text(i)]));
  const categories = used("category").sort((a, b) => (text(a) < text(b) ? -1 : 1));
  options("category", "any", categories.map((i) => [i, text(i)]));
  byId("categories").hidden = categories.length === 0;
  options("word", null, data.words.map((word, i) => [i, plain(word)]));
  byId("effects").hidden = effects.length === 0;
  for (const [id, facts] of [["facts", data.facts], ["more", data.more]]) {
    byId(id).append(...facts.flatMap(([term, value]) => [el("dt", {}, term), el("dd", {}, value)]));
  }
  let waiting = 0;
  byId("filters").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      for (const [key, id] of Object.entries(INPUTS)) state[key] = byId(id).value;
      state.word = Number(state.word);
      state.page = 0;
      draw();
    }, N > 20000 ? 150 : 0);
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").addEventListener("click", (event) => {
    event.preventDefault();
    Object.assign(state, START);
    draw();
  });
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    byId(id).addEventListener("click", () => {
      state.page += step;
      draw();
      byId("table").scrollIntoView({ block: "nearest" });
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, select")) {
      event.preventDefault();
      byId("q").focus();
    }
  });
  window.addEventListener("hashchange", () => {
    readAddress(location.hash.slice(1));
    draw();
  });
  readAddress(location.hash.slice(1));
  draw();
  document.body.dataset.ready = String(Math.round(performance.now() - began));
}

begin();
