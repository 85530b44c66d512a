// Lists that filter the table after them: an element of class "finder" names the columns of its lists.
document.querySelectorAll(".finder").forEach((finder) => {
  let table = finder.nextElementSibling;
  while (table && !table.querySelector("tbody")) table = table.nextElementSibling;
  if (!table) return;
  const rows = [...table.querySelectorAll("tbody tr")];
  const cell = (row, column) => row.cells[column].textContent.trim();
  const lists = finder.dataset.columns.split(",").map((column) => {
    const list = document.createElement("select");
    const title = table.querySelectorAll("thead th")[column].textContent.trim();
    list.setAttribute("aria-label", title);
    list.append(new Option(`any ${title}`, ""));
    [...new Set(rows.map((row) => cell(row, column)))].forEach((text) => list.append(new Option(text, text)));
    list.addEventListener("change", show);
    finder.append(list);
    return [list, column];
  });
  function show() {
    for (const row of rows) row.hidden = lists.some(([list, column]) => list.value && list.value !== cell(row, column));
  }
});
