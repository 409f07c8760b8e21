"use strict";

// ---------------------------------------------------------------------------------------------------------------------
// Data

const report = JSON.parse(document.getElementById("data").textContent);
const pictureScripts = [...document.querySelectorAll("script.pictures")]; // cases in the order of report.cases
const element = (id) => document.getElementById(id);
const MAX_DOTS = 400; // cases drawn one by one in the distribution

/** The chosen metric of the chosen protocol: {name, title, factor, share, classes, intervals, values[case][class]}. */
let metric = null;

/** Mean of the numbers among the values, null if there are none. */
function mean(values) {
  const numbers = values.filter((value) => value !== null);
  return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null;
}

function format(value, factor) {
  return value === null ? "–" : (factor * value).toFixed(2);
}

/** Makes an element: attributes by name, children as nodes or text (never as HTML). */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function swatch(color) {
  return make("i", { class: "swatch", style: `background:${color}` });
}

// ---------------------------------------------------------------------------------------------------------------------
// Table of cases

const sorting = { column: 1, descending: false }; // worst first: by rising mean Dice

/** The table's columns: title, and the value of a case to sort and show; counts are shown as they are. */
function caseColumns() {
  const foreground = report.classes.slice(1);
  return [
    { title: "case", value: (n) => report.cases[n] },
    { title: `mean ${metric.title}`, value: (n) => mean(metric.values[n]), score: true },
    ...foreground.map((entry, c) => ({ title: entry.name, value: (n) => metric.values[n][c], score: true })),
    ...Object.entries(report.flags).map(([flag, counts]) => ({
      title: flag,
      value: (n) => counts[n].reduce((sum, count) => sum + count, 0),
    })),
  ];
}

/** Compares two cells: text by its numbers and letters, numbers by value, null last in both directions. */
function compareCells(a, b, descending) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
  return descending ? -order : order;
}

function sortBy(column, descending) {
  Object.assign(sorting, { column, descending });
  drawCaseTable();
  element("cases").tHead.rows[0].cells[column].firstChild.focus();
}

function drawCaseTable() {
  const columns = caseColumns();
  const head = columns.map(({ title }, index) => {
    const sorted = index === sorting.column;
    const direction = sorted ? (sorting.descending ? "descending" : "ascending") : null;
    const onclick = () => sortBy(index, sorted ? !sorting.descending : false);
    return make("th", { scope: "col", "aria-sort": direction }, make("button", { type: "button", onclick }, title));
  });
  const order = report.cases.map((_, n) => n);
  const { value } = columns[sorting.column];
  order.sort((a, b) => compareCells(value(a), value(b), sorting.descending) || a - b);
  const rows = order.map((n) => {
    const row = make("tr", { "data-case": n, "aria-current": n === view.case ? "true" : null }, caseName(n));
    for (const column of columns.slice(1)) row.append(caseCell(column, n));
    return row;
  });
  element("cases").replaceChildren(
    make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...rows),
  );
}

function caseName(n) {
  const id = report.cases[n];
  if (n >= pictureScripts.length) return make("th", { scope: "row", title: "no pictures, to keep the page small" }, id);
  const onclick = () => {
    openCase(n);
    element("viewer-card").scrollIntoView({ behavior: "smooth" });
  };
  return make("th", { scope: "row" }, make("button", { type: "button", title: "show", onclick }, id));
}

function caseCell({ value, score }, n) {
  const number = value(n);
  if (!score) return make("td", { class: number ? "bad" : "none" }, String(number));
  const cell = make("td", {}, format(number, metric.factor));
  if (metric.share && number !== null) {
    cell.className = "share";
    cell.style.setProperty("--share", Math.min(1, Math.max(0, number)));
  }
  return cell;
}

// ---------------------------------------------------------------------------------------------------------------------
// Distribution: a row a class, a dot a case, the mean and its interval

function drawDistribution() {
  const numbers = metric.values.flat().filter((value) => value !== null);
  const lowest = numbers.reduce((low, value) => Math.min(low, value), 0.9);
  const highest = numbers.reduce((high, value) => Math.max(high, value), 0);
  const start = metric.share ? Math.floor(10 * lowest) / 10 : Math.min(0, lowest);
  const end = metric.share ? 1 : highest || 1;
  const at = (value) => (100 * (value - start)) / (end - start);
  const rows = report.classes.slice(1).flatMap(({ name, color }, c) => {
    const track = make("div", { class: "track" });
    const interval = metric.intervals[c];
    if (interval) {
      const style = `left:${at(interval[0])}%;width:${at(interval[1]) - at(interval[0])}%`;
      track.append(make("i", { class: "spread", style }));
    }
    if (report.cases.length <= MAX_DOTS) {
      report.cases.forEach((id, n) => {
        const value = metric.values[n][c];
        if (value === null) return;
        const top = 28 + ((n * 7) % 12) * 4; // spread in height, so that equal scores stay apart
        const style = `left:${at(value)}%;top:${top}%;background:${color}`;
        const title = `${id}: ${format(value, metric.factor)}`;
        track.append(make("i", { class: "dot", style, title, onclick: () => openCase(n) }));
      });
    }
    if (metric.classes[c] !== null) {
      track.append(make("i", { class: "mean", style: `left:${at(metric.classes[c])}%` }));
    }
    return [make("span", {}, swatch(color), name), track, make("span", {}, format(metric.classes[c], metric.factor))];
  });
  const axisLabel = (value) => String(Number((metric.factor * value).toPrecision(3)));
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => make("span", {}, axisLabel(start + part * (end - start))));
  element("distribution").replaceChildren(
    ...rows,
    make("span"),
    make("div", { class: "axis" }, ...ticks),
    make("span", {}, "mean"),
  );
  const dots = report.cases.length <= MAX_DOTS ? "a dot a case, " : "";
  element("distribution-note").textContent = `${metric.title}: ${dots}the mean and its 95 % interval.`;
}

function fillMetrics() {
  const options = report.protocols[element("protocol").value];
  const before = element("metric").value;
  element("metric").replaceChildren(...options.map(({ name, title }) => make("option", { value: name }, title)));
  element("metric").value = options.some(({ name }) => name === before) ? before : options[0].name;
}

function changeMetric() {
  const options = report.protocols[element("protocol").value];
  metric = options.find(({ name }) => name === element("metric").value);
  drawDistribution();
  drawCaseTable();
  if (view.case !== null) drawCaseScores();
}

// ---------------------------------------------------------------------------------------------------------------------
// Viewer

const CANVAS_SIDE = 900; // pixels of the canvas's longer side
const DECODED = 80; // slices kept decoded

const view = {
  case: null,
  pictures: null, // what the case's script holds
  position: 0, // among the slices that are shown
  truth: true,
  prediction: true,
  difference: false,
  hidden: new Set(), // class ids
  decoded: new Map(), // position -> promise of {picture, truth, prediction}
};
const TOGGLES = { t: "truth", s: "prediction", d: "difference" };
const ERROR_KINDS = ["missed", "extra", "wrong class"];

function picturesOf(n) {
  return JSON.parse(pictureScripts[n].textContent);
}

async function loadImage(base64) {
  const image = new Image();
  image.src = `data:image/webp;base64,${base64}`;
  await image.decode();
  return image;
}

/** Decodes a slice: its picture, and class ids from the red (truth) and green (prediction) channel of the other. */
async function decodeSlice(pictures, position) {
  const [width, height] = pictures.size;
  const [picture, labels] = await Promise.all([
    loadImage(pictures.images[position]),
    loadImage(pictures.labels[position]),
  ]);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(labels, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data;
  const [truth, prediction] = [new Uint8Array(width * height), new Uint8Array(width * height)];
  for (let i = 0; i < truth.length; i++) {
    truth[i] = pixels[4 * i];
    prediction[i] = pixels[4 * i + 1];
  }
  return { picture, truth, prediction };
}

function decoded(position) {
  if (!view.decoded.has(position)) {
    if (view.decoded.size >= DECODED) view.decoded.delete(view.decoded.keys().next().value);
    view.decoded.set(position, decodeSlice(view.pictures, position));
  }
  return view.decoded.get(position);
}

/** "#rrggbb" and an opacity in [0, 1] as a pixel of ImageData read as little-endian 32 bits. */
function pixel(color, opacity) {
  const value = Number.parseInt(color.slice(1), 16);
  const [red, green, blue] = [value >> 16, (value >> 8) & 255, value & 255];
  return ((Math.round(255 * opacity) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** For every canvas pixel along an axis the pixel of the class maps below it. */
function nearest(canvasSize, size) {
  return Uint16Array.from({ length: canvasSize }, (_, i) => Math.floor(((i + 0.5) * size) / canvasSize));
}

/** Paints the overlays that are switched on over a canvas of (width, height). */
function paintOverlay(slice, width, height) {
  const layer = new OffscreenCanvas(width, height);
  const context = layer.getContext("2d");
  const output = context.createImageData(width, height);
  const target = new Uint32Array(output.data.buffer);
  const [mapWidth, mapHeight] = view.pictures.size;
  const columns = nearest(width, mapWidth);
  const rows = nearest(height, mapHeight);
  const shown = Uint8Array.from({ length: 256 }, (_, id) => (view.hidden.has(id) ? 0 : id));
  const truth = slice.truth.map((id) => shown[id]);
  const prediction = slice.prediction.map((id) => shown[id]);
  const opacity = Number(element("opacity").value);
  const fills = report.classes.map(({ color }) => pixel(color, opacity));
  const outlines = report.classes.map(({ color }) => pixel(color, 1));
  const errors = ERROR_KINDS.map((kind) => pixel(report.errors[kind], 0.9));
  const dimmed = pixel("#000000", 0.55);
  const thickness = Math.max(1, Math.round(Math.max(width, height) / 400));

  for (let y = 0; y < height; y++) {
    const row = rows[y] * mapWidth;
    const above = rows[Math.max(0, y - thickness)] * mapWidth;
    const below = rows[Math.min(height - 1, y + thickness)] * mapWidth;
    for (let x = 0; x < width; x++) {
      const column = columns[x];
      const [t, p] = [truth[row + column], prediction[row + column]];
      let color = 0;
      if (view.difference) color = t === p ? dimmed : errors[p === 0 ? 0 : t === 0 ? 1 : 2];
      if (view.prediction && p !== 0 && (!view.difference || t === p)) color = fills[p];
      if (view.truth && t !== 0) {
        const left = columns[Math.max(0, x - thickness)];
        const right = columns[Math.min(width - 1, x + thickness)];
        const inside =
          truth[row + left] === t &&
          truth[row + right] === t &&
          truth[above + column] === t &&
          truth[below + column] === t;
        if (!inside) color = outlines[t];
      }
      target[y * width + x] = color;
    }
  }
  context.putImageData(output, 0, 0);
  return layer;
}

async function drawSlice() {
  const { pictures, position } = view;
  const slice = await decoded(position);
  if (pictures !== view.pictures || position !== view.position) return; // another was asked for meanwhile
  const { aspect } = pictures;
  const width = Math.max(1, Math.round(CANVAS_SIDE * Math.min(1, aspect)));
  const height = Math.max(1, Math.round(CANVAS_SIDE * Math.min(1, 1 / aspect)));
  const canvas = element("canvas");
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(slice.picture, 0, 0, width, height);
  context.drawImage(paintOverlay(slice, width, height), 0, 0);
  for (const next of [position + 1, position - 1]) if (next in pictures.indices) decoded(next);
}

function goToSlice(position) {
  const { pictures } = view;
  view.position = Math.min(Math.max(position, 0), pictures.indices.length - 1);
  const index = pictures.indices[view.position];
  element("slice").value = view.position;
  element("slice").setAttribute("aria-valuetext", `slice ${index}`);
  const dice = pictures.dice[view.position];
  const place = pictures.slices === 1 ? "" : `slice ${index} of 0 to ${pictures.slices - 1}, `;
  element("caption").textContent = `${place}${dice === null ? "no foreground" : `Dice ${format(dice, 100)} %`}`;
  for (const bar of element("profile").children) bar.classList.toggle("current", bar.dataset.position == view.position);
  drawSlice();
}

/** Bars above the slider: the height of each is its slice's Dice. */
function drawProfile() {
  const { dice } = view.pictures;
  const profile = element("profile");
  profile.setAttribute("viewBox", `0 0 ${dice.length} 100`);
  profile.replaceChildren(
    ...dice.map((value, position) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = value === null ? 6 : 6 + 94 * value;
      const shape = { x: position + 0.08, y: 100 - height, width: 0.84, height, "data-position": position };
      for (const [name, number] of Object.entries(shape)) bar.setAttribute(name, number);
      bar.classList.toggle("empty", value === null);
      return bar;
    }),
  );
}

function drawCaseScores() {
  const protocol = element("protocol").value;
  const columns = report.protocols[protocol].filter(({ name }) => ["dice", "hd95", "nsd"].includes(name));
  const head = ["class", ...columns.map(({ title }) => title)].map((title) => make("th", { scope: "col" }, title));
  const rows = report.classes.slice(1).map(({ name, color }, c) => {
    const id = c + 1;
    const pressed = String(!view.hidden.has(id));
    const onclick = () => toggleClass(id);
    const label = make("button", { type: "button", "aria-pressed": pressed, onclick }, swatch(color), name);
    const flag = Object.keys(report.flags).find((key) => report.flags[key][view.case][c]);
    const remark = flag ? [" ", make("span", { class: "bad" }, flag)] : [];
    const cells = columns.map(({ values, factor }) => make("td", {}, format(values[view.case][c], factor)));
    return make("tr", {}, make("th", { scope: "row" }, label, ...remark), ...cells);
  });
  const means = columns.map(({ values, factor }) => make("td", {}, format(mean(values[view.case]), factor)));
  element("case-scores").replaceChildren(
    make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...rows),
    make("tfoot", {}, make("tr", {}, make("th", { scope: "row" }, "mean"), ...means)),
  );
}

function toggleClass(id) {
  if (!view.hidden.delete(id)) view.hidden.add(id);
  drawCaseScores();
  element("case-scores").tBodies[0].rows[id - 1].querySelector("button").focus();
  drawSlice();
}

function toggle(name) {
  view[name] = !view[name];
  element(`show-${name}`).setAttribute("aria-pressed", String(view[name]));
  element("error-legend").hidden = !view.difference;
  drawSlice();
}

function openCase(n) {
  if (n < 0 || n >= pictureScripts.length) return;
  Object.assign(view, { case: n, pictures: picturesOf(n), decoded: new Map() });
  const { pictures } = view;
  element("case").value = n;
  element("slice").max = pictures.indices.length - 1;
  element("viewer").classList.toggle("single", pictures.indices.length === 1);
  element("side-left").textContent = pictures.left;
  element("side-top").textContent = pictures.top;
  element("case-note").textContent = pictures.note;
  for (const node of document.querySelectorAll("#strip button, #cases tbody tr")) {
    if (Number(node.dataset.case) === n) node.setAttribute("aria-current", "true");
    else node.removeAttribute("aria-current");
  }
  const thumbnail = element("strip").children[n];
  element("strip").scrollLeft = thumbnail.offsetLeft - element("strip").offsetLeft - element("strip").clientWidth / 2;
  drawProfile();
  drawCaseScores();
  goToSlice(pictures.opening);
}

/** One thumbnail a case, loaded when it comes into sight. */
function makeStrip() {
  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      const pictures = picturesOf(Number(target.dataset.case));
      target.src = `data:image/webp;base64,${pictures.images[pictures.opening]}`;
      observer.unobserve(target);
    }
  });
  const dice = Object.values(report.protocols)[0][0];
  const buttons = pictureScripts.map((_, n) => {
    const image = make("img", { alt: "", "data-case": n, width: 98, height: 78 });
    observer.observe(image);
    const score = make("span", { class: "score" }, `${dice.title} ${format(mean(dice.values[n]), dice.factor)}`);
    const attributes = { type: "button", "data-case": n, title: report.cases[n], onclick: () => openCase(n) };
    return make("button", attributes, image, make("span", {}, report.cases[n]), score);
  });
  element("strip").replaceChildren(...buttons);
}

function onKey(event) {
  const typing = event.target.matches("select, textarea, input:not([type=range])");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || view.case === null) return;
  const sliding = event.target.matches("input[type=range]"); // has its own use for arrows
  const actions = {
    n: () => openCase(view.case + 1),
    p: () => openCase(view.case - 1),
    w: () => goToSlice(view.pictures.opening),
    ...Object.fromEntries(Object.entries(TOGGLES).map(([key, name]) => [key, () => toggle(name)])),
    ...(sliding
      ? {}
      : { ArrowLeft: () => goToSlice(view.position - 1), ArrowRight: () => goToSlice(view.position + 1) }),
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function startViewer() {
  element("viewer").hidden = false;
  element("case").replaceChildren(...pictureScripts.map((_, n) => make("option", { value: n }, report.cases[n])));
  element("error-legend").replaceChildren(
    ...ERROR_KINDS.map((kind) => make("li", {}, swatch(report.errors[kind]), kind)),
  );
  element("case").addEventListener("change", (event) => openCase(Number(event.target.value)));
  element("slice").addEventListener("input", (event) => goToSlice(Number(event.target.value)));
  element("opacity").addEventListener("input", drawSlice);
  element("previous-case").addEventListener("click", () => openCase(view.case - 1));
  element("next-case").addEventListener("click", () => openCase(view.case + 1));
  element("profile").addEventListener("click", (event) => {
    const { left, width } = element("profile").getBoundingClientRect();
    goToSlice(Math.floor(((event.clientX - left) / width) * view.pictures.indices.length));
  });
  for (const name of Object.values(TOGGLES)) element(`show-${name}`).addEventListener("click", () => toggle(name));
  document.addEventListener("keydown", onKey);
  makeStrip();
  openCase(0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Start

element("protocol").replaceChildren(
  ...Object.keys(report.protocols).map((name) => make("option", { value: name }, name)),
);
element("protocol").addEventListener("change", () => {
  fillMetrics();
  changeMetric();
});
element("metric").addEventListener("change", changeMetric);
fillMetrics();
changeMetric();
if (pictureScripts.length) startViewer();
