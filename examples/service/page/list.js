// The list of runs.

import { api } from "./api.js";
import { $, element, say } from "./dom.js";
import { when } from "./texts.js";

let current = null;

/** Request the runs, newest first, and list them. */
export async function list() {
  let runs = [];
  try {
    runs = await api("runs");
  } catch (refusal) {
    say($("notice"), refusal.status === 401 ? "" : `${refusal.message}. Retrying…`);
    return runs;
  }
  say($("notice"), "");
  $("no-runs").hidden = runs.length > 0;
  drawList(runs);
  return runs;
}

/** Reuse the items, so that the focused one keeps the focus. */
function drawList(runs) {
  const items = new Map([...$("runs").children].map((item) => [item.dataset.run, item]));
  const ids = new Set(runs.map(({ id }) => id));
  for (const [id, item] of items) if (!ids.has(id)) item.remove();
  runs.forEach((run, i) => {
    const item = items.get(run.id) ?? makeItem(run);
    if ($("runs").children[i] !== item) $("runs").insertBefore(item, $("runs").children[i]);
    drawItem(item, run);
  });
  mark(current);
}

function makeItem({ id, request, created }) {
  const item = element("li");
  item.dataset.run = id;
  const link = element("a");
  link.href = `#${id}`;
  const status = element("span", "status");
  status.append(element("span"));
  const time = element("time", "muted", when(created));
  link.append(element("b", "", request.dataset), time, status, element("span", "reached muted"));
  item.append(link);
  return item;
}

function drawItem(item, { status, epoch, request }) {
  const node = item.querySelector(".status > span");
  node.className = status;
  say(node, status);
  say(item.querySelector(".reached"), `epoch ${epoch + 1} of ${request.epochs}`);
}

/** Mark the run that is shown, of which the page knows more than the last answer says. */
export function mark(run) {
  current = run;
  for (const item of $("runs").children) {
    if (item.dataset.run !== run?.id) {
      item.firstChild.removeAttribute("aria-current");
      continue;
    }
    item.firstChild.setAttribute("aria-current", "true");
    if (run.state) drawItem(item, { ...run.state, epoch: run.at?.epoch ?? run.state.epoch });
  }
}
