"use strict";
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});

let chosen = null;
function choose(name) {
  chosen = chosen === name ? null : name;
  for (const button of document.querySelectorAll(".legend button")) button.setAttribute("aria-pressed", String(button.dataset.name === chosen));
  for (const svg of document.querySelectorAll("svg.lines")) {
    const own = [...svg.querySelectorAll("[data-name]")];
    for (const mark of own) mark.classList.toggle("chosen", mark.dataset.name === chosen);
    svg.classList.toggle("is-chosen", own.some((mark) => mark.dataset.name === chosen));
  }
}
for (const button of document.querySelectorAll(".legend button")) button.addEventListener("click", () => choose(button.dataset.name));

function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}

function follow(svg) {
  const figure = svg.closest("figure"), { low, high, left, right } = svg.dataset;
  const lines = [...svg.querySelectorAll("path.line")].map((path) => ({
    name: path.dataset.name,
    style: [...path.classList].find((part) => /^c\d$/.test(part)),
    points: path.dataset.points.split(";").map((point) => point.split(",").map(Number)),
  }));
  const height = svg.viewBox.baseVal.height, width = svg.viewBox.baseVal.width;
  let tip = null, cursor = null;
  function leave() {
    if (tip) tip.remove();
    if (cursor) cursor.remove();
    tip = cursor = null;
  }
  function show(event) {
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * width;
    if (at < left - 6 || at > Number(right) + 6) return leave();
    const step = Number(low) + ((at - left) / (right - left)) * (high - low);
    const all = lines.map((line) => ({ ...line, point: nearest(line.points, step) }));
    const shown = nearest(all.map((line) => line.point), step)[0];
    const isSteps = svg.dataset.axis === "step"; // on another axis no two lines have a point in the same place
    const near = all.filter((line) => !isSteps || line.point[0] === shown).sort((one, other) => other.point[1] - one.point[1]);
    if (!tip) {
      tip = document.createElement("div");
      tip.className = "tip";
      figure.append(tip);
      cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
      cursor.setAttribute("class", "cursor");
      svg.append(cursor);
    }
    const across = Number(left) + ((shown - low) / (high - low)) * (right - left);
    for (const [name, value] of [["x1", across], ["x2", across], ["y1", 8], ["y2", height - 40]]) cursor.setAttribute(name, value);
    const head = document.createElement("b");
    head.textContent = isSteps ? "step " + shown : shown + " " + svg.dataset.axis;
    tip.replaceChildren(head);
    for (const line of near) {
      const row = document.createElement("div"), key = document.createElement("i");
      key.className = line.style;
      row.append(key, line.name + "  " + line.point[1]);
      tip.append(row);
    }
    const room = figure.getBoundingClientRect(), x = event.clientX - room.left;
    tip.style.left = Math.max(4, x + 14 + tip.offsetWidth < room.width ? x + 14 : x - tip.offsetWidth - 14) + "px";
    tip.style.top = box.top - room.top + 6 + "px";
  }
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", leave);
}
for (const svg of document.querySelectorAll("svg.lines")) follow(svg);
