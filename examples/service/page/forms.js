// Forms: one request at a time, with the service's errors shown next to the fields.

import { Refusal } from "./api.js";
import { $, say } from "./dom.js";

/** Submit a form with `send`; errors that belong to no field are shown in `message`. */
export function onSubmit(form, message, send) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (form.ariaBusy === "true") return;
    form.ariaBusy = "true";
    clearErrors(form);
    try {
      await send(Object.fromEntries(new FormData(form)));
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      showErrors(form, message, refusal);
    } finally {
      form.ariaBusy = null;
    }
  });
}

export function clearErrors(form) {
  for (const node of form.querySelectorAll(".error")) say(node, "");
  for (const node of form.querySelectorAll("[aria-invalid]")) node.removeAttribute("aria-invalid");
}

function showErrors(form, message, refusal) {
  const others = refusal.fields.length ? [] : [refusal.message];
  for (const { loc, msg } of refusal.fields) {
    const field = form.elements.namedItem(loc.at(-1));
    if (!field) {
      others.push(`${loc.join(".")}: ${msg}`);
      continue;
    }
    field.setAttribute("aria-invalid", "true");
    say($(`${field.id}-error`), msg);
  }
  if (others.length) say(message, others.join("; "));
  form.querySelector("[aria-invalid]")?.focus();
}

/** The value of a field, as a number if it is one; the service validates it. */
export const typed = (text) => (text.trim() && Number.isFinite(Number(text)) ? Number(text) : text);
