// Follows the events of a run, until it has ended or is no longer looked at.

import { api } from "./api.js";

const EVENTS = ["fit_started", "batch", "epoch", "log", "fit_ended", "run_ended"];
const RETRY = 5000; // milliseconds, where the browser does not come back by itself

export class Follower {
  /** Calls `changed()` with each thing it learns, and `gone(why)` if there is no such run. */
  constructor(run, changed, gone) {
    this.run = run;
    this.changed = changed;
    this.gone = gone;
    this.seen = 0;
    this.closed = false;
    this.link = "connecting";
    this.connect();
  }

  connect() {
    if (this.closed) return;
    this.source = new EventSource(`runs/${this.run.id}/events`);
    this.source.onopen = () => {
      this.link = "live";
      this.refresh();
    };
    this.source.onerror = () => this.lost();
    this.source.addEventListener("gap", () => this.refresh());
    for (const name of EVENTS) this.source.addEventListener(name, (event) => this.take(event));
  }

  close() {
    this.closed = true;
    this.source.close();
  }

  /** Take each message once, whichever stream it comes on; their numbers have no holes. */
  take({ type, data, lastEventId }) {
    const id = Number(lastEventId);
    if (this.closed || id <= this.seen) return;
    this.run.missed += id - this.seen - 1;
    this.seen = id;
    this.run.take(JSON.parse(data));
    if (type === "run_ended") this.close();
    this.changed();
  }

  /** Ask for the whole history: the stream has only what the service still holds of it. */
  async refresh() {
    try {
      this.run.takeState(await api(`runs/${this.run.id}`));
    } catch (refusal) {
      if (refusal.status === 404 && !this.closed) this.gone(refusal.message);
      if (refusal.status === 401 || refusal.status === 404) this.close();
    }
    this.changed();
  }

  /** The browser comes back by itself, unless it was turned away. */
  lost() {
    this.link = "reconnecting";
    if (this.source.readyState === EventSource.CLOSED) {
      this.refresh();
      setTimeout(() => this.connect(), RETRY);
    }
    this.changed();
  }
}
