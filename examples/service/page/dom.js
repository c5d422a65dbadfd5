// Helpers with which the other modules read and change the document.

export const $ = (id) => document.getElementById(id);

/** Set a text only if it differs, so that screen readers do not announce it again. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

/** Put rows into a table; the first cell of each row is its heading. */
export function fill(table, rows) {
  const body = table.querySelector("tbody");
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, i) => {
    const row = body.rows[i] ?? body.appendChild(makeRow(cells.length));
    cells.forEach((cell, j) => say(row.cells[j], `${cell}`));
  });
}

function makeRow(width) {
  const row = document.createElement("tr");
  for (let j = 0; j < width; j += 1) row.append(document.createElement(j ? "td" : "th"));
  row.cells[0].scope = "row";
  return row;
}
