"use strict";
// Sorts, filters and pages the table of completions. Without this script, all of its lines are shown.
const table = document.getElementById("completions");
if (table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const column = Object.fromEntries(heads.map((head, i) => [head.dataset.key, i]));
  const page = 50, filters = ["iteration", "quantile", "kind"].map(id => document.getElementById(id));
  const search = document.getElementById("search"), more = document.getElementById("more");
  const rows = [...body.rows].map(line => {
    const texts = [...line.cells].map(cell => cell.textContent.trim());
    return {line, texts, words: (texts[0] + " " + texts[1]).toLowerCase()};
  });
  let shown = page;

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = rows.filter(row => words.every(word => row.words.includes(word)) && filters.every(
      filter => !filter.value || row.texts[column[filter.id]].split(/\s+/).includes(filter.value)));
    const visible = new Set(kept.slice(0, shown));
    for (const row of rows) row.line.hidden = !visible.has(row);
    more.hidden = kept.length <= shown;
    document.getElementById("count").textContent = `${visible.size} of ${kept.length}`;
  }

  function sort(head, index) {
    const isNumber = head.classList.contains("number");
    const order = head.getAttribute("aria-sort") === (isNumber ? "descending" : "ascending") ? -1 : 1;
    const compare = isNumber
      ? (a, b) => parseFloat(b.texts[index]) - parseFloat(a.texts[index])
      : (a, b) => a.texts[index].localeCompare(b.texts[index]);
    rows.sort((a, b) => order * compare(a, b));
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isNumber === (order === 1) ? "descending" : "ascending");
    body.append(...rows.map(row => row.line));
    show();
  }

  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(head, index));
    head.replaceChildren(button);
  });
  for (const control of [search, ...filters]) control.addEventListener("input", () => { shown = page; show(); });
  more.addEventListener("click", () => { shown += 4 * page; show(); });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
  document.querySelector(".controls").hidden = false;
  show();
}
