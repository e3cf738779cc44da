"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, several = runs.length > 1, hidden = new Set();
const $ = id => document.getElementById(id);
const MARKED = 40;  // lines of at most this many points show each point
const MARKS = {better: "▲", worse: "▼"};
const DASHES = ["", "6 4", "2 3", "9 3 2 3", "1 5"];

function make(parent, tag, attributes = {}, text = null) {
  const svg = parent.namespaceURI === "http://www.w3.org/2000/svg" || tag === "svg";
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return parent.appendChild(node);
}

/** Append a name that may break after its underscores. */
function name(parent, text) {
  const parts = text.split(/(?<=_)/);
  parts.forEach((part, i) => { if (i) make(parent, "wbr"); parent.append(part); });
}

const color = i => `var(--c${i % 8})`;
const swatch = (parent, i) => make(parent, "span", {class: "swatch", style: `background: ${color(i)}`});

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return value.toLocaleString("en", {maximumSignificantDigits: 4, useGrouping: size >= 1e4});
}

// ---- header ----

$("title").textContent = several ? `${runs.length} runs` : runs[0].name;
runs.forEach((run, i) => {
  const box = make($("runs"), several ? "button" : "div", {class: "run"});
  swatch(box, i);
  if (several) make(box, "b", {}, run.name);
  make(box, "small", {}, [run.preset, run.method, run.state].filter(Boolean).join(" · "));
  if (!several) return;
  box.title = "show or hide the curves of this run";
  box.setAttribute("aria-pressed", true);
  box.onclick = () => {
    hidden[hidden.has(i) ? "delete" : "add"](i);
    box.setAttribute("aria-pressed", !hidden.has(i));
    charts.forEach(draw => draw());
  };
});
for (const section of document.querySelectorAll("section"))
  make($("sections"), "a", {href: `#${section.id}`}, section.querySelector("h2").textContent);

if (several) {
  const names = make(document.querySelector("nav"), "div", {class: "names"});
  runs.forEach((run, i) => { const one = make(names, "span"); swatch(one, i); one.append(run.name); });
}

/** Append a box that scrolls sideways, and a line above it that says so where something is cut. */
function wide(parent, attributes) {
  const hint = make(parent, "p", {class: "cut", hidden: ""}, "wider than this window: scroll sideways →");
  const box = make(parent, "div", {tabindex: 0, ...attributes});
  new ResizeObserver(() => hint.hidden = box.scrollWidth <= box.clientWidth + 1).observe(box);
  return box;
}

// ---- tables ----

function table(parent, head) {
  const node = make(wide(parent, {class: "table"}), "table");
  const row = make(make(node, "thead"), "tr");
  head.forEach((text, i) => {
    const cell = make(row, "th", {scope: "col"});
    const run = i - (head.length - runs.length);
    if (several && run >= 0) swatch(cell, run);
    cell.append(text);
  });
  return make(node, "tbody");
}

function resultsTable() {
  if (!data.results.length) return missing($("results"), "No results yet: there is neither results.json nor metrics.csv.");
  data.verdicts.forEach(text => make($("results"), "p", {class: "verdict"}, text));
  if (data.caution) make($("results"), "p", {class: "about"}, data.caution);
  const scored = [...new Set(data.results.map(row => row.of))];
  // One run: a column for each encoder or epoch that was scored. Multiple runs: a column for each run.
  const body = table($("results"), ["", ...(several ? runs.map(run => run.name) : scored)]);
  body.parentNode.querySelectorAll("thead th:not(:first-child)").forEach(cell => cell.classList.add("number"));
  const line = (figure, of, cells) => {
    const row = make(body, "tr"), head = make(row, "th", {scope: "row"});
    name(make(head, "span", {class: "code"}), figure);
    if (of) make(head, "span", {class: "of"}, of);
    for (const [value, mark, before] of cells) {
      const cell = make(row, "td", {class: `number ${mark}`});
      if (before) make(cell, "span", {class: "before"}, `${before} → `);
      cell.append(value);
      if (mark) make(cell, "span", {class: "mark", title: `${mark} than at the start`, "aria-label": `, ${mark}`}, MARKS[mark]);
    }
  };
  // Multiple runs: the start's value is in the cell of the trained encoder, if there is one.
  const same = (row, isStart) => data.results.filter(one => one.name === row.name && one.start === isStart && one.of !== "best epoch");
  if (several) for (const row of data.results) {
    if (row.start && same(row, false).length) continue;
    const starts = row.of === "trained encoder" ? same(row, true) : [];  // runs may start from different encoders
    line(row.name, row.of, row.values.map((value, i) => [value, row.marks[i], starts.find(one => one.values[i])?.values[i]]));
  }
  else for (const figure of new Set(data.results.map(row => row.name))) line(figure, "", scored.map(of => {
    const row = data.results.find(one => one.of === of && one.name === figure);
    return row ? [row.values[0], row.marks[0]] : ["", ""];
  }));
  if (data.results.some(row => row.marks.some(Boolean))) make($("results"), "p", {class: "about"}, "▲ better, ▼ worse than at the start, on the same images.");
}

function settingsTable() {
  const {rows, differ} = data.settings;
  const presets = [...new Set(runs.map(run => run.preset))].join(", ");
  if (!rows.length) return missing($("settings"), `All settings equal the preset ${presets}.`);
  const which = several ? "Settings in which a run differs from its preset, or runs differ from each other" : `Settings that differ from the preset ${presets}`;
  const box = make($("settings"), "details");
  make(box, "summary", {}, `${which}: ${rows.length}.` + (several && !differ ? " The runs do not differ." : ""));
  const body = table(box, ["", "preset", ...runs.map(run => several ? run.name : "this run")]);
  for (const {name: setting, comment, preset, values} of rows) {
    const row = make(body, "tr"), head = make(row, "th", {scope: "row"});
    name(make(head, "span", {class: "code"}), setting);
    make(head, "small", {}, comment);
    make(row, "td", {class: "code plain"}, preset);
    values.forEach(({text, changed}) => make(row, "td", {class: changed ? "code" : "code plain"}, text));
  }
}

/** What the settings mean in words and numbers, folded. */
function effectiveTable() {
  if (!data.effective.length) return;
  const folded = make($("settings"), "details");
  make(folded, "summary", {}, "Effective settings, with the numbers that come from the data set or from a rule");
  const body = table(folded, ["", ...runs.map(run => several ? run.name : "this run")]);
  for (const {name: part, values} of data.effective) {
    const row = make(body, "tr");
    make(row, "th", {scope: "row"}, part);
    values.forEach(value => make(row, "td", {}, value));
  }
}

const missing = (parent, text) => make(parent, "p", {class: "missing"}, text);

// ---- curves ----

const stepsOf = (file, line) => runs[line.run].steps_per_epoch[file.split("/")[0]];
const canBeEpochs = data.figures.every(figure => figure.lines.every(line => stepsOf(figure.file, line)));
let smoothing = 0, along = "step";
const charts = [];
const place = (file, line, step) => along === "epoch" ? step / stepsOf(file, line) : step;

/** Exponential moving average with bias correction (as in Adam). */
function smooth(values) {
  let mean = 0, weight = 0;
  return values.map(value => {
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return mean / weight;
  });
}

/** Return about n round numbers that cover [low, high]. */
function ticks(low, high, n) {
  const rough = (high - low) / n, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find(factor => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}

function chart(figure, index) {
  const box = make($("figures"), "figure", {class: "chart", id: `figure-${index}`, "data-title": figure.title});
  const caption = make(box, "figcaption");
  make(caption, "h3", {}, figure.title);
  if (figure.healthy) make(caption, "p", {}, figure.healthy);
  const names = [...new Set(figure.lines.map(line => line.name))];
  // One run: a color for each column. Multiple runs: a color for each run, a dash pattern for each column.
  const colorOf = line => color(several ? line.run : names.indexOf(line.name));
  const dashOf = line => several ? DASHES[names.indexOf(line.name) % DASHES.length] : "";
  if (names.length > 1) {
    const legend = make(box, "div", {class: "legend"});
    for (const name of names) {
      const line = figure.lines.find(one => one.name === name), item = make(legend, "span", {title: name});
      const key = make(item, "svg", {viewBox: "0 0 22 8", "aria-hidden": true});
      make(key, "path", {d: "M1 4H21", "stroke-width": 2, "stroke-dasharray": dashOf(line), style: `stroke: ${several ? "var(--text)" : colorOf(line)}`});
      item.append(line.label);
    }
  }
  const plot = make(box, "svg", {class: "plot", tabindex: 0, role: "img", "aria-label": `${figure.title}: ${names.join(", ")}`});
  const tip = make(box, "div", {class: "tip"});
  let shown = [], toX, toY, frame, cursor = null;

  function draw() {
    plot.replaceChildren();
    shown = figure.lines.filter(line => !hidden.has(line.run)).map(line => {
      const isLong = line.x.length > MARKED;
      const isSmoothed = isLong && smoothing > 0 && !figure.is_schedule;
      return {...line, isLong, isSmoothed, xs: line.x.map(step => place(figure.file, line, step)), ys: isSmoothed ? smooth(line.y) : line.y};
    });
    const width = plot.clientWidth, height = plot.clientHeight;
    if (!shown.length || !width) return;
    const xs = shown.flatMap(line => [line.xs[0], line.xs.at(-1)]);
    let [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Infinity, -Infinity];
    for (const line of shown) for (const y of line.y) { low = Math.min(low, y); high = Math.max(high, y); }
    if (figure.from_zero) low = Math.min(0, low);
    if (low === high) [low, high] = [low - Math.max(Math.abs(low) * 0.1, 1e-3), high + Math.max(Math.abs(high) * 0.1, 1e-3)];
    if (left === right) [left, right] = [left - 1, right + 1];
    const margin = (high - low) * 0.05;
    [low, high] = [low >= 0 && low < margin ? 0 : low - margin, high + margin];
    const rows = ticks(low, high, 5), widest = Math.max(...rows.map(y => number(y).length));
    frame = {left: widest * 7 + 8, right: width - 10, top: 6, bottom: height - 34};
    toX = x => frame.left + (x - left) / (right - left) * (frame.right - frame.left);
    toY = y => frame.bottom - (y - low) / (high - low) * (frame.bottom - frame.top);
    for (const y of rows) {
      make(plot, "line", {class: "grid", x1: frame.left, x2: frame.right, y1: toY(y), y2: toY(y)});
      make(plot, "text", {x: frame.left - 6, y: toY(y) + 4, "text-anchor": "end"}, number(y));
    }
    for (const x of ticks(left, right, Math.max(2, Math.floor(width / 90))))
      make(plot, "text", {x: toX(x), y: frame.bottom + 16, "text-anchor": "middle"}, number(x));
    make(plot, "text", {x: frame.right, y: height - 2, "text-anchor": "end"}, along);
    for (const line of shown) {
      const style = `stroke: ${colorOf(line)}`, path = ys => "M" + line.xs.map((x, i) => `${toX(x).toFixed(1)} ${toY(ys[i]).toFixed(1)}`).join("L");
      if (line.isSmoothed) make(plot, "path", {class: "raw", d: path(line.y), style});
      make(plot, "path", {class: "line", d: path(line.ys), style, "stroke-dasharray": dashOf(line)});
      if (!line.isLong) line.xs.forEach((x, i) => make(plot, "circle", {cx: toX(x), cy: toY(line.ys[i]), r: 3, style: `fill: ${colorOf(line)}`}));
    }
    if (cursor !== null) point(cursor);
  }

  /** Show the values at x, in units of the axis. */
  function point(x) {
    plot.querySelectorAll(".cursor, .at").forEach(node => node.remove());
    const lines = shown.map(line => ({...line, at: nearest(line.xs, x)}));
    const best = lines.reduce((a, b) => Math.abs(a.xs[a.at] - x) <= Math.abs(b.xs[b.at] - x) ? a : b);
    cursor = best.xs[best.at];
    make(plot, "line", {class: "cursor", x1: toX(cursor), x2: toX(cursor), y1: frame.top, y2: frame.bottom});
    tip.replaceChildren();
    make(tip, "div", {}, `${along} ${number(cursor)}`);
    for (const line of lines) {
      const row = make(tip, "div"), y = line.ys[line.at], labels = [];
      make(plot, "circle", {class: "at", cx: toX(line.xs[line.at]), cy: toY(y), r: 4, style: `fill: ${colorOf(line)}`});
      make(row, "span", {class: "swatch", style: `background: ${colorOf(line)}`});
      if (several) labels.push(runs[line.run].name);
      if (names.length > 1 || !several) labels.push(line.label);
      make(row, "span", {}, labels.join(", "));
      make(row, "b", {}, number(y));
      if (line.isSmoothed) make(row, "small", {}, `(${number(line.y[line.at])})`);
    }
    // Above the plot, over the caption, so that it hides no curve.
    tip.style.display = "block";
    tip.style.left = 0;
    const [outer, inner] = [box.getBoundingClientRect(), plot.getBoundingClientRect()], width = tip.offsetWidth;
    const wanted = inner.left - outer.left + toX(cursor) - width / 2;
    tip.style.left = `${Math.max(4, Math.min(wanted, outer.width - width - 6))}px`;
    tip.style.top = `${inner.top - outer.top + frame.top - tip.offsetHeight}px`;
  }

  function away() {
    cursor = null;
    tip.style.display = "none";
    plot.querySelectorAll(".cursor, .at").forEach(node => node.remove());
  }

  const move = event => {
    if (!shown.length) return;
    const [first, second] = [toX(0), toX(1)], px = event.clientX - plot.getBoundingClientRect().left;
    point((px - first) / (second - first));
  };
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", away);
  plot.addEventListener("blur", away);
  plot.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === "Escape") away();
    if (!by || !shown.length) return;
    event.preventDefault();
    const all = [...new Set(shown.flatMap(line => line.xs))].sort((a, b) => a - b);
    const at = cursor === null ? (by > 0 ? -1 : all.length) : nearest(all, cursor);
    point(all[Math.min(all.length - 1, Math.max(0, at + by))]);
  });
  new ResizeObserver(draw).observe(plot);
  return draw;
}

function curves() {
  data.absent.forEach(text => $("curves").insertBefore(missing($("curves"), text), $("figures")));
  if (!data.figures.length) {
    $("controls").remove();
    return missing($("curves"), "No curves: there is no metrics.csv, or it has no rows yet.");
  }
  const longest = Math.max(...data.figures.flatMap(figure => figure.lines.map(line => line.x.length)));
  smoothing = longest > 150 ? 0.8 : longest > MARKED ? 0.5 : 0;
  $("smoothing").value = smoothing;
  if (longest <= MARKED) $("smoothing").parentNode.remove();
  if (!canBeEpochs) $("axis").remove();
  if (!$("controls").children.length) $("controls").remove();
  data.figures.forEach((figure, i) => charts.push(chart(figure, i)));
  const change = () => {
    smoothing = +$("smoothing")?.value || 0;
    along = $("along")?.value || "step";
    if ($("smoothed")) $("smoothed").textContent = smoothing ? smoothing.toFixed(2) : "none";
    charts.forEach(draw => draw());
  };
  $("controls")?.addEventListener("input", change);
  $("controls")?.addEventListener("submit", event => event.preventDefault());
  change();
}

// ---- pictures ----

/** Fill a section with a part for each run. With multiple runs, only the first part is open; others are filled when opened. */
function ofRuns(id, fill) {
  runs.forEach((run, i) => {
    const content = run[id];
    if (!several) return content.missing ? missing($(id), `Left out: ${content.missing}`) : fill($(id), content);
    const box = make($(id), "details"), head = make(box, "summary", {}, run.name);
    if (content.missing) return missing(box, `Left out: ${content.missing}`), box.open = true;
    const once = () => { if (box.open) { box.removeEventListener("toggle", once); fill(box, content); } };
    box.addEventListener("toggle", once);
    box.open = i === 0;
  });
}

function picture(parent, source, alt) {
  const image = make(parent, "img", {alt});
  image.onload = () => {
    if (Math.max(image.naturalWidth, image.naturalHeight) <= 64) image.classList.add("pixels");
  };
  image.src = source;
  return image;
}

/** A line of pictures for the original images and for each view, as wide as the page. */
function views(parent, {abreast, columns}) {
  const grid = make(parent, "div", {class: "views", style: `grid-template-columns: repeat(${abreast}, 1fr)`});
  columns.forEach(({caption: [title, ...lines], pictures}) => {
    const caption = make(grid, "div", {class: "caption"});
    make(caption, "b", {}, title);
    caption.append(lines.filter(Boolean).map(line => ` · ${line}`).join(""));
    pictures.forEach((source, i) => picture(grid, source, `${title}, image ${i + 1}`));
  });
}

function neighbors(parent, {about, rows}) {
  make(parent, "p", {class: "about"}, about);
  const grid = make(parent, "div", {class: "neighbors"});
  const card = (box, {picture: source, label, path, cosine}, kind) => {
    const figure = make(box, "figure", {class: kind, title: path}), caption = document.createElement("figcaption");
    picture(figure, source, label ?? path);
    figure.append(caption);
    if (label !== null) make(caption, "b", {}, label);
    make(caption, "span", {}, path.split("/").pop());
    make(caption, "span", {}, cosine === undefined ? "query" : `cosine ${cosine.toFixed(2)}`);
  };
  for (const {query, found} of rows) {
    const row = make(grid, "div", {class: "row"});
    card(row, query, "query");
    const near = make(row, "div", {class: "near"});
    for (const one of found) card(near, one, query.label === null || one.label === null ? "" : one.label === query.label ? "same" : "other");
  }
}

function map(parent, {page}) {
  make(parent, "iframe", {title: "map of the embeddings", sandbox: "allow-scripts", loading: "lazy"}).srcdoc = page;
}

// ---- commands and versions ----

function provenance() {
  for (const run of runs) {
    if (several) make($("provenance"), "h3", {}, run.name);
    const list = make($("provenance"), "dl", {class: "facts"});
    const fact = (name, value) => { make(list, "dt", {}, name); return make(list, "dd", {}, value); };
    run.commands.forEach((command, i) => fact(i ? "then" : "command", command).classList.add("code"));
    if (run.began) fact("last start", run.began);
    for (const [name, value] of Object.entries(run.facts)) fact(name, value);
  }
  make(document.querySelector("main"), "footer", {}, `Written on ${data.written} by self-supervised report.`);
}

resultsTable();
settingsTable();
effectiveTable();
curves();
ofRuns("views", views);
ofRuns("neighbors", neighbors);
ofRuns("map", map);
provenance();
