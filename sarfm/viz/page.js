// What all pages share: the data, tables, choices and words. Text that came from files is only ever set as textContent.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
function fill(table, rows) {
  table.replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell) => { const d = document.createElement("td"); d.textContent = cell; return d; }));
    return row;
  }));
}
function options(id, names, chosen, change) {
  const box = byId(id);
  box.replaceChildren(...names.map((name, i) => { const o = new Option(name, i); o.selected = i === chosen; return o; }));
  box.onchange = () => change(Number(box.value));
}
function fillEnds(id, values, digits) {
  byId(id).replaceChildren(...values.map((v) => { const s = document.createElement("span"); s.textContent = v.toFixed(digits).replace("-", "−"); return s; }));
}
for (const id of ["title", "subtitle", "attribution", "note"]) if (byId(id)) byId(id).textContent = data[id] || "";
