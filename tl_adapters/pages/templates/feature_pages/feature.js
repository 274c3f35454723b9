"use strict";
/* The features of one page; the address's fragment says which of them is shown. */
const NAME = `${data.layer}.`;
const SHOWN = 12; // examples before "more"
const fromHere = ([layer, index]) => (layer === data.layer && data.features.some((f) => f.index === index)
  ? `#${index}` : `../${address(layer, index)}`);
const text = (i) => data.strings[i];

// ---------------------------------------------------------------- pieces

const section = (title, ...parts) => el("section", {}, el("h2", {}, title), parts);
const soft = (...parts) => el("p", { class: "soft" }, parts);

/** A table whose last column is a bar; the longest is the largest number there is. */
function bars(called, head, rows, { signs = false } = {}) {
  const most = Math.max(...rows.map((row) => Math.abs(row.value)), 0) || 1;
  return el("table", { class: "bars", "aria-label": called },
    el("thead", {}, el("tr", {}, head.map((title, i) => el("th", { scope: "col", class: i ? "number" : null }, title)),
      el("td", { class: "track", "aria-hidden": "true" }))),
    el("tbody", {}, rows.map((row) => {
      const bar = row.value === 0 ? null : el("span", {
        class: `bar ${signs ? (row.value < 0 ? "down" : "up") : ""}`,
        style: { width: `${(100 * Math.abs(row.value)) / most}%` },
      });
      return el("tr", {}, el("th", { scope: "row" }, row.what),
        row.figures.map((f) => el("td", { class: "number" }, f)),
        el("td", { class: "track", "aria-hidden": "true" }, bar));
    })));
}

/** Bars over their own intervals: x by the logarithm where every edge is above zero, y as asked. */
function histogram(buckets, { told, what, logHeight = false }) {
  if (!buckets.length) return soft("Nothing was counted.");
  const WIDTH = 460, HEIGHT = 110, FLOOR = 92;
  const first = buckets[0][0], last = buckets[buckets.length - 1][1];
  const log = first > 0 && last / first > 8;
  const scale = log ? Math.log : (v) => v;
  const x = (v) => (WIDTH * (scale(v) - scale(first))) / (scale(last) - scale(first) || 1);
  const tall = (count) => (logHeight ? Math.log1p(count) : count);
  const most = Math.max(...buckets.map(([, , count]) => tall(count))) || 1;
  const drawn = buckets.map(([low, high, count]) => el("svg:rect", {
    class: "hist", x: x(low).toFixed(1), width: Math.max(0.5, x(high) - x(low) - 0.6).toFixed(1),
    y: (FLOOR - 84 * (tall(count) / most)).toFixed(1), height: ((84 * tall(count)) / most).toFixed(1),
  }, el("svg:title", {}, `${number(low)} to ${number(high)}: ${told(count)}`)));
  const middle = log ? Math.sqrt(first * last) : (first + last) / 2;
  const zero = !log && first < 0 && last > 0;
  const ticks = [[first, "start"], [zero ? 0 : middle, "middle"], [last, "end"]];
  const aloud = `${what}, from ${number(first)} to ${number(last)}`;
  return el("figure", {},
    el("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": aloud },
      el("svg:line", { x1: 0, x2: WIDTH, y1: FLOOR, y2: FLOOR }), drawn,
      ticks.map(([v, anchor]) => el("svg:text", { x: x(v), y: HEIGHT - 4, "text-anchor": anchor }, number(v)))),
    el("figcaption", {}, what, log ? "; logarithmic horizontal axis" : "", logHeight ? "; logarithmic vertical axis" : ""));
}

/** One example: its tokens coloured by the activation, the token that it was chosen for framed. */
function example([at, document, position, region, tokens, values], max) {
  const active = new Map(values);
  const spans = tokens.map((id, i) => {
    const value = active.get(i) ?? 0;
    const where = `position ${position - at + i}`;
    const span = el("span", {
      class: i === at ? "at" : null,
      title: value ? `${plain(text(id))}   activation ${number(value)}, ${where}` : `${plain(text(id))}   ${where}`,
    }, pieces(text(id)));
    if (value) {
      span.style.background = `rgb(var(--heat) / ${(0.12 + 0.78 * Math.min(1, value / max)).toFixed(3)})`;
      span.dataset.value = value;
    }
    return span;
  });
  return el("li", {},
    el("div", { class: "value" }, number(active.get(at) ?? 0),
      el("small", { title: `document ${document}, position ${position}` }, `${region} ${document}:${position}`)),
    el("p", { class: "text" }, spans));
}

/** The first of them, and the others on demand. */
function examples(list, max) {
  const items = (some) => el("ol", { class: "examples" }, some.map((e) => example(e, max)));
  const more = list.slice(SHOWN);
  return [items(list.slice(0, SHOWN)),
    more.length ? el("details", {}, el("summary", {}, `${more.length} more`), items(more)) : null];
}

// ---------------------------------------------------------------- sections

function heading(f) {
  const label = f.label;
  return [
    el("h1", {}, `${data.kind === "neuron" ? "Neuron" : "Feature"} ${NAME}${f.index}`,
      label?.text ? el("span", { class: "called" }, ` · ${label.text}`) : null),
    el("p", {}, label?.category ? el("span", { class: "chip" }, label.category) : null, " ",
      label ? el("span", { class: "soft" }, `labeled by ${label.source || "an unnamed source"}`,
        label.score === null
          ? "; the label was not tested" : `; detection score ${number(label.score)} (0.5 is chance)`) : null),
    el("dl", { class: "figures" }, [
      ["fires on", percent(f.density), `${oneIn(f.density)} tokens, ${whole(f.firings)} in all`],
      ["largest activation", number(f.max), `mean ${number(f.mean)} where it fires`],
      ["decoder norm", number(f.decoder_norm), "of what it writes per raw unit"],
      ["effects' spread", number(f.effect_spread), `over the vocabulary; excess kurtosis ${number(f.effect_kurtosis)}`],
    ].map(([term, value, more]) => el("div", {}, el("dt", {}, term), el("dd", {}, value, el("small", {}, more))))),
  ];
}

function firesOn(f) {
  const parts = [];
  if (f.fires_on.length) parts.push(el("p", {}, "Most often on ", f.fires_on.map((id) => [token(text(id)), " "])));
  parts.push(section("Top activating examples", f.top.length ? examples(f.top, f.max) : soft("It never fired.")));
  if (f.sample.length) {
    const drawn = soft("Drawn uniformly, strongest first.");
    parts.push(section("A random sample of its firings", drawn, examples(f.sample, f.max)));
  }
  return parts;
}

function promotes(f) {
  const list = (title, pairs) => el("div", {}, el("h3", {}, title), pairs.length
    ? bars(title, [], pairs.map(([id, v]) => ({ what: token(text(id)), figures: [signed(v)], value: v })), { signs: true })
    : soft("None."));
  const words = data.words.map((word, i) => [word, f.effects[i]])
    .map(([word, value]) => ({ what: token(word), figures: [signed(value)], value }));
  return section("Direct effect on the logits", soft("Change of a logit per unit of activation, directly."),
    el("div", { class: "beside" }, list("Raises", f.promotes), list("Lowers", f.suppresses)),
    words.length ? [el("h3", {}, "Chosen tokens"), bars("Chosen tokens", [], words, { signs: true })] : null,
    el("h3", {}, "Over the vocabulary"),
    histogram(f.effect_histogram, { told: (n) => `${whole(n)} tokens`, what: "Tokens by effect", logHeight: true }));
}

function activations(f) {
  const quantiles = f.quantiles.map(([share, v]) => `${Math.round(100 * share)} % below ${number(v)}`);
  return section("How strongly it fires",
    histogram(f.histogram, { told: (n) => `${whole(n)} firings`, what: "Firings by activation" }),
    quantiles.length ? soft(quantiles.join(" · ")) : null);
}

function where(f) {
  const regions = f.regions.map(([region, rate, share]) => (
    { what: region, figures: [percent(rate), percent(share)], value: rate }));
  const tenths = f.thinking.map((rate, i) => [i / f.thinking.length, (i + 1) / f.thinking.length, rate]);
  const most = Math.max(...f.thinking, 0);
  const thinking = most > 0 ? histogram(tenths, {
    told: percent,
    what: `Share of the tokens on which it fires, from the thinking's start to its end; at most ${percent(most)}`,
  }) : null;
  const domains = f.domains.map(([domain, rate]) => ({ what: domain, figures: [percent(rate)], value: rate }));
  return section("Where in the trace",
    regions.length ? bars("Where in the trace", ["region", "of its tokens", "of the firings"], regions) : soft("It never fired."),
    thinking ? [el("h3", {}, "Within the thinking"), thinking] : null,
    domains.length ? [el("h3", {}, "By domain"), bars("By domain", ["domain", "of its tokens"], domains)] : null);
}

function neighbours(f) {
  if (!f.neighbours.length) return null;
  const rows = f.neighbours.map((n) => {
    const name = `${n.id[0]}.${n.id[1]}`;
    const link = n.page ? el("a", { href: fromHere(n.id) }, name) : name;
    return el("tr", {}, el("th", { scope: "row" }, link),
      el("td", {}, n.label ? n.label : n.promotes.map((id) => [token(text(id)), " "])),
      el("td", { class: "number" }, percent(n.share)), el("td", { class: "number" }, percent(n.density)));
  });
  return section("Co-activating features", el("table", { class: "bars", "aria-label": "Co-activating features" },
    el("thead", {}, el("tr", {}, ["feature", "label, or top logits", "of its firings", "of all tokens"].map((title, i) =>
      el("th", { scope: "col", class: i > 1 ? "number" : null }, title)))), el("tbody", {}, rows)));
}

// ---------------------------------------------------------------- the page

function step(id, there, arrow) {
  const link = byId(id);
  link.hidden = !there;
  if (there) {
    link.href = fromHere(there);
    link.textContent = arrow(`${there[0]}.${there[1]}`);
  }
}

function show() {
  const asked = location.hash.slice(1);
  const place = Math.max(0, data.features.findIndex((f) => String(f.index) === asked));
  const f = data.features[place];
  const beside = (k) => (data.features[k] ? [data.layer, data.features[k].index] : null);
  document.title = `${NAME}${f.index}${f.label?.text ? ` · ${f.label.text}` : ""} · ${data.store}`;
  byId("index").href = "../index.html" + (remembered() ? `#${remembered()}` : "");
  step("before", beside(place - 1) ?? data.before, (name) => `← ${name}`);
  step("after", beside(place + 1) ?? data.after, (name) => `${name} →`);
  const unknown = asked && String(f.index) !== asked
    ? soft(`This page holds no ${data.kind} ${NAME}${asked}; shown is its first.`) : null;
  byId("feature").replaceChildren(...[unknown, ...heading(f)].filter(Boolean), el("div", { class: "panes" },
    el("div", {}, firesOn(f)), el("div", {}, promotes(f), activations(f), where(f), neighbours(f))));
  window.scrollTo(0, 0);
  document.body.dataset.ready = `${NAME}${f.index}`;
}

document.addEventListener("keydown", (event) => {
  const link = { ArrowLeft: byId("before"), ArrowRight: byId("after") }[event.key];
  if (link && !link.hidden && !event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey) link.click();
});
window.addEventListener("hashchange", show);
show();
