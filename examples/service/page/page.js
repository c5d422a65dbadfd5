// The page of the service: starts runs, follows the run in the address, and stops it.

import { api } from "./api.js";
import { $ } from "./dom.js";
import { Follower } from "./follower.js";
import { onSubmit, typed } from "./forms.js";
import { list, mark } from "./list.js";
import { Run } from "./run.js";
import { View } from "./view.js";

const RELOAD = 5000; // milliseconds between two requests of the list of runs

const narrow = matchMedia("(width < 60rem)");
const view = new View(redraw);
let follower = null;
let frame = 0;

/** Draw once before the next frame. */
function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (!follower?.run.state) return;
    view.draw(follower.run, follower.link);
    mark(follower.run);
  });
}

/** Show the run with this id; or no run, and a message. */
function show(id, message = "Start a run to see its curves here.") {
  follower?.close();
  view.clear(id ? "Loading…" : message);
  follower = id ? new Follower(new Run(id), redraw, (why) => show(null, why)) : null;
  mark(follower?.run);
}

const chosen = () => location.hash.match(/^#([0-9a-f]{16})$/)?.[1];

/** Show the run in the address, or the newest. */
async function begin() {
  $("login").hidden = true;
  const [newest] = await list();
  if (!$("login").hidden) return;
  $("app").hidden = false;
  if (!chosen() && newest) history.replaceState(null, "", `#${newest.id}`);
  show(chosen());
}

addEventListener("tokenwanted", () => {
  follower?.close();
  $("app").hidden = true;
  $("login").hidden = false;
  $("token").focus();
});

onSubmit($("token-form"), $("token-error"), async ({ token }) => {
  await api("session", { token });
  $("token-form").reset();
  await begin();
});

onSubmit($("run-form"), $("run-form-error"), async (fields) => {
  const entries = Object.entries(fields).map(([name, text]) => [name, typed(text)]);
  location.hash = (await api("runs", Object.fromEntries(entries))).id;
  await list();
});

onSubmit($("stop-form"), $("reason-error"), async ({ reason }) => {
  const { run } = follower;
  await api(`runs/${run.id}/stop`, reason.trim() ? { reason } : {});
  run.stopping = true;
  redraw();
});

addEventListener("hashchange", () => {
  if (!chosen() || chosen() === follower?.run.id) return;
  show(chosen());
  if (narrow.matches) $("run").focus();
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is the run's
  $("run").focus();
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

const reload = () => document.hidden || $("app").hidden || list();
setInterval(reload, RELOAD);
document.addEventListener("visibilitychange", () => {
  follower?.connect();
  reload();
});

$("new-run").open = !narrow.matches;
begin();
