"use strict";
/* What both pages use. What comes from a model reaches a page through text nodes and attributes that run nothing. */
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element ("svg:rect" for SVG) with attributes, styles (an object) and children; text goes in as text. */
function el(name, attributes = {}, ...children) {
  const svg = name.startsWith("svg:");
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") for (const [property, v] of Object.entries(value)) node.style.setProperty(property, v);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

// ---------------------------------------------------------------- numbers

const whole = (n) => n.toLocaleString("en");
/** Three figures, without trailing noise. */
function number(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-3 ? x.toExponential(2) : size >= 1000 ? x.toFixed(0) : x.toPrecision(3);
  return text.replace("-", "−");
}
const signed = (x) => (x > 0 ? "+" : "") + number(x);
const percent = (share) => (share > 0 && share < 0.001 ? `${number(100 * share)} %` : `${(100 * share).toFixed(1)} %`);
const oneIn = (density) => (density > 0 ? `1 in ${whole(Math.round(1 / density))}` : "never");

// ---------------------------------------------------------------- tokens

const SIGNS = { " ": ["space", "·"], "\n": ["out", "↵"], "\r": ["out", "␍"], "\t": ["out", "⇥"] };
/* Controls, and what is invisible or turns the direction of the text around it. */
const UNSEEN = "[\\u0000-\\u0020\\u007f-\\u00a0\\u00ad\\u034f\\u061c\\u115f\\u180e\\u200b-\\u200f\\u2028-\\u202f" +
  "\\u205f-\\u206f\\u3000\\ufeff\\ufff0-\\ufffb]";
const PIECES = new RegExp(`${UNSEEN}|(?:(?!${UNSEEN})[^])+`, "g");
const ALONE = new RegExp(`^${UNSEEN}$`);

/** Nodes that hold exactly the text and show what cannot be seen in it. */
function pieces(text) {
  if (text === "") return [el("i", { class: "sign", "data-sign": "∅" })];
  return text.match(PIECES).map((piece) => {
    if (!ALONE.test(piece)) return piece;
    const code = piece.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
    const [kind, sign] = SIGNS[piece] ?? ["out", `⟨${code}⟩`];
    return el("i", { class: `sign ${kind}`, "data-sign": sign }, piece);
  });
}

/** The same as plain text, for places that show no elements. */
function plain(text) {
  return pieces(text).map((piece) => (typeof piece === "string" ? piece : piece.dataset.sign)).join("");
}

const token = (text) => el("span", { class: "token", title: plain(text) }, pieces(text));

/* A line break is drawn as a sign and takes no line; what is copied has it again. */
document.addEventListener("copy", (event) => {
  const chosen = document.getSelection();
  const parent = chosen.rangeCount ? chosen.getRangeAt(0).commonAncestorContainer : null;
  const within = (parent instanceof Element ? parent : parent?.parentElement)?.closest(".text, .token");
  if (!within) return;
  event.clipboardData.setData("text/plain", chosen.getRangeAt(0).cloneContents().textContent);
  event.preventDefault();
});

/** Address of a feature's page, from the folder of all pages. */
const address = (layer, index) =>
  `layer_${layer}/${data.kind}s_${index - (index % data.per_page)}.html#${index}`;

/** The state of the index in this tab, so that the way back from a feature leads to where one was. */
const REMEMBERED = `tl_adapters ${data.store}`;
function remembered(state) {
  try {
    if (state !== undefined) sessionStorage.setItem(REMEMBERED, state);
    return sessionStorage.getItem(REMEMBERED) ?? "";
  } catch {
    return ""; // a browser that keeps nothing for files
  }
}
