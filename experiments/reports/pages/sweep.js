// The sweep's page: sort the table, point at a trial to see it in all drawings, brush axes of the parallel coordinates.
"use strict";

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip");
const trials = JSON.parse(document.getElementById("trials").textContent);
let pinned = null;

function show(number) {
  document.body.classList.toggle("picking", number !== null);
  for (const mark of all("[data-trial]")) mark.classList.toggle("picked", mark.dataset.trial === number);
}

function tell(number, event) {
  tip.hidden = number === null;
  if (number === null) return;
  tip.textContent = trials[number];
  const right = Math.min(event.clientX + 16, window.innerWidth - tip.offsetWidth - 8);
  const below = Math.min(event.clientY + 16, window.innerHeight - tip.offsetHeight - 8);
  tip.style.transform = `translate(${right}px, ${below}px)`;
}

for (const mark of all("[data-trial]")) {
  const number = mark.dataset.trial;
  const isRow = mark.tagName === "TR";
  mark.addEventListener("mousemove", (event) => { show(number); if (!isRow) tell(number, event); });
  mark.addEventListener("mouseleave", () => { show(pinned); tell(null); });
  mark.addEventListener("click", () => { pinned = pinned === number ? null : number; show(pinned); });
}

// Sorting: numbers as numbers, nothing last, in both directions.
for (const head of all("#table th")) {
  const sort = () => {
    const column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of all("#table th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (one, other) => {
      const [a, b] = [key(one), key(other)];
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return up ? order : -order;
    };
    const body = document.querySelector("#table tbody");
    body.append(...[...body.rows].sort(compare));
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}

// Brushing: drag along an axis to keep the lines that cross it there; a click on the axis takes the brush away.
const svg = document.getElementById("parallel");
const brushes = new Map();

function filter() {
  let kept = 0;
  for (const line of all("#parallel .line")) {
    const ys = line.dataset.ys.split(" ").map(Number);
    const inside = [...brushes].every(([axis, [low, high]]) => ys[axis] >= low && ys[axis] <= high);
    kept += inside;
    line.classList.toggle("out", !inside);
    const row = document.querySelector(`#table tr[data-trial="${line.dataset.trial}"]`);
    row.classList.toggle("out", !inside);
  }
  const words = document.getElementById("brushed");
  words.textContent = brushes.size ? `${kept} trials in the brushed ranges` : "";
}

if (svg) {
  const place = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).y;
  for (const axis of all(".axis", svg)) {
    const [handle, mark] = [axis.querySelector(".handle"), axis.querySelector(".brush")];
    let start = null;
    handle.addEventListener("pointerdown", (event) => { start = place(event); handle.setPointerCapture(event.pointerId); });
    handle.addEventListener("pointermove", (event) => {
      if (start === null) return;
      const [low, high] = [start, place(event)].sort((a, b) => a - b);
      mark.setAttribute("y", low);
      mark.setAttribute("height", high - low);
      brushes.set(axis.dataset.axis, [low, high]);
      filter();
    });
    handle.addEventListener("pointerup", (event) => {
      if (Math.abs(place(event) - start) < 3) {
        mark.setAttribute("height", 0);
        brushes.delete(axis.dataset.axis);
        filter();
      }
      start = null;
    });
  }
}

for (const button of all("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const command = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(command);
    document.execCommand("copy");
    button.textContent = "copied";
  });
}
