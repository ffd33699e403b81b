"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const tip = document.getElementById("tip");
  const hiddenModels = new Set();
  const plotted = [];

  const el = (name, attributes = {}, text = "") => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== "") node.textContent = text;
    return node;
  };
  const svg = (name, attributes = {}) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const count = (n) => Math.round(n).toLocaleString("en-US");
  const short = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1000) return count(value);
    const digits = Math.max(0, 3 - Math.floor(Math.log10(size)));
    return String(Number(value.toFixed(Math.min(digits, 9))));
  };

  // --- a tip beside what is pointed at
  const showTip = (lines, x, y) => {
    tip.replaceChildren(...lines.map((line, n) => el(n ? "span" : "b", {}, line)).flatMap((n, i) => (i > 1 ? [el("br"), n] : [n])));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(4, x + 14), document.documentElement.clientWidth - box.width - 4);
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${Math.max(4, y - box.height - 12) + window.scrollY}px`;
  };
  const hideTip = () => { tip.hidden = true; };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

  // --- tables: a click on a heading sorts, the second the other way, the third as it was
  for (const table of document.querySelectorAll("table[data-name]")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    if (original.length > 14) table.closest(".table").classList.add("long");
    heads.forEach((head, place) => {
      head.querySelector("button").addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const now = { none: "ascending", ascending: "descending", descending: "none" }[before];
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", now);
        const value = (row) => row.cells[place].dataset.value;
        const sorted = now === "none" ? original : [...original].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          const [p, q] = [Number(x), Number(y)];
          const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y, "en", { numeric: true }) : p - q;
          return now === "ascending" ? order : -order;
        });
        body.append(...sorted);
      });
    });
  }

  // --- charts
  const MARKERS = [
    (x, y) => svg("circle", { cx: x, cy: y, r: 3.6 }),
    (x, y) => svg("rect", { x: x - 3.3, y: y - 3.3, width: 6.6, height: 6.6 }),
    (x, y) => svg("path", { d: `M${x} ${y - 4.4}l4.4 4.4l-4.4 4.4l-4.4 -4.4z` }),
    (x, y) => svg("path", { d: `M${x} ${y - 4.2}l4.2 7.4h-8.4z` }),
  ];
  const colour = (line) => `var(--c${line.colour % 8})`;
  const marker = (line, x, y) => {
    const shape = MARKERS[line.colour % MARKERS.length](x, y);
    shape.setAttribute("fill", colour(line));
    return shape;
  };
  const nice = (low, high, wanted) => {
    const raw = (high - low) / Math.max(1, wanted);
    const base = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * base).find((s) => s >= raw * 0.999);
    const ticks = [];
    for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) ticks.push(Math.abs(t) < step / 1e6 ? 0 : t);
    return ticks;
  };
  const logTicks = (low, high) => {
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1)
      for (const m of [1, 2, 5]) { const t = m * 10 ** e; if (t >= low * 0.999 && t <= high * 1.001) ticks.push(t); }
    return ticks.length > 2 ? ticks : nice(low, high, 4).filter((t) => t > 0);
  };
  const nameOf = (label) => label.trim().replace(/^noise floor of (the )?/, "").replace(/ \((reference|original)\)$/, "");

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.plot = data.plots[figure.dataset.plot];
      this.canvas = figure.querySelector(".canvas");
      this.status = figure.querySelector("[role=status]");
      this.off = new Set();
      this.at = -1;
      this.legend();
      new ResizeObserver(() => this.draw()).observe(this.canvas);
      this.canvas.addEventListener("pointermove", (event) => this.point(event));
      this.canvas.addEventListener("pointerdown", (event) => this.point(event));
      this.canvas.addEventListener("pointerleave", () => this.leave());
      this.canvas.addEventListener("blur", () => this.leave());
      this.canvas.addEventListener("keydown", (event) => this.key(event));
    }
    legend() {
      const list = this.figure.querySelector(".legend");
      this.plot.lines.forEach((line, place) => {
        const item = el("li");
        const button = el("button", { type: "button", "aria-pressed": "true" });
        const sample = svg("svg", { width: 26, height: 12, "aria-hidden": "true" });
        if (line.joined) sample.append(svg("line", { x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour(line), "stroke-width": 2, "stroke-dasharray": line.dash }));
        if (line.marked) sample.append(marker(line, 13, 6));
        button.append(sample, document.createTextNode(line.label.trim()));
        button.addEventListener("click", () => {
          if (!this.off.delete(place)) this.off.add(place);
          button.setAttribute("aria-pressed", String(!this.off.has(place)));
          this.draw();
        });
        item.append(button);
        list.append(item);
      });
    }
    shown() {
      return this.plot.lines.filter((line, place) => !this.off.has(place) && !hiddenModels.has(nameOf(line.label)));
    }
    draw() {
      const width = Math.max(240, this.canvas.clientWidth), height = Math.round(Math.min(380, Math.max(230, width * 0.5)));
      const lines = this.shown();
      this.canvas.replaceChildren();
      if (!lines.length) { this.xs = []; this.canvas.append(el("p", { class: "note" }, "No model is chosen.")); return; }
      const points = lines.flatMap((line) => line.points);
      const bounds = points.flatMap(([, y, e]) => (e ? [y - e, y + e] : [y]));
      let low = Math.min(...points.map((p) => p[1])), high = Math.max(...bounds);
      const log = low > 0 && (this.plot.by_layer ? high > 3 * low : !this.plot.linear && high > 8 * low);
      let min, max;
      if (log) { min = low / 1.15; max = high * 1.15; }
      else {
        min = this.plot.from_zero ? 0 : Math.min(...bounds); max = high;
        const margin = (max - min || Math.abs(max) || 1) * 0.06;
        if (!this.plot.from_zero || min < 0) min -= margin;
        max += margin;
      }
      const yTicks = log ? logTicks(min, max) : nice(min, max, height / 55);
      const labels = yTicks.map(short);
      const left = 14 + 7 * Math.max(...labels.map((label) => label.length)), right = 14, top = 10, bottom = 42;
      this.xs = [...new Set(points.map((p) => p[0]))].sort((a, b) => a - b);
      const [first, last] = [this.xs[0], this.xs[this.xs.length - 1]];
      const px = this.plot.x === "log2" ? Math.log2 : (v) => v;
      const pad = first === last ? 1 : (px(last) - px(first)) * (this.plot.linear && this.xs.length < 20 ? 0.08 : 0.02);
      const [x0, x1] = [px(first) - pad, px(last) + pad];
      const X = (v) => left + ((px(v) - x0) / (x1 - x0)) * (width - left - right);
      const py = log ? Math.log : (v) => v;
      const Y = (v) => top + (1 - (py(v) - py(min)) / (py(max) - py(min))) * (height - top - bottom);
      const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      const text = (x, y, content, anchor) => { const node = svg("text", { x, y, "text-anchor": anchor }); node.textContent = content; root.append(node); };
      yTicks.forEach((tick, n) => {
        root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: Y(tick), y2: Y(tick) }));
        text(left - 7, Y(tick) + 4, labels[n], "end");
      });
      const steps = this.plot.x === "layers" || this.plot.linear ? nice(first, last, width / 90) : this.xs;
      let edge = -Infinity;
      for (const tick of steps.filter((t) => t >= first - pad && t <= last + pad)) {
        const label = this.plot.linear ? short(tick) : count(tick), at = X(tick), half = label.length * 3.6 + 5;
        if (at - half < edge || (this.plot.x === "layers" && tick % 1)) continue;
        edge = at + half;
        root.append(svg("line", { class: "axis", x1: at, x2: at, y1: height - bottom, y2: height - bottom + 4 }));
        text(at, height - bottom + 17, label, "middle");
      }
      root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
      text((left + width - right) / 2, height - 6, this.plot.x_label, "middle");
      const floor = log ? min : -Infinity;
      for (const line of lines) {
        const known = line.points.filter((p) => p[2] !== null);
        if (line.joined && known.length > 1 && known.length === line.points.length) {
          const up = known.map(([x, y, e]) => `${X(x)},${Y(Math.min(y + e, max))}`), down = known.map(([x, y, e]) => `${X(x)},${Y(Math.max(y - e, min, floor))}`);
          root.append(svg("polygon", { points: [...up, ...down.reverse()].join(" "), fill: colour(line), opacity: 0.14 }));
        } else for (const [x, y, e] of known) if (e) root.append(svg("line", { x1: X(x), x2: X(x), y1: Y(Math.min(y + e, max)), y2: Y(Math.max(y - e, min, floor)), stroke: colour(line), "stroke-width": 1.5 }));
        if (line.joined) root.append(svg("polyline", { points: line.points.map(([x, y]) => `${X(x)},${Y(y)}`).join(" "), fill: "none", stroke: colour(line), "stroke-width": 2, "stroke-dasharray": line.dash }));
        if (line.marked && line.points.length < 80) for (const [x, y] of line.points) root.append(marker(line, X(x), Y(y)));
      }
      this.cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
      root.append(this.cursor);
      this.canvas.append(root);
      Object.assign(this, { X, Y, width, drawn: lines });
    }
    point(event) {
      if (!this.xs.length) return;
      const box = this.canvas.getBoundingClientRect(), scale = this.width / box.width, x = (event.clientX - box.left) * scale;
      let best = 0;
      this.xs.forEach((v, n) => { if (Math.abs(this.X(v) - x) < Math.abs(this.X(this.xs[best]) - x)) best = n; });
      this.read(best, event.clientY);
    }
    key(event) {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
      if (event.key === "Escape") { this.leave(); return; }
      if (!(event.key in moves) || !this.xs.length) return;
      event.preventDefault();
      const step = this.xs.length > 80 && Math.abs(moves[event.key]) === 1 ? moves[event.key] * Math.ceil(this.xs.length / 40) : moves[event.key];
      this.read(Math.min(this.xs.length - 1, Math.max(0, this.at < 0 ? (step > 0 && step < Infinity ? 0 : this.xs.length - 1) : this.at + step)), null, true);
    }
    read(place, clientY, spoken = false) {
      this.at = Number.isFinite(place) ? place : 0;
      const x = this.xs[this.at], box = this.canvas.getBoundingClientRect();
      const values = this.drawn.flatMap((line) => line.points.filter((p) => p[0] === x).map(([, y, e]) => [y, `${line.label.trim()}: ${short(y)}${e ? ` ± ${short(e)}` : ""}`]));
      values.sort((a, b) => b[0] - a[0]);
      const heading = `${this.plot.x_label.replace(/ \(.*| over .*/, "")} ${this.plot.linear ? short(x) : count(x)}`;
      this.cursor.setAttribute("x1", this.X(x));
      this.cursor.setAttribute("x2", this.X(x));
      this.cursor.setAttribute("visibility", "visible");
      const lines = [heading, ...values.map((v) => v[1])];
      showTip(lines, box.left + (this.X(x) / this.width) * box.width, clientY ?? box.top + box.height / 2);
      if (spoken) this.status.textContent = lines.join("; ");
    }
    leave() { this.at = -1; hideTip(); if (this.cursor) this.cursor.setAttribute("visibility", "hidden"); }
  }
  for (const figure of document.querySelectorAll(".chart")) plotted.push(new Chart(figure));

  // --- which models are shown, in charts and in tables
  const models = document.getElementById("models");
  if (models) models.addEventListener("change", () => {
    hiddenModels.clear();
    for (const box of models.querySelectorAll("input")) if (!box.checked) hiddenModels.add(box.value);
    plotted.forEach((chart) => chart.draw());
    for (const row of document.querySelectorAll("tr[data-model]")) row.hidden = hiddenModels.has(row.dataset.model);
  });

  // --- the context that fits
  const form = document.getElementById("fit-form");
  if (form) {
    const answer = document.getElementById("fit-answer"), bars = document.getElementById("fit-bars");
    const find = (card, c) => data.fits.rows[[card, c.engine, c.gpus, c.sequences].join("|")];
    const update = () => {
      const c = Object.fromEntries(new FormData(form));
      const tokens = (fit) => (fit === undefined || fit.length === 1 ? 0 : fit[c.cache === "fp8" ? 1 : 0]);
      const fit = find(c.card, c), most = data.fits.max_positions;
      const where = `${c.gpus === "1" ? "one" : c.gpus} ${c.card}${c.gpus === "1" ? "" : "s"}`;
      const who = c.sequences === "1" ? "one sequence" : `each of ${c.sequences} sequences`;
      const found = tokens(fit);
      const lines = found
        ? [`${count(found)} tokens`, `fit ${who} on ${where}${found === most ? ", all that the model was made for" : ""}.`]
        : ["It does not fit", fit !== undefined && fit.length === 1 ? `${data.fits.problems[fit[0]]}.` : `${where} for ${who}: choose more GPUs, fewer sequences or an FP8 KV cache.`];
      answer.replaceChildren(el("strong", {}, lines[0]), document.createTextNode(lines[1]));
      answer.classList.toggle("no", !found);
      const all = data.fits.cards.map((card) => [card, find(card, c)]);
      const top = Math.max(1, ...all.map(([, f]) => tokens(f)));
      bars.replaceChildren(...all.map(([card, f]) => {
        const item = el("li", card === c.card ? { class: "chosen" } : {}), track = el("span", { class: "track" });
        const value = tokens(f) ? `${count(tokens(f))} tokens` : f !== undefined && f.length === 1 ? "not served" : "does not fit";
        const fill = el("span", { class: "fill" });
        fill.style.width = `${(100 * tokens(f)) / top}%`;
        track.append(fill, el("span", { class: "value" }, value));
        item.append(el("span", {}, card), track);
        return item;
      }));
    };
    form.addEventListener("change", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    update();
  }

  // --- layer by layer
  const mapForm = document.getElementById("map-form");
  if (mapForm) {
    const place = document.getElementById("map"), reading = document.getElementById("map-reading");
    const index = { bits: 3, error: 4, input: 5 };
    const parse = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).split(",").map(Number);
    const draw = () => {
      const c = Object.fromEntries(new FormData(mapForm)), rows = data.maps[Number(c.checkpoint)];
      const column = index[c.figure], key = document.getElementById("map-scale");
      for (const node of document.querySelectorAll("[data-checkpoint]")) node.hidden = node.dataset.checkpoint !== c.checkpoint;
      const layers = [...new Set(rows.map((r) => r[0]))], names = [...new Set(rows.map((r) => r[1]))];
      const values = rows.map((r) => r[column]).filter((v) => v !== null && v > 0);
      place.replaceChildren();
      key.replaceChildren();
      if (!values.length) { place.append(el("p", { class: "note" }, "Not measured for this checkpoint.")); return; }
      const log = c.figure !== "bits";
      const scale = log ? Math.log : (v) => v;
      const low = c.figure === "bits" ? 4 : Math.min(...values), high = c.figure === "bits" ? 16 : Math.max(...values);
      const [from, to] = [parse("--low"), parse("--high")];
      key.append(document.createTextNode(short(low)), el("span"), document.createTextNode(`${short(high)} ${mapForm.elements.figure.selectedOptions[0].text}`));
      place.style.setProperty("--cell", `${Math.min(48, Math.max(20, (place.parentElement.clientWidth - 130) / layers.length - 2))}px`);
      const table = el("table", { "aria-label": "Layer by layer" }), head = el("tr");
      head.append(el("td"), ...layers.map((layer, n) => el("th", { scope: "col" }, n % 5 && layers.length > 12 ? "" : String(layer))));
      [...head.querySelectorAll("th")].forEach((th, n) => { if (!th.textContent) th.append(el("span", { class: "hidden" }, String(layers[n]))); });
      const thead = el("thead"), body = el("tbody");
      thead.append(head);
      let firstCell = true;
      for (const name of names) {
        const row = el("tr");
        row.append(el("th", { scope: "row" }, name));
        for (const layer of layers) {
          const entry = rows.find((r) => r[0] === layer && r[1] === name), cell = el("td");
          const value = entry ? entry[column] : null;
          if (value !== null && value > 0) {
            const share = high > low ? Math.min(1, Math.max(0, (scale(value) - scale(low)) / (scale(high) - scale(low)))) : 0;
            const shade = from.map((v, n) => Math.round(v + (to[n] - v) * share));
            const text = `Layer ${layer}, ${name}: ${entry[2]}, ${short(entry[3])} bits a weight${entry[4] !== null ? `, relative error ${short(entry[4])}` : ""}${entry[5] !== null ? `, largest input ${short(entry[5])}` : ""}`;
            const square = el("span", { class: "cell", role: "img", "aria-label": text, tabindex: firstCell ? 0 : -1 });
            square.style.background = `rgb(${shade.join(",")})`;
            square.addEventListener("pointerenter", () => { reading.textContent = text; });
            square.addEventListener("focus", () => { reading.textContent = text; });
            cell.append(square);
            firstCell = false;
          }
          row.append(cell);
        }
        body.append(row);
      }
      table.append(thead, body);
      place.append(table);
    };
    place.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td");
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!cell || !move) return;
      event.preventDefault();
      let [row, column] = [cell.parentElement.rowIndex + move[0], cell.cellIndex + move[1]];
      const table = cell.closest("table");
      while (table.rows[row] && table.rows[row].cells[column]) {
        const next = table.rows[row].cells[column].querySelector(".cell");
        if (next) {
          event.target.tabIndex = -1;
          next.tabIndex = 0;
          next.focus();
          return;
        }
        [row, column] = [row + move[0], column + move[1]];
      }
    });
    mapForm.addEventListener("change", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    draw();
  }

  // --- commands
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("code").textContent, label = button.firstChild;
      try { await navigator.clipboard.writeText(text); label.textContent = "Copied"; }
      catch { const range = document.createRange(); range.selectNodeContents(button.parentElement.querySelector("code")); getSelection().removeAllRanges(); getSelection().addRange(range); label.textContent = "Selected"; }
      setTimeout(() => { label.textContent = "Copy"; }, 1500);
    });
  }
  document.documentElement.dataset.ready = "yes";
})();
