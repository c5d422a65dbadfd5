// The format of numbers and times.

export const NONE = "–";

export function number(x) {
  if (x == null) return NONE;
  const readable = x === 0 || (Math.abs(x) >= 1e-3 && Math.abs(x) < 1e4);
  return readable ? x.toFixed(4) : x.toExponential(3);
}

export function short(x) {
  return Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3) ? x.toExponential() : `${x}`;
}

export const percent = (x) => (x == null ? NONE : (100 * x).toFixed(2));
export const rate = (x) => (x == null ? NONE : Math.round(x).toLocaleString("en"));
export const clock = (time) => new Date(time).toLocaleTimeString("en-GB");

/** The time, with the date unless it is today. */
export function when(time) {
  const day = (date) => date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  const date = new Date(time);
  return day(date) === day(new Date()) ? clock(time) : `${day(date)}, ${clock(time)}`;
}

export function duration(seconds, digits = seconds < 10 ? 1 : 0) {
  if (seconds < 60) return `${seconds.toFixed(digits)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const count = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
export const capital = (text) => text[0].toUpperCase() + text.slice(1);
