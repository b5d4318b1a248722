// A click on a column's head sorts by it, another the other way round; rows without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.querySelectorAll("th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      table.tHead.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const body = table.tBodies[0];
      const keyed = [...body.rows].map(row => {
        const text = row.cells[column].textContent.trim(), number = parseFloat(text);
        return {row, text, number, rank: text === "" || text === "–" ? 2 : Number.isNaN(number) ? 1 : 0};
      });
      keyed.sort((a, b) => a.rank - b.rank || (falling ? -1 : 1) * (
        a.rank === 0 ? a.number - b.number : a.text.localeCompare(b.text, "en", {numeric: true})));
      body.append(...keyed.map(each => each.row));
    });
  });
}
