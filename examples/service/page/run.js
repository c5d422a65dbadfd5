// A run, as known from its state and from its events, whichever arrive first.

const MAX_POINTS = 2000; // batches in a chart; more are thinned out
const MAX_ROWS = 50; // batches in a table
export const MAX_LINES = 200; // of the log

/** Any number of items, evenly thinned to fewer than `limit`. */
export class Thinned {
  constructor(limit) {
    this.limit = limit;
    this.items = [];
    this.last = null;
    this.stride = 1;
    this.seen = 0;
  }

  push(item) {
    this.last = item;
    if (this.seen++ % this.stride) return;
    this.items.push(item);
    if (this.items.length < this.limit) return;
    this.items = this.items.filter((_, i) => i % 2 === 0);
    this.stride *= 2;
  }

  /** The items that were kept, and the newest one. */
  get points() {
    const { items, last } = this;
    return items.at(-1) === last || !last ? items : [...items, last];
  }
}

export class Run {
  constructor(id) {
    this.id = id;
    this.state = null;
    this.end = null;
    this.epochs = []; // [{train: {loss, accuracy, rate, seconds}, valid: {...}}, ...]
    this.batches = new Thinned(MAX_POINTS);
    this.rows = [];
    this.lines = []; // of the log, until they are drawn
    this.missed = 0;
    this.stopping = false;
    this.at = null;
    this.now = 0;
  }

  get running() {
    return this.state.status === "running";
  }

  /** The progress, from 0 to 1. */
  get done() {
    if (this.state.status === "completed") return 1;
    return this.at ? Math.min(1, position(this.at) / this.state.request.epochs) : 0;
  }

  /** Take the service's answer about the run, with the whole history. */
  takeState(state) {
    this.state = { ...state, ...this.end };
    for (const { epoch, train, ...metrics } of state.history) {
      this.#takeEpoch(epoch, train === "train" ? "train" : "valid", metrics);
    }
  }

  /** Take one of its events. */
  take(record) {
    this.now = Date.parse(record.timestamp);
    if (record.event === "batch") this.#takeBatch(record);
    if (record.event === "epoch") this.#takeEpochEnd(record);
    if (record.event === "log") push(this.lines, record, MAX_LINES);
    if (record.event === "run_ended") this.#takeEnd(record);
  }

  #takeBatch(record) {
    const { loss, samples_per_second: rate } = record;
    this.at = record;
    push(this.rows, record, MAX_ROWS);
    if (record.n_iter) this.batches.push({ x: position(record), loss, rate });
  }

  #takeEpochEnd({ epoch, phase, status, metrics, seconds, samples_per_second: rate }) {
    if (status !== "completed") return;
    this.at = { epoch, phase: "valid" };
    this.#takeEpoch(epoch, phase, { ...metrics, seconds, rate });
  }

  #takeEpoch(epoch, phase, values) {
    while (this.epochs.length <= epoch) this.epochs.push({});
    const known = this.epochs[epoch];
    known[phase] = { ...known[phase], ...values };
  }

  #takeEnd({ status, who, reason, steps, dropped, timestamp }) {
    this.end = { status, who, reason, steps, dropped, ended: timestamp };
    if (this.state) Object.assign(this.state, this.end);
  }
}

/** Add an item, and keep the last `limit` items. */
function push(items, item, limit) {
  items.push(item);
  if (items.length > limit) items.shift();
}

/** The number of completed epochs, including the completed fraction of the current one. */
export function position({ epoch, phase, iter, n_iter }) {
  return phase === "valid" ? epoch + 1 : epoch + (iter + 1) / (n_iter ?? Infinity);
}
