"use strict";
// Charts: the values at the training step below the pointer or the finger, or at the one that the arrow keys reach.

/** [step, value] of the logged points of a curve, which are its first line in the drawing. */
function loggedPoints(curve, chart) {
  const [xLow, xHigh, yLow, yHigh] = ["xLow", "xHigh", "yLow", "yHigh"].map((name) => Number(chart.dataset[name]));
  return curve.querySelector("polyline").getAttribute("points").trim().split(/\s+/).map((pair) => {
    const [x, y] = pair.split(",").map(Number);
    return [xLow + (x / 1000) * (xHigh - xLow), yHigh - (y / 1000) * (yHigh - yLow)];
  });
}

/** A value of the drawing, which holds it to a hundred-thousandth of the axis. */
function readable(value, range) {
  const digits = Math.max(0, 3 - Math.floor(Math.log10(range)));
  return digits > 12 ? value.toPrecision(4) : String(Number(value.toFixed(digits)));
}

function setUpChart(chart) {
  const [plot, readout] = [chart.querySelector(".plot"), chart.querySelector(".readout")];
  const range = Number(chart.dataset.yHigh) - Number(chart.dataset.yLow);
  const [xLow, xHigh] = [Number(chart.dataset.xLow), Number(chart.dataset.xHigh)];
  const curves = [...chart.querySelectorAll("g[data-curve]")].map((curve) => {
    return { curve, name: curve.dataset.name, points: loggedPoints(curve, chart) };
  });
  const steps = [...new Set(curves.flatMap(({ points }) => points.map(([step]) => Math.round(step))))].sort((a, b) => a - b);
  // The cursor is a slider over the steps, so that keys and screen readers reach every value.
  const cursor = document.createElement("span");
  cursor.className = "cursor";
  const parts = { tabindex: 0, role: "slider", "aria-label": `${chart.querySelector("figcaption").textContent}: training step`,
    "aria-valuemin": steps[0], "aria-valuemax": steps.at(-1), "aria-valuenow": steps.at(-1), "aria-valuetext": readout.textContent };
  for (const [name, value] of Object.entries(parts)) cursor.setAttribute(name, value);
  plot.append(cursor);
  const resting = readout.textContent;
  let place = steps.length - 1;

  const nearest = (points, step) => points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  function show(index) {
    place = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[place];
    const shown = curves.filter(({ curve }) => curve.style.display !== "none");
    const values = shown.map(({ name, points }) => `${name} ${readable(nearest(points, step)[1], range)}`);
    readout.textContent = `step ${step.toLocaleString("en")}: ${values.join(", ")}`;
    cursor.style.left = `${(100 * (step - xLow)) / (xHigh - xLow)}%`;
    cursor.classList.add("shown");
    cursor.setAttribute("aria-valuenow", step);
    cursor.setAttribute("aria-valuetext", readout.textContent);
  }
  function rest() {
    cursor.classList.remove("shown");
    readout.textContent = resting;
  }
  function follow(event) {
    const box = plot.getBoundingClientRect();
    const step = xLow + ((event.clientX - box.left) / box.width) * (xHigh - xLow);
    show(steps.indexOf(steps.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best))));
  }

  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") rest(); });
  cursor.addEventListener("focus", () => show(place));
  cursor.addEventListener("blur", rest);
  cursor.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, PageDown: place - far, PageUp: place + far, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") rest();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

function setUpCharts() {
  for (const chart of document.querySelectorAll('[data-chart="lines"]')) setUpChart(chart);
}

setUpCharts();
