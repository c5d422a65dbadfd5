// The charts, and the values of a run that each of them shows.

import { Chart } from "./chart.js";
import { NONE, number, percent, rate, short } from "./texts.js";

/** The epochs done, and a value for each; the lines pass over values that are not known. */
function byEpoch(run, phases, name) {
  const x = run.epochs.map((_, i) => i + 1);
  return [x, ...phases.map((phase) => run.epochs.map((epoch) => epoch[phase]?.[name]))];
}

function byBatch(run, name) {
  const { points } = run.batches;
  return [points.map(({ x }) => x), points.map((point) => point[name])];
}

function rows(run, cells) {
  return run.epochs.map((epoch, i) => [i + 1, ...cells(epoch)]);
}

const CHARTS = {
  loss: {
    series: ["batch", "train", "valid"],
    format: number,
    tick: short,
    range: (low, high) => [Math.max(0, low), high],
    tables: (run) => [byBatch(run, "loss"), byEpoch(run, ["train", "valid"], "loss")],
    rows: (run) => rows(run, ({ train, valid }) => [number(train?.loss), number(valid?.loss)]),
  },
  accuracy: {
    series: ["train", "valid"],
    format: (y) => (y == null ? NONE : `${percent(y)} %`),
    tick: (y) => `${Math.round(1000 * y) / 10}`,
    range: (low) => [Math.max(0, Math.min(low, 0.9)), 1],
    tables: (run) => [byEpoch(run, ["train", "valid"], "accuracy")],
    rows: (run) =>
      rows(run, ({ train, valid }) => [percent(train?.accuracy), percent(valid?.accuracy)]),
  },
  throughput: {
    series: ["batch", "train"],
    format: rate,
    tick: (y) => (y >= 1000 ? `${y / 1000}k` : `${y}`),
    range: (low, high) => [0, high],
    tables: (run) => [byBatch(run, "rate"), byEpoch(run, ["train"], "rate")],
    rows: (run) =>
      rows(run, ({ train }) => [rate(train?.rate), train?.seconds?.toFixed(1) ?? NONE]),
  },
};

export function makeCharts(redraw) {
  return Object.entries(CHARTS).map(([name, spec]) => new Chart(name, spec, redraw));
}
