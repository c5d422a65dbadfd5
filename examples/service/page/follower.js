// Follows the events of a run while the page is visible, until the run has ended.
//
// A hidden page holds no connection: a browser opens at most six to a service, for all its tabs.

import { api } from "./api.js";

const EVENTS = ["fit_started", "batch", "epoch", "log", "fit_ended", "run_ended"];
const RETRY = 5000; // milliseconds, if the browser does not reconnect by itself

export class Follower {
  /** Calls `changed()` after each change, and `gone(why)` if there is no such run. */
  constructor(run, changed, gone) {
    this.run = run;
    this.changed = changed;
    this.gone = gone;
    this.seen = 0;
    this.closed = false;
    this.link = "connecting";
    this.connect();
  }

  /** Connect again, or only disconnect while the page is hidden. */
  connect() {
    if (this.closed) return;
    this.#disconnect();
    if (document.hidden) {
      this.link = "connecting";
      this.changed();
      return;
    }
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
    this.#disconnect();
  }

  #disconnect() {
    this.source?.close();
    clearTimeout(this.retry);
  }

  /** Take each message once, whichever stream sends it; message ids are consecutive. */
  take({ type, data, lastEventId }) {
    const id = Number(lastEventId);
    if (this.closed || id <= this.seen) return;
    this.run.missed += id - this.seen - 1;
    this.seen = id;
    this.run.take(JSON.parse(data));
    if (type === "run_ended") this.close();
    this.changed();
  }

  /** Request the whole history: the stream has only the messages that the service still holds. */
  async refresh() {
    try {
      this.run.takeState(await api(`runs/${this.run.id}`));
    } catch (refusal) {
      if (refusal.status === 404 && !this.closed) this.gone(refusal.message);
      if (refusal.status === 401 || refusal.status === 404) this.close();
    }
    this.changed();
  }

  /** The browser reconnects by itself, unless the service refused the connection. */
  lost() {
    this.link = "reconnecting";
    if (this.source.readyState === EventSource.CLOSED) {
      this.refresh();
      this.retry = setTimeout(() => this.connect(), RETRY);
    }
    this.changed();
  }
}
