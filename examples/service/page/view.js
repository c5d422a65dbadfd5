// The run that is shown: its settings, progress, charts, batches and log.

import { makeCharts } from "./charts.js";
import { $, element, fill, say } from "./dom.js";
import { clearErrors } from "./forms.js";
import { drawLog } from "./log.js";
import { position } from "./run.js";
import { capital, count, duration, number, rate, short, when } from "./texts.js";

const LINKS = { connecting: "connecting…", live: "live", reconnecting: "reconnecting…" };

export class View {
  /** Calls `redraw` when a part that was hidden must be drawn. */
  constructor(redraw) {
    this.redraw = redraw;
    this.charts = null; // made when they are first shown: before that they have no size
    $("batches").addEventListener("toggle", redraw);
  }

  draw(run, link) {
    $("no-run").hidden = true;
    $("run-view").hidden = false;
    drawAbout(run, link);
    drawProgress(run);
    this.charts ??= makeCharts(this.redraw);
    for (const chart of this.charts) chart.draw(run);
    drawBatches(run);
    drawLog(run);
  }

  /** Show a message instead of a run. */
  clear(message) {
    $("run-view").hidden = true;
    $("no-run").hidden = false;
    say($("no-run"), message);
    document.title = "eventrain";
    $("log").replaceChildren();
    clearErrors($("stop-form"));
    $("stop-form").reset();
  }
}

function drawAbout(run, link) {
  const { status, who, reason, created, request, dropped } = run.state;
  say($("run-title"), `${request.dataset}, ${count(request.epochs, "epoch", "epochs")}`);
  say($("status"), status);
  $("status").className = status;
  say($("link"), run.running ? (run.stopping ? "stopping…" : LINKS[link]) : "");
  drawFacts({
    Run: run.id,
    Started: when(created),
    "Learning rate": short(request.lr),
    "Batch size": `${request.batch_size}`,
    Seed: `${request.seed}`,
    "Events dropped": Object.entries(dropped).map(([name, n]) => `${name} ${n}`).join(", "),
  });
  $("ended").hidden = !reason;
  say($("ended"), `${capital(status)}${who ? ` by ${who}` : ""}: ${reason}`);
  $("gap").hidden = !run.missed;
  const lost = count(run.missed, "message is", "messages are");
  const missing = "batches and log lines are missing here, epochs are not";
  say($("gap"), `${lost} no longer available: ${missing}.`);
  allowStop(run.running);
  $("weights").hidden = run.running;
  $("weights").href = `runs/${run.id}/weights`;
}

/** A disabled element loses the focus: move it to the run, not to the start of the page. */
function allowStop(allowed) {
  if (!allowed && $("stop-form").contains(document.activeElement)) {
    $("run").focus({ preventScroll: true });
  }
  for (const node of $("stop-form").elements) node.disabled = !allowed;
  if (!allowed) $("reason").value = "";
}

/** Facts without a text are left out. */
function drawFacts(facts) {
  const known = Object.entries(facts).filter(([, fact]) => fact);
  const list = $("request");
  if (list.childElementCount !== known.length) list.replaceChildren(...known.map(makeFact));
  known.forEach(([name, fact], i) => {
    say(list.children[i].firstChild, name);
    say(list.children[i].lastChild, fact);
  });
}

function makeFact() {
  const div = element("div");
  div.append(element("dt"), element("dd"));
  return div;
}

function drawProgress(run) {
  $("progress").value = run.done;
  say($("where"), positionText(run));
  say($("pace"), pace(run));
  const percentDone = run.running ? `${Math.floor(100 * run.done)} % ` : "";
  document.title = `${percentDone}${run.state.request.dataset}, ${run.state.status} – eventrain`;
}

function positionText({ at, running, state }) {
  if (!at) return running ? "Starting" : "";
  const epoch = `Epoch ${at.epoch + 1} of ${state.request.epochs}`;
  if (at.phase === "train") return `${epoch}, batch ${at.iter + 1} of ${at.n_iter ?? "?"}`;
  return running ? `${epoch}, validating` : epoch;
}

function pace(run) {
  const until = run.running ? run.now : Date.parse(run.state.ended);
  const seconds = Math.max(0, (until - Date.parse(run.state.created)) / 1000);
  if (!run.running) return `${duration(seconds)} in total`;
  const { done } = run;
  if (!done) return "";
  const left = `about ${duration(Math.ceil((seconds * (1 - done)) / done), 0)} left`;
  return `${rate(run.rows.at(-1)?.samples_per_second)} samples/s, ${duration(seconds)}, ${left}`;
}

function drawBatches(run) {
  if (!$("batches").open) return;
  const howMany = count(run.rows.length, "batch", "batches");
  say($("batches").querySelector("caption"), `The last ${howMany} reported, newest first`);
  const cells = (row) => [
    position(row).toFixed(3),
    row.iter + 1,
    number(row.loss),
    number(row.lr),
    rate(row.samples_per_second),
  ];
  fill($("batches"), run.rows.map(cells).reverse());
}
