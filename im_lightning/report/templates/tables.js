for (const table of document.querySelectorAll("table.find")) {
  const body = table.tBodies[0], rows = [...body.rows], count = document.createElement("span");
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "search";
  search.setAttribute("aria-label", "search these rows");
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/);
    let found = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      found += !row.hidden;
    }
    count.textContent = " " + found + " of " + rows.length;
  });
  table.parentElement.before(search, count);
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      const value = (row) => row.cells[column].textContent, number = (text) => parseFloat(text.replace(/,/g, ""));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => {
        const left = number(value(a)), right = number(value(b));
        if (head.className !== "r") return sign * value(a).localeCompare(value(b));
        return isNaN(left) - isNaN(right) || sign * (left - right) || 0;
      });
      body.append(...rows);
    });
  });
}
