// A chart over the epochs, with its lines, its legend, and a table of its values.

import { $, fill, say } from "./dom.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const DASH = [6, 4].map((length) => length * devicePixelRatio); // uPlot scales everything else

const LINES = {
  batch: { stroke: () => colour("--batch"), width: 1, points: { show: false } },
  train: { stroke: () => colour("--train"), width: 2, points: points("--train") },
  valid: { stroke: () => colour("--valid"), width: 2, dash: DASH, points: points("--paper") },
};

/** Points at the epochs, as long as there is room for them. */
function points(paint) {
  const show = (plot, i) => plot.data[i].filter((y) => y != null).length * 12 < plot.width;
  return { show, size: 7, width: 1.5, fill: () => colour(paint) };
}

function logRange(_, low, high) {
  return low > 0 ? [low / 1.2, high * 1.2] : [0.1, 1];
}

/** Keep only positive values: the others have no logarithm. */
const positive = (column) => column.map((y) => (y === undefined || y > 0 ? y : null));

/** The index of the last value of a column at or before `start`. */
function lastNumber(column, start = column.length - 1) {
  let i = start;
  while (i > 0 && column[i] == null) i -= 1;
  return i;
}

/** The index of the value of a series that is nearest to the cursor. */
function nearest(plot, series, start, x) {
  const [at, column] = [plot.data[0], plot.data[series]];
  const before = lastNumber(column, start);
  let after = start;
  while (after < column.length - 1 && column[after] == null) after += 1;
  if (column[before] == null) return after;
  if (column[after] == null) return before;
  return at[after] - x < x - at[before] ? after : before;
}

export class Chart {
  /** Draws in the figure `name`; calls `redraw` when the chart must be drawn again. */
  constructor(name, spec, redraw) {
    this.spec = spec;
    this.figure = $(name);
    this.box = this.figure.querySelector(".plot");
    this.details = this.figure.querySelector("details");
    this.details.addEventListener("toggle", redraw);
    this.log = false;
    this.end = 1;
    this.make();
    new ResizeObserver(() => this.resize()).observe(this.box);
    this.figure.querySelector("[type=checkbox]")?.addEventListener("change", ({ target }) => {
      this.log = target.checked;
      this.make();
      redraw();
    });
  }

  make() {
    this.plot?.destroy();
    this.plot = new uPlot(this.options(), [[], ...this.spec.series.map(() => [])], this.box);
  }

  options() {
    const axis = {
      stroke: () => colour("--muted"),
      grid: { stroke: () => colour("--grid"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
    };
    const x = { ...axis, label: "epochs done", labelSize: 18, labelFont: axis.font, size: 26 };
    x.grid = { show: false };
    x.border = { show: true, width: 1, stroke: () => colour("--field") };
    x.incrs = [1, 2, 5, 10, 20, 50, 100, 200, 500];
    x.ticks = { show: true, size: 4, width: 1, stroke: () => colour("--field") };
    const y = { ...axis, size: 46, gap: 6, values: (_, ticks) => ticks.map(this.tick, this) };
    y.space = (_, i, low, high, height) => (height > 200 ? 40 : 22);
    const linear = { range: (_, low, high) => this.range(low, high) };
    const scale = this.log ? { distr: 3, range: logRange } : linear;
    return {
      width: this.box.clientWidth,
      height: this.box.clientHeight,
      padding: [8, 10, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        sync: { key: "epochs", scales: ["x", null] },
        dataIdx: (plot, i, at, x) => (i ? nearest(plot, i, at, x) : at),
      },
      scales: { x: { time: false, range: () => [0, this.end] }, y: scale },
      axes: [x, y],
      series: [{}, ...this.spec.series.map((name) => LINES[name])],
      hooks: { setCursor: [() => this.legend()] },
    };
  }

  /** The ends of a logarithmic axis are arbitrary: label only round numbers there. */
  tick(y) {
    const round = y != null && Number(y.toPrecision(1)) === Number(y.toPrecision(6));
    return round || (y != null && !this.log) ? this.spec.tick(y) : "";
  }

  range(low, high) {
    return low == null ? [0, 1] : this.spec.range(...uPlot.rangeNum(low, high, 0.08, true));
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.box;
    if (width && height) this.plot.setSize({ width, height });
  }

  draw(run) {
    const tables = this.spec.tables(run);
    this.end = Math.max(1, run.epochs.length, Math.ceil(run.batches.last?.x ?? 0));
    this.plot.setData(
      uPlot.join(this.log ? tables.map(([x, ...ys]) => [x, ...ys.map(positive)]) : tables),
    );
    this.legend();
    const texts = this.spec.series.map((name, i) => `${name} ${this.value(i)}`);
    const title = this.figure.querySelector("h3").textContent;
    this.box.setAttribute("aria-label", `${title} by epoch: ${texts.join(", ")}`);
    if (this.details.open) fill(this.details, this.spec.rows(run));
  }

  /** The value of a series at the cursor, or else its last value. */
  value(i) {
    const column = this.plot.data[i + 1] ?? [];
    const at = this.plot.cursor.idxs?.[i + 1] ?? lastNumber(column);
    return this.spec.format(column[at]);
  }

  legend() {
    for (const [i, name] of this.spec.series.entries()) {
      say(this.figure.querySelector(`[data-series=${name}]`), this.value(i));
    }
  }
}
