"use strict";
/* Positions across, layers up. What comes from a model reaches the page through textContent and .text() alone. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const started = performance.now();
  const MARGIN = { top: 88, right: 84, bottom: 96, left: 62 };
  const GROUP_COLOURS = ["#7b4fa3", "#2e7d4f", "#b7791f", "#0f7c8a", "#a33b6b", "#5c6f2b"];
  const SHAPES = {
    feature: d3.symbolCircle, token: d3.symbolSquare, logit: d3.symbolSquare, error: d3.symbolDiamond,
  };
  const LISTED = 10; // entries of a list before "show all"
  const element = (id) => document.getElementById(id);
  /** A color of the style sheet in the theme of now. */
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // ---------------------------------------------------------------- text

  /** Text one can see: spaces at the ends, line breaks and control characters get a sign. */
  function visible(text) {
    const signs = { "\n": "↵", "\t": "⇥" };
    return String(text)
      .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length))
      .replace(/[\u0000-\u001f]/g, (c) => signs[c] ?? String.fromCharCode(0x2400 + c.charCodeAt(0)))
      .replace(/[\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");
  }

  function cut(text, length) {
    const signs = Array.from(text);
    return signs.length > length ? `${signs.slice(0, length - 1).join("")}…` : text;
  }

  const plain = (x) => x === 0 || (Math.abs(x) >= 0.001 && Math.abs(x) < 1000);
  const signed = (x) => d3.format(plain(x) ? "+.3r" : "+.2e")(x);
  const number = d3.format(".3~g");
  const measured = (value) => (typeof value !== "number" || Number.isInteger(value) ? value : d3.format(".4~g")(value));
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
  const token = (n) => visible(data.tokens[n.position]);

  // ---------------------------------------------------------------- nodes and links

  const nodes = data.nodes.map((n, i) => ({ ...n, i, into: [], out: [] }));
  const byId = new Map(nodes.map((n) => [n.id, n]));
  const links = data.links.map(([s, t, weight], i) => ({ i, source: nodes[s], target: nodes[t], weight }));
  for (const link of links) {
    link.source.out.push(link);
    link.target.into.push(link);
  }
  const stays = (n) => n.kind === "token" || n.kind === "logit";
  const numberOf = (n) => (n.feature === null ? "" : `${n.layer}/${n.feature}`);

  function name(n) {
    if (n.label) return visible(n.label);
    if (n.kind === "token") return token(n);
    return n.kind === "feature" ? numberOf(n) : `${n.kind} ${n.layer}`;
  }

  function place(n) {
    const layer = n.kind === "token" ? "token" : n.kind === "logit" ? "logit" : `L${n.layer}`;
    return n.kind === "token" ? `token ${n.position}` : `${layer} · ${n.position} ${token(n)}`;
  }

  function aloud(n) {
    const what = n.kind === "feature" ? `Feature ${numberOf(n)}` : n.kind[0].toUpperCase() + n.kind.slice(1);
    const where = stays(n) ? "" : `, layer ${n.layer}`;
    return `${what} ${n.label ? visible(n.label) : ""}${where}, position ${n.position} ${token(n)}`;
  }

  // ---------------------------------------------------------------- layout

  const rows = data.n_layers + 2;
  const columns = []; // per position: left edge and width
  const levels = []; // per layer, tokens first: middle and height
  const size = { width: 0, height: 0 };

  /** A number from 0 to 1 that is always the same for the same text. */
  function chance(text) {
    let h = 2166136261;
    for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 16777619);
    h = Math.imul(h ^ (h >>> 15), 2246822519);
    return ((h ^ (h >>> 13)) >>> 0) / 4294967296;
  }

  /** How many rows a cell of so many nodes takes: as square as the height allows, wider than high beyond that. */
  function depth(count, room) {
    const square = Math.min(Math.round(Math.sqrt(count)), Math.floor((room - 8) / 17));
    return Math.max(1, Math.round(Math.sqrt(count / 3)), square);
  }

  /** Share the nodes of one cell among rows that do not touch, the strongest in the middle. */
  function pack(members, room) {
    const k = stays(members[0]) ? 1 : depth(members.length, room);
    const lines = d3.range(k).map((j) => ({ order: Math.abs(j - (k - 1) / 2), width: 0, members: [] }));
    const inner = d3.sort(lines, (line) => line.order);
    for (const n of d3.sort(members, (m) => -m.influence)) {
      const line = d3.least(inner, (l) => l.width);
      if (line.members.length % 2) line.members.push(n);
      else line.members.unshift(n);
      line.width += n.room;
    }
    let y = 0;
    for (const line of lines) {
      const height = d3.max(line.members, (n) => 2 * n.r) + (stays(line.members[0]) ? 4 : 8);
      let x = -line.width / 2;
      for (const n of line.members) {
        const slack = height / 2 - n.r - 1.5;
        n.dx = x + n.room / 2;
        n.dy = y + height / 2 + (stays(n) ? 0 : slack * (2 * chance(n.id) - 1));
        x += n.room;
      }
      y += height;
    }
    for (const n of members) n.dy -= y / 2;
    return { width: d3.max(lines, (line) => line.width), height: y };
  }

  function layout() {
    const room = upright() / rows; // per layer, on the screen as it is now
    const most = d3.max(nodes, (n) => (stays(n) ? 0 : n.influence)) || 1;
    for (const n of nodes) {
      n.r = stays(n) ? 5.5 : 4 + 6.5 * Math.sqrt(Math.max(0, n.influence) / most);
      n.room = n.kind === "logit" ? 23 : 2 * n.r + 3;
    }
    const widths = data.tokens.map(() => 23);
    const heights = d3.range(rows).map((j) => (j === 0 || j === rows - 1 ? 26 : 20));
    for (const [layer, cells] of d3.group(nodes, (n) => n.layer, (n) => n.position)) {
      for (const [position, members] of cells) {
        const cell = pack(members, room);
        widths[position] = Math.max(widths[position], cell.width + 12);
        heights[layer + 1] = Math.max(heights[layer + 1], cell.height + 8);
      }
    }
    for (const width of widths) {
      columns.push({ left: size.width, width });
      size.width += width;
    }
    // Layers move apart where the screen has room for it, so that links are not squeezed.
    const spare = upright() / scale(size.width, d3.sum(heights)) - d3.sum(heights);
    for (let j = 0; j < rows; j++) heights[j] += Math.max(0, Math.min(spare / rows, 60));
    size.height = d3.sum(heights);
    let bottom = size.height;
    for (const height of heights) {
      levels.push({ middle: bottom - height / 2, height });
      bottom -= height;
    }
    for (const n of nodes) {
      n.x = columns[n.position].left + columns[n.position].width / 2 + n.dx;
      n.y = levels[n.layer + 1].middle + n.dy;
    }
  }

  // ---------------------------------------------------------------- state, and the part of it in the address

  const state = { focus: null, pinned: new Set(), groups: [], prune: 1, matches: new Set() };

  const single = () => (state.focus && !state.focus.group ? state.focus.members[0] : null);
  const shown = (n) => stays(n) || n.cumulative <= state.prune || state.pinned.has(n) || single() === n;

  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const known = (ids) => (Array.isArray(ids) ? ids.map((id) => byId.get(id)).filter(Boolean) : []);
    const prune = Number.parseFloat(asked.get("prune"));
    state.prune = Number.isFinite(prune) ? Math.min(1, Math.max(0, prune)) : 1;
    state.groups = [];
    try {
      for (const [title, ids] of JSON.parse(asked.get("groups") ?? "[]")) addGroup(String(title), known(ids));
    } catch {
      say("The groups in this page's address cannot be read.");
    }
    state.pinned = new Set([...known(asked.getAll("pin")), ...state.groups.flatMap((group) => group.members)]);
    const wanted = byId.get(asked.get("select"));
    state.focus = wanted ? { members: [wanted], group: null } : null;
  }

  function writeAddress() {
    const kept = new URLSearchParams();
    const grouped = new Set(state.groups.flatMap((group) => group.members));
    if (single()) kept.set("select", single().id);
    for (const n of state.pinned) if (!grouped.has(n)) kept.append("pin", n.id);
    if (state.groups.length) {
      kept.set("groups", JSON.stringify(state.groups.map((group) => [group.title, group.members.map((n) => n.id)])));
    }
    if (state.prune < 1) kept.set("prune", String(state.prune));
    try {
      history.replaceState(null, "", kept.toString() ? `#${kept}` : location.pathname + location.search);
    } catch {
      // A page shown inside another one may not be allowed an address of its own.
    }
  }

  function addGroup(title, members) {
    const used = new Set(state.groups.map((group) => group.colour));
    const colour = GROUP_COLOURS.find((c) => !used.has(c)) ?? GROUP_COLOURS[state.groups.length % GROUP_COLOURS.length];
    if (members.length) state.groups.push({ title, members, colour });
  }

  // ---------------------------------------------------------------- the drawing

  const svg = d3.select("#graph");
  svg.append("clipPath").attr("id", "inside").append("rect");
  svg.append("clipPath").attr("id", "beside").append("rect");
  svg.append("rect").attr("class", "floor").attr("width", "100%").attr("height", "100%");
  const plot = svg.append("g").attr("clip-path", "url(#inside)").append("g");
  const backdrop = plot.append("g");
  const wires = plot.append("g");
  const dots = plot.append("g");
  const names = svg.append("g").attr("clip-path", "url(#inside)").attr("aria-hidden", "true").append("g");
  const layerAxis = svg.append("g").attr("clip-path", "url(#beside)").attr("aria-hidden", "true").append("g");
  const tokenAxis = svg.append("g").attr("aria-hidden", "true");
  let view = d3.zoomIdentity;
  let box = { width: 0, height: 0 };

  function drawBackdrop() {
    backdrop.selectAll("rect").data(columns).join("rect").attr("class", "column")
      .attr("x", (c) => c.left).attr("width", (c) => c.width).attr("height", size.height)
      .attr("fill-opacity", (_, i) => (i % 2 ? 0 : 1));
    backdrop.selectAll("line").data(levels.slice(0, -1)).join("line").attr("class", "row")
      .attr("x2", size.width).attr("y1", (l) => l.middle - l.height / 2).attr("y2", (l) => l.middle - l.height / 2);
  }

  function drawNodes() {
    dots.selectAll("path").data(nodes).join("path")
      .attr("transform", (n) => `translate(${n.x.toFixed(2)},${n.y.toFixed(2)})`)
      .attr("d", (n) => d3.symbol(SHAPES[n.kind], (n.kind === "feature" ? Math.PI : 3) * n.r * n.r)())
      .attr("data-id", (n) => n.id)
      .attr("role", "button").attr("tabindex", -1);
  }

  /** The node meant by a pointer: the one under it, or the nearest within reach, for dots are small. */
  function pointed(event) {
    const under = d3.select(event.target).datum();
    if (under?.kind) return under;
    const [x, y] = view.invert(d3.pointer(event, svg.node()));
    const far = (n) => Math.hypot(n.x - x, n.y - y) - n.r;
    const nearest = d3.least(nodes.filter(shown), far);
    return nearest && far(nearest) * view.k < 7 ? nearest : null;
  }

  /** What the marked nodes say about every other node: weight into them and out of them, summed. */
  function neighbours() {
    const members = new Set(state.focus?.members ?? []);
    const into = new Map(), out = new Map(), drawn = [];
    for (const n of members) {
      for (const link of n.into) {
        if (members.has(link.source)) continue;
        into.set(link.source, (into.get(link.source) ?? 0) + link.weight);
        if (shown(link.source)) drawn.push(link);
      }
      for (const link of n.out) {
        if (members.has(link.target)) continue;
        out.set(link.target, (out.get(link.target) ?? 0) + link.weight);
        if (shown(link.target)) drawn.push(link);
      }
    }
    return { members, into, out, drawn };
  }

  function colourNodes(near) {
    const strongest = d3.max([...near.into.values(), ...near.out.values()], Math.abs) || 1;
    const shade = (n) => {
      const weight = (near.into.get(n) ?? 0) + (near.out.get(n) ?? 0);
      return d3.interpolateRgb(...(weight < 0 ? hues.minus : hues.plus))(0.15 + 0.85 * Math.sqrt(Math.min(1, Math.abs(weight) / strongest)));
    };
    const hues = { plus: [color("--plus-faint"), color("--plus")], minus: [color("--minus-faint"), color("--minus")] };
    const ring = new Map(state.groups.flatMap((group) => group.members.map((n) => [n, group.colour])));
    const current = single();
    const stop = current ?? nodes.find((n) => n.kind === "logit") ?? nodes.find(shown);
    dots.selectAll("path")
      .attr("class", (n) => {
        const linked = near.into.has(n) || near.out.has(n);
        const marks = { hidden: !shown(n), selected: near.members.has(n), pinned: state.pinned.has(n),
                        match: state.matches.has(n), far: state.focus && !linked && !state.pinned.has(n) };
        return `node ${n.kind}-node ${Object.keys(marks).filter((mark) => marks[mark]).join(" ")}`;
      })
      .style("fill", (n) => ((near.into.has(n) || near.out.has(n)) && !near.members.has(n) ? shade(n) : null))
      .style("stroke", (n) => ring.get(n) ?? null)
      .attr("tabindex", (n) => (n === stop ? 0 : -1))
      .attr("aria-label", (n) => aloud(n) + (state.pinned.has(n) ? ", pinned" : ""))
      .attr("aria-pressed", (n) => near.members.has(n));
  }

  /** A curve that leaves and arrives upright; within a column it bows, to the right if it adds, else to the left. */
  function curve({ source: s, target: t, weight }) {
    const middle = (s.y + t.y) / 2;
    const upright = Math.max(0, 1 - Math.abs(s.x - t.x) / 40);
    const bow = upright * Math.min(56, 0.2 * Math.abs(s.y - t.y)) * (weight < 0 ? -1 : 1);
    return `M${s.x},${s.y}C${s.x + bow},${middle} ${t.x + bow},${middle} ${t.x},${t.y}`;
  }

  function drawLinks(near) {
    const among = links.length && state.pinned.size
      ? [...state.pinned].flatMap((n) => n.out.filter((link) => state.pinned.has(link.target))) : [];
    const drawn = d3.sort(new Set([...near.drawn, ...among]), (link) => Math.abs(link.weight));
    const strongest = d3.max(drawn, (link) => Math.abs(link.weight)) || 1;
    const share = (link) => Math.abs(link.weight) / strongest;
    wires.selectAll("path").data(drawn, (link) => link.i).join("path")
      .attr("class", (link) => `link ${link.weight < 0 ? "minus" : "plus"}`)
      .attr("d", curve)
      .attr("stroke-width", (link) => 0.6 + 4.4 * share(link))
      .attr("stroke-opacity", (link) => 0.18 + 0.62 * Math.sqrt(share(link)))
      .order();
  }

  // ---------------------------------------------------------------- axes and names: never scaled, so always legible

  function drawAxes() {
    const here = new Set((state.focus?.members ?? []).map((n) => n.position));
    const floorY = box.height - MARGIN.bottom;
    backdrop.selectAll("rect").classed("here", (_, i) => here.has(i))
      .style("fill-opacity", (_, i) => (here.has(i) ? 1 : null));
    const ticks = d3.sort(d3.range(columns.length), (i) => !here.has(i)).map((i) => {
      const x = view.applyX(columns[i].left + columns[i].width / 2);
      return { i, x, here: here.has(i), seen: x > MARGIN.left && x < box.width - 4 };
    });
    const kept = [];
    for (const tick of ticks) {
      if (tick.seen && (tick.here || kept.every((k) => Math.abs(k.x - tick.x) >= 13))) kept.push(tick);
    }
    tokenAxis.selectAll("text.token").data(kept, (t) => t.i).join("text")
      .attr("class", (t) => `token${t.here ? " here" : ""}`)
      .attr("transform", (t) => `translate(${t.x + 4},${floorY + 14}) rotate(-52)`)
      .text((t) => cut(visible(data.tokens[t.i]), 14));
    const before = ticks.filter((t) => t.x <= MARGIN.left).length;
    const after = ticks.filter((t) => t.x >= box.width - 4).length;
    const beyond = [{ n: before, text: `‹ ${before} more`, x: 10, anchor: "start" },
                    { n: after, text: `${after} more ›`, x: box.width - 10, anchor: "end" }];
    tokenAxis.selectAll("text.beyond").data(beyond).join("text").attr("class", "beyond").attr("x", (b) => b.x)
      .attr("y", box.height - 10).style("text-anchor", (b) => b.anchor).text((b) => (b.n ? b.text : ""));
    drawLayerAxis();
  }

  function drawLayerAxis() {
    const labels = levels.map((l, j) => ({ j, y: view.applyY(l.middle) }));
    const step = Math.max(1, Math.ceil(13 / (view.k * d3.min(levels, (l) => l.height))));
    const kept = labels.filter((l) => l.j === 0 || l.j === rows - 1 || (l.j - 1) % step === 0);
    layerAxis.selectAll("text").data(kept, (l) => l.j).join("text").attr("class", "layer")
      .attr("x", MARGIN.left - 10).attr("y", (l) => l.y + 4)
      .text((l) => (l.j === 0 ? "tokens" : l.j === rows - 1 ? "logits" : `L${l.j - 1}`));
  }

  /** Names to write: of logits always, of the selected node, of pinned ones, and of groups once each. */
  function wanted() {
    const found = [];
    const grouped = new Set(state.groups.flatMap((group) => group.members));
    for (const group of state.groups) {
      const n = d3.least(group.members, (m) => m.y);
      found.push({ key: group.colour, n, text: visible(group.title), colour: group.colour, strong: true });
    }
    const chosen = single();
    for (const n of new Set([...(chosen ? [chosen] : []), ...state.pinned])) {
      if (n.kind !== "logit" && n.kind !== "token" && (!grouped.has(n) || n === chosen)) {
        found.push({ key: n.i, n, text: name(n), strong: n === chosen });
      }
    }
    return found;
  }

  function drawNames() {
    const taken = [];
    const free = (r) => taken.every((t) => r.x1 < t.x0 || r.x0 > t.x1 || r.y1 < t.y0 || r.y0 > t.y1);
    const labels = wanted().map((label) => {
      const [x, y] = view.apply([label.n.x, label.n.y]);
      const text = cut(label.text, 30);
      const half = 3.4 * text.length + 3;
      const away = label.n.r * view.k + 6;
      const spots = [y - away, y + away + 9, y - away - 15, y + away + 24].map((base) =>
        ({ base, x0: x - half, x1: x + half, y0: base - 11, y1: base + 3 }));
      const spot = spots.find(free) ?? spots[0];
      taken.push(spot);
      return { ...label, text, x, y: spot.base };
    });
    names.selectAll("text.plain-name").data(labels, (l) => l.key).join("text")
      .attr("class", (l) => `plain-name name${l.strong ? " strong" : ""}`).style("fill", (l) => l.colour ?? null)
      .attr("x", (l) => l.x).attr("y", (l) => l.y).text((l) => l.text);
    drawLogitNames();
  }

  function drawLogitNames() {
    const kept = [];
    const logits = nodes.filter((n) => n.kind === "logit");
    const chosen = single();
    for (const n of d3.sort(logits, (m) => (m === chosen ? -2 : -(m.probability ?? m.influence)))) {
      const x = view.applyX(n.x);
      if (kept.every((k) => Math.abs(k.x - x) >= 13)) kept.push({ n, x });
    }
    names.selectAll("text.logit").data(kept, (l) => l.n.i).join("text")
      .attr("class", (l) => `name logit${state.focus?.members.includes(l.n) || state.pinned.has(l.n) ? " on" : ""}`)
      .attr("transform", (l) => `translate(${l.x + 3},${view.applyY(l.n.y) - 5.5 * view.k - 5}) rotate(-48)`)
      .text(({ n }) => cut(name(n), 13) + (n.probability === null ? "" : ` ${percent(n.probability, 0)}`));
  }

  // ---------------------------------------------------------------- zoom

  const zoom = d3.zoom()
    .filter((event) => !(event.type === "wheel" && event.shiftKey) && !event.button)
    .on("zoom", ({ transform }) => {
      view = transform;
      plot.attr("transform", view);
      element("tip").hidden = true;
      drawAxes();
      drawNames();
    });
  svg.call(zoom).on("dblclick.zoom", null)
    .on("click", (event) => {
      const n = pointed(event);
      if (n) select(n, false); // where it is: a double-click's second half must find it there
      else clear();
    })
    .on("dblclick", (event) => {
      const n = pointed(event);
      if (n) pin(n);
    })
    .on("pointermove", (event) => {
      const n = event.buttons ? null : pointed(event);
      svg.style("cursor", n ? "pointer" : null);
      if (n) showTip(n);
      else element("tip").hidden = true;
    })
    .on("pointerleave", () => { element("tip").hidden = true; });
  svg.on("wheel.across", (event) => {
    if (!event.shiftKey) return;
    event.preventDefault();
    svg.call(zoom.translateBy, -(event.deltaX || event.deltaY) / view.k, 0);
  });

  function measure() {
    const { width, height } = element("stage").getBoundingClientRect();
    box = { width, height };
    const inside = { x: MARGIN.left, y: 0, width: width - MARGIN.left, height: height - MARGIN.bottom };
    for (const [key, value] of Object.entries(inside)) svg.select("#inside rect").attr(key, Math.max(0, value));
    svg.select("#beside rect").attr("width", MARGIN.left).attr("height", Math.max(0, height - MARGIN.bottom));
    zoom.extent([[0, 0], [width, height]])
      .translateExtent([[-width, -height], [size.width + width, size.height + height]]);
  }

  const across = () => Math.max(100, box.width - MARGIN.left - MARGIN.right);
  const upright = () => Math.max(100, box.height - MARGIN.top - MARGIN.bottom);

  /** Of a whole graph, unless its dots would be too small to hit. */
  function scale(width, height) {
    return Math.max(Math.min(across() / width, upright() / height, 1.6), Math.min(0.6, upright() / height));
  }

  /** All of the graph, or as much as `scale` allows: then the end of the prompt, where the answer is. */
  function fit() {
    measure();
    const k = scale(size.width, size.height);
    zoom.scaleExtent([0.7 * Math.min(across() / size.width, k), 8]);
    const spare = across() - size.width * k;
    const x = MARGIN.left + (spare < 0 ? spare : spare / 2);
    svg.call(zoom.transform, d3.zoomIdentity.translate(x, MARGIN.top + (upright() - size.height * k) / 2).scale(k));
  }

  function bringIntoView(n) {
    const [x, y] = view.apply([n.x, n.y]);
    const beyond = (at, low, high) => (at < low ? low - at : at > high ? high - at : 0);
    const dx = beyond(x, MARGIN.left + 40, box.width - 60);
    const dy = beyond(y, 70, box.height - MARGIN.bottom - 20);
    if (dx || dy) svg.call(zoom.translateBy, dx / view.k, dy / view.k);
  }

  // ---------------------------------------------------------------- what one can do

  function update() {
    const near = neighbours();
    colourNodes(near);
    drawLinks(near);
    drawAxes();
    drawNames();
    drawPanel(near);
    const prunable = nodes.filter((n) => !stays(n));
    const left = prunable.filter(shown).length;
    element("prune").value = state.prune;
    element("kept").textContent = `${percent(state.prune, 0)}: ${left} of ${prunable.length}`;
    writeAddress();
  }

  function select(n, pan = true) {
    state.focus = { members: [n], group: null };
    element("tip").hidden = true;
    update();
    if (pan) bringIntoView(n);
    dots.selectAll("path").filter((m) => m === n).node().focus({ preventScroll: true });
  }

  function selectGroup(group) {
    state.focus = { members: group.members, group };
    update();
  }

  function clear() {
    if (state.focus) {
      state.focus = null;
      update();
    }
  }

  function pin(n) {
    if (!n) return say("Select a node first, then pin it.");
    if (!state.pinned.delete(n)) state.pinned.add(n);
    for (const group of state.groups) group.members = group.members.filter((m) => state.pinned.has(m));
    state.groups = state.groups.filter((group) => group.members.length);
    update();
    say(`${name(n)}: ${state.pinned.has(n) ? "pinned" : "no longer pinned"}`);
  }

  function groupPinned() {
    const grouped = new Set(state.groups.flatMap((group) => group.members));
    const loose = [...state.pinned].filter((n) => !grouped.has(n));
    if (!loose.length) return say("Pin the nodes to group first (p, or double-click).");
    addGroup(`Group ${state.groups.length + 1}`, loose);
    update();
    const fields = element("panel").querySelectorAll(".group input");
    fields[fields.length - 1].select();
  }

  let quiet;
  function say(text) {
    element("status").textContent = text;
    element("status").classList.add("on");
    clearTimeout(quiet);
    quiet = setTimeout(() => element("status").classList.remove("on"), 2200);
  }

  function showTip(n) {
    const tip = element("tip");
    tip.hidden = n === single(); // the panel says it all
    const strength = n.activation === null ? "" : ` · activation ${number(n.activation)}`;
    const odds = n.probability === null ? "" : ` · probability ${percent(n.probability)}`;
    const share = stays(n) ? "" : ` · influence ${percent(n.influence)}`;
    tip.replaceChildren(make("span", "", name(n)), make("small", "", place(n) + strength + odds + share));
    const [x, y] = view.apply([n.x, n.y]);
    tip.style.left = `${Math.max(8, Math.min(x + 14, box.width - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, y - tip.offsetHeight - n.r * view.k - 8)}px`;
  }

  // ---------------------------------------------------------------- the panel

  function make(tag, className, text, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    made.append(...children.filter(Boolean));
    return made;
  }

  function button(className, text, key, act) {
    const made = make("button", className, text);
    made.type = "button";
    made.dataset.key = key;
    made.addEventListener("click", act);
    return made;
  }

  function facts(pairs) {
    return make("dl", "", "", ...pairs.filter(([, value]) => value !== null).flatMap(([what, value]) =>
      [make("dt", "", what), make("dd", "", String(value))]));
  }

  function entry(n, where, weight, strongest) {
    const side = weight < 0 ? "minus" : "plus";
    const what = make("span", "what", name(n), make("small", "", place(n)));
    const row = button(`entry${shown(n) ? "" : " pruned"}`, "", `${where}-${n.i}`, () => select(n));
    row.append(what);
    row.title = `${name(n)} (${place(n)})${shown(n) ? "" : ", pruned"}`;
    if (weight === null) return row;
    const bar = make("span", `bar ${side}`);
    bar.style.width = `${(100 * Math.abs(weight)) / strongest}%`;
    row.append(make("span", `weight ${side}`, signed(weight)), bar);
    return row;
  }

  function linkList(title, where, weights) {
    const sorted = d3.sort(weights, ([, weight]) => -Math.abs(weight));
    const strongest = Math.abs(sorted[0]?.[1] ?? 1) || 1;
    const list = make("div", "links");
    list.dataset.side = where;
    list.append(make("h3", "", title, make("span", "", `  ${sorted.length}`)));
    const add = (some) => list.append(...some.map(([n, weight]) => entry(n, where, weight, strongest)));
    add(sorted.slice(0, LISTED));
    if (sorted.length > LISTED) {
      const more = button("plain small", `show all ${sorted.length}`, `${where}-more`, () => {
        more.remove();
        add(sorted.slice(LISTED));
      });
      list.append(more);
    }
    return list;
  }

  function examples(n) {
    if (!n.examples.length) return null;
    const strongest = d3.max(n.examples.flat(), ([, value]) => value) || 1;
    return make("div", "examples", "", make("h3", "", "Where it is strong"), ...n.examples.map((window) =>
      make("p", "example", "", ...window.map(([text, value]) => {
        const span = make("span", "", text.replace(/\n/g, "↵\n"));
        if (value > 0) span.style.backgroundColor = `rgb(var(--heat) / ${0.08 + 0.82 * (value / strongest)})`;
        span.title = number(value);
        return span;
      }))));
  }

  function tokenList(title, entries) {
    return make("div", "", "", make("h3", "", title), ...entries.map(([text, value]) => {
      const side = value < 0 ? "minus" : "plus";
      const weight = make("span", `weight ${side}`, signed(value));
      return make("div", "entry", "", make("span", "what", visible(text)), weight);
    }));
  }

  function nodeHead(n) {
    const pinned = state.pinned.has(n);
    const toggle = button("plain", pinned ? "Pinned" : "Pin", "pin", () => pin(n));
    toggle.setAttribute("aria-pressed", pinned);
    const kind = { feature: "Feature", token: "Token", logit: "Logit", error: "Error of a base MLP" }[n.kind];
    return [
      make("div", "head", "", make("h2", "", name(n)), toggle),
      facts([
        ["what", n.kind === "feature" ? `${kind} ${numberOf(n)}` : kind],
        ["where", `${stays(n) ? "" : `layer ${n.layer}, `}position ${n.position}, ${token(n)}`],
        ["activation", n.activation === null ? null : number(n.activation)],
        ["probability", n.probability === null ? null : percent(n.probability)],
        ["influence", stays(n) ? null : `${percent(n.influence)}, within the first ${percent(n.cumulative)}`],
      ]),
    ];
  }

  function linkLists(near) {
    return make("div", "", "", linkList("Inputs", "in", near.into), linkList("Outputs", "out", near.out));
  }

  function groupList() {
    const loose = [...state.pinned].filter((n) => !state.groups.some((group) => group.members.includes(n)));
    if (!state.pinned.size) return null;
    const entries = state.groups.map((group, i) => {
      const dot = make("i");
      dot.style.background = group.colour;
      const field = make("input");
      field.value = group.title;
      field.dataset.key = `group-${i}`;
      field.setAttribute("aria-label", `Name of group ${i + 1}`);
      field.addEventListener("input", () => {
        group.title = field.value;
        drawNames();
        writeAddress();
      });
      const show = button("plain small", `show ${group.members.length}`, `show-${i}`, () => selectGroup(group));
      const drop = button("plain small", "remove", `drop-${i}`, () => {
        state.groups.splice(state.groups.indexOf(group), 1);
        if (state.focus?.group === group) state.focus = null;
        update();
      });
      return make("div", "group", "", dot, field, show, drop);
    });
    const join = loose.length ? button("plain small", "group these (g)", "group", groupPinned) : null;
    const tools = make("div", "group", "", join,
      button("plain small", "clear pins", "unpin", () => {
        state.pinned.clear();
        state.groups = [];
        if (state.focus?.group) state.focus = null;
        update();
      }));
    return make("section", "pins", "", make("h3", "", "Pinned and grouped"), ...entries,
      ...loose.map((n) => entry(n, "pinned", null, 1)), tools);
  }

  function welcome() {
    const keys = [["← →", "node to the left or right in its layer"],
                  ["↑ ↓", "nearest node of the layer above or below"],
                  ["p", "pin the node (or double-click)"], ["g", "group what is pinned"], ["/", "search"],
                  ["+ − 0", "zoom in, out, fit"], ["Esc", "clear the selection"]];
    const list = make("dl", "keys", "", ...keys.flatMap(([key, what]) =>
      [make("dt", "", "", ...key.split(" ").map((k) => make("kbd", "", k))), make("dd", "", what)]));
    const strongest = d3.sort(nodes.filter((n) => n.kind === "feature" && shown(n)), (n) => -n.influence).slice(0, 12);
    const most = strongest[0]?.influence || 1;
    const entries = strongest.map((n) => {
      const row = entry(n, "top", n.influence, most);
      row.querySelector(".weight").textContent = percent(n.influence);
      for (const coloured of row.querySelectorAll(".plus")) coloured.classList.remove("plus");
      return row;
    });
    const hint = "Its inputs and outputs are drawn, and listed here with their weights. " +
      "This page's address keeps what is selected, pinned, grouped and pruned.";
    return [make("h2", "", "Select a node"), make("p", "soft", hint), list,
            entries.length ? make("h3", "", "Most influential features") : null, ...entries];
  }

  function nodePart(n, near) {
    const effects = n.top.length || n.bottom.length;
    return [...nodeHead(n), linkLists(near), examples(n),
            effects ? make("div", "pair", "", tokenList("Raises", n.top), tokenList("Lowers", n.bottom)) : null];
  }

  function groupPart(group, near) {
    return [make("h2", "", visible(group.title)),
            make("p", "soft", `A group of ${group.members.length}; links summed over its members.`),
            linkLists(near), make("h3", "", "Members"), ...group.members.map((n) => entry(n, "member", null, 1))];
  }

  function aboutPart(open) {
    const pairs = Object.entries(data.about).map(([what, value]) => [what, measured(value)]);
    const part = make("details", "about", "", make("summary", "", "About this graph"), facts(pairs));
    part.open = open;
    return part;
  }

  let before = null;
  function drawPanel(near) {
    const panel = element("panel");
    const key = panel.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const open = panel.querySelector("details")?.open ?? !state.focus;
    const group = state.focus?.group;
    const parts = single() ? nodePart(single(), near) : group ? groupPart(group, near) : welcome();
    panel.replaceChildren(...[...parts, groupList(), aboutPart(open)].filter(Boolean));
    if (key) [...panel.querySelectorAll("[data-key]")].find((e) => e.dataset.key === key)?.focus();
    if (before !== state.focus) panel.scrollTop = 0;
    before = state.focus;
  }

  // ---------------------------------------------------------------- search

  function rank(n, query) {
    if (/^\d+\/\d*$/.test(query)) return numberOf(n) === query ? 0 : numberOf(n).startsWith(query) ? 1 : null;
    if (name(n).toLowerCase().includes(query)) return n.kind === "token" ? 3 : 2;
    return data.tokens[n.position].toLowerCase().includes(query) ? 4 : null;
  }

  function search() {
    const query = element("search").value.trim().toLowerCase();
    const hits = query ? nodes.map((n) => ({ n, rank: rank(n, query) })).filter((hit) => hit.rank !== null) : [];
    const best = d3.sort(hits, (a, b) => a.rank - b.rank || b.n.influence - a.n.influence).slice(0, 40);
    state.matches = new Set(hits.filter((hit) => hit.rank < 4).map((hit) => hit.n));
    const found = element("found");
    found.hidden = !query;
    found.replaceChildren(...best.map(({ n }) => entry(n, "found", null, 1)),
      ...(best.length ? [] : [make("p", "", "No node by that name.")]));
    colourNodes(neighbours());
  }

  function endSearch() {
    element("search").value = "";
    search();
  }

  element("search").addEventListener("input", search);
  element("find").addEventListener("keydown", (event) => {
    const entries = [...element("found").querySelectorAll(".entry")];
    const at = entries.indexOf(document.activeElement);
    if (event.key === "Enter" && at < 0) entries[0]?.click();
    else if (event.key === "ArrowDown") entries[Math.min(at + 1, entries.length - 1)]?.focus();
    else if (event.key === "ArrowUp") (at > 0 ? entries[at - 1] : element("search")).focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  element("found").addEventListener("click", endSearch);
  element("stage").addEventListener("pointerdown", () => { element("found").hidden = true; });

  // ---------------------------------------------------------------- keys

  function step(key) {
    const seen = nodes.filter(shown);
    const from = single() ?? nodes[dots.selectAll("path").nodes().indexOf(document.activeElement)];
    if (!from) return seen.find((n) => n.kind === "logit") ?? seen[0];
    if (key === "ArrowLeft" || key === "ArrowRight") {
      const row = d3.sort(seen.filter((n) => n.layer === from.layer), (a, b) => a.x - b.x || a.i - b.i);
      return row[row.indexOf(from) + (key === "ArrowRight" ? 1 : -1)];
    }
    const up = key === "ArrowUp" ? 1 : -1;
    const beyond = seen.filter((n) => (n.layer - from.layer) * up > 0);
    const next = d3.min(beyond, (n) => n.layer * up);
    return d3.least(beyond.filter((n) => n.layer * up === next), (n) => Math.abs(n.x - from.x));
  }

  const KEYS = {
    p: () => pin(single()),
    g: groupPinned,
    "/": () => element("search").focus(),
    "+": () => svg.call(zoom.scaleBy, 1.3),
    "=": () => svg.call(zoom.scaleBy, 1.3),
    "-": () => svg.call(zoom.scaleBy, 1 / 1.3),
    0: fit,
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inField = event.target.tagName === "INPUT";
    if (event.key === "Escape") {
      if (inField) event.target.blur();
      if (element("search").value) endSearch();
      else if (!inField) clear();
    } else if (inField) {
      if (event.key === "Enter") event.target.blur();
    } else if (event.key.startsWith("Arrow") && (event.target === document.body || svg.node().contains(event.target))) {
      event.preventDefault();
      const next = step(event.key);
      if (next) select(next);
    } else if ((event.key === "Enter" || event.key === " ") && event.target.__data__?.id) {
      event.preventDefault();
      select(event.target.__data__);
    } else if (KEYS[event.key]) {
      event.preventDefault();
      KEYS[event.key]();
    }
  });

  // ---------------------------------------------------------------- export

  const PAINT = { fill: "", "fill-opacity": "1", stroke: "none", "stroke-width": "1px", "stroke-opacity": "1",
                  "stroke-dasharray": "none", "stroke-linejoin": "miter", "stroke-linecap": "butt",
                  "paint-order": "normal", "font-family": "", "font-size": "", "font-weight": "400",
                  "text-anchor": "start" };
  const SCREEN_ONLY = ["class", "style", "tabindex", "role", "aria-pressed"];

  /** What is on the screen as an SVG that needs no style sheet; what is hidden is left out. */
  function standalone() {
    const copy = svg.node().cloneNode(true);
    const originals = [svg.node(), ...svg.node().querySelectorAll("*")];
    const copies = [copy, ...copy.querySelectorAll("*")];
    originals.forEach((original, i) => {
      const style = getComputedStyle(original);
      for (const attribute of SCREEN_ONLY) copies[i].removeAttribute(attribute);
      if (style.display === "none") return copies[i].remove();
      for (const [key, usual] of Object.entries(PAINT)) {
        const value = style.getPropertyValue(key);
        const font = key.startsWith("font") || key === "text-anchor";
        if (value !== usual && (!font || original.tagName === "text")) copies[i].setAttribute(key, value);
      }
    });
    copy.setAttribute("width", box.width);
    copy.setAttribute("height", box.height);
    copy.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
    return new XMLSerializer().serializeToString(copy);
  }

  function save(blob, ending) {
    const anchor = make("a");
    const words = data.title.match(/[\p{L}\p{N}]+/gu) ?? ["graph"];
    anchor.href = URL.createObjectURL(blob);
    anchor.download = `${words.join("-").slice(0, 60)}.${ending}`;
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
  }

  async function savePng() {
    const picture = new Image();
    picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone())}`;
    await picture.decode();
    const canvas = make("canvas");
    canvas.width = 2 * box.width;
    canvas.height = 2 * box.height;
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(blob, "png"), "image/png");
  }

  // ---------------------------------------------------------------- begin

  document.title = data.title;
  element("title").textContent = data.title;
  element("title").title = data.title;
  element("legend-error").hidden = !nodes.some((n) => n.kind === "error");
  element("prune").addEventListener("input", () => {
    state.prune = Number(element("prune").value);
    const n = single();
    if (n && !stays(n) && n.cumulative > state.prune && !state.pinned.has(n)) state.focus = null;
    update();
  });
  element("zoom-in").addEventListener("click", KEYS["+"]);
  element("zoom-out").addEventListener("click", KEYS["-"]);
  element("zoom-fit").addEventListener("click", fit);
  element("export-svg").addEventListener("click", () => {
    save(new Blob([standalone()], { type: "image/svg+xml" }), "svg");
  });
  element("export-png").addEventListener("click", () => {
    savePng().catch(() => say("The picture could not be made; save the SVG."));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
  addEventListener("hashchange", () => {
    readAddress();
    update();
  });
  new ResizeObserver(() => {
    measure();
    drawAxes();
    drawNames();
  }).observe(element("stage"));

  measure();
  layout();
  drawBackdrop();
  drawNodes();
  readAddress();
  fit();
  update();
  if (single()) bringIntoView(single());
  document.body.dataset.ready = String(Math.round(performance.now() - started));
})();
