// The log of the run that is shown.

import { $, element } from "./dom.js";
import { MAX_LINES } from "./run.js";
import { clock } from "./texts.js";

/** Add new lines, and keep the end in view if it was in view before. */
export function drawLog(run) {
  const box = $("log");
  const fresh = run.lines.splice(0);
  if (!fresh.length) return;
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 8;
  box.append(...fresh.map(makeLine));
  while (box.childElementCount > MAX_LINES) box.firstChild.remove();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function makeLine({ timestamp, level, message, fields }) {
  const line = element("p", `line ${level}`);
  const fraction = timestamp.match(/\.\d{3}/)?.[0] ?? ".000"; // absent at a full second
  const time = element("time", "", `${clock(timestamp)}${fraction}`);
  const parts = [time, element("span", "level", level), element("b", "", message)];
  line.append(...parts.flatMap((part) => [part, " "]), element("span", "fields", pairs(fields)));
  return line;
}

/** key=value, with dotted keys for nested values; logs count epochs and batches from 0. */
function pairs(fields, prefix = "") {
  return Object.entries(fields)
    .filter(([key]) => key !== "schema_version")
    .map(([key, value]) =>
      value && typeof value === "object"
        ? pairs(value, `${prefix}${key}.`)
        : `${prefix}${key}=${typeof value === "number" ? Number(value.toPrecision(5)) : value}`,
    )
    .filter(Boolean)
    .join(" ");
}
