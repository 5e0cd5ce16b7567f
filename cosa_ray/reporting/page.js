"use strict";

// Tables are ordered by a click, or Enter or Space, on a column's head; empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const body = table.tBodies[0];
      const rows = [...body.rows];
      const key = (row) => row.cells[column].dataset.v ?? "";
      const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
      const before = head.getAttribute("aria-sort");
      const down = before === "none" ? numeric : before === "ascending";
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
        return down ? -order : order;
      });
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows);
    });
  });
}

// A chart says the values of all its lines at the step that is pointed at; arrow keys walk along the steps.
for (const chart of document.querySelectorAll("[data-chart]")) {
  const { lines, x } = JSON.parse(chart.dataset.chart);
  const [first, last, left, right] = x;
  const svg = chart.querySelector("svg");
  const cursor = chart.querySelector(".cursor");
  const readout = chart.querySelector(".readout");
  const steps = [...new Set(Object.values(lines).flat().map((point) => point[0]))].sort((a, b) => a - b);
  let at = steps.length - 1;
  const nearest = (points, step) =>
    points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  const show = () => {
    const place = left + ((steps[at] - first) / Math.max(1, last - first)) * (right - left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    const said = Object.entries(lines).map(([letter, points]) => {
      const [step, value] = nearest(points, steps[at]);
      return `${letter} ${value}` + (step === steps[at] ? "" : ` (step ${step.toLocaleString("en")})`);
    });
    readout.textContent = `step ${steps[at].toLocaleString("en")}:  ${said.join("   ")}`;
  };
  const hide = () => {
    cursor.setAttribute("x1", -9);
    cursor.setAttribute("x2", -9);
    readout.textContent = "\u00a0";
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const step = first + ((place - left) / (right - left)) * (last - first);
    at = steps.reduce((best, other, index) => (Math.abs(other - step) < Math.abs(steps[best] - step) ? index : best), 0);
    show();
  });
  svg.addEventListener("pointerleave", hide);
  chart.addEventListener("focus", show);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    at = Math.min(steps.length - 1, Math.max(0, at + by));
    show();
  });
}
