// Forms: sent once at a time, with what the service says against a field at that field.

import { Refusal } from "./api.js";
import { $, say } from "./dom.js";

/** Send a form with `send`; what is about no field of it is said at `message`. */
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

/** What a field holds: a number, where it can be read as one; the service judges it. */
export const typed = (text) => (text.trim() && Number.isFinite(Number(text)) ? Number(text) : text);
