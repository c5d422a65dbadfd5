// Requests to the service, and its refusals.

import { capital } from "./texts.js";

export class Refusal extends Error {
  constructor(status, detail) {
    super(typeof detail === "string" ? capital(detail) : "The service refused the request");
    this.status = status;
    this.fields = Array.isArray(detail) ? detail : [];
  }
}

/** GET a path, or POST a body to it; a missing token dispatches `tokenwanted` on the window. */
export async function api(path, body) {
  const headers = { "content-type": "application/json" };
  const options = body && { method: "POST", headers, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refusal(0, "The service does not answer");
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  const answer = await response.json().catch(() => ({ detail: response.statusText }));
  if (response.status === 401 && path !== "session") dispatchEvent(new Event("tokenwanted"));
  throw new Refusal(response.status, answer.detail);
}
