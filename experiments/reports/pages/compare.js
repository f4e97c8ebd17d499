"use strict";
// Everything that the page shows of runs is put in as text, never as markup: a completion may hold any.

const PER_PAGE = 5;
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element: make("td", {class: "number"}, "12", child, ...). */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);

// Accuracy by task

function showDeltas() {
  const before = data.stages[byId("delta-from").value];
  const after = data.stages[byId("delta-to").value];
  const names = Object.keys(after.tasks).filter((task) => task in before.tasks);
  const rows = names.map((task) => [task, before.tasks[task], after.tasks[task]]);
  for (const [name, key] of [["AVG", "avg"], ["in-domain", "in_domain"], ["out-of-domain", "out_of_domain"]]) {
    if (before[key] !== null && after[key] !== null) rows.push([name, before[key], after[key]]);
  }
  const widest = Math.max(1, ...rows.map(([, a, b]) => Math.abs(b - a)));
  const body = rows.map(([name, a, b], place) => {
    const share = (50 * Math.abs(b - a)) / widest;
    const side = b < a ? "right" : "left";
    const bar = make("i", { class: b < a ? "loss" : "gain", style: `${side}: 50%; width: ${share.toFixed(2)}%` });
    const cells = [make("td", {}, name), make("td", {}, fixed(a)), make("td", {}, fixed(b)), make("td", {}, signed(b - a))];
    const kind = place >= names.length ? "total" : "";
    return make("tr", { class: kind }, ...cells, make("td", { class: "bar" }, make("div", {}, bar)));
  });
  const heads = ["task", before.label, after.label, "difference", ""].map((text) => make("th", {}, text));
  byId("deltas").replaceChildren(
    make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body)),
  );
}

function setUpDeltas() {
  for (const [id, chosen] of [["delta-from", 0], ["delta-to", data.stages.length - 1]]) {
    byId(id).append(...data.stages.map((stage, place) => make("option", { value: place }, stage.label)));
    byId(id).value = chosen;
    byId(id).addEventListener("change", showDeltas);
  }
  showDeltas();
}

// Curves: drawn already; what is chosen is shown

function setUpCurves() {
  for (const box of document.querySelectorAll("input[data-chart]")) {
    const figure = [...document.querySelectorAll("figure[data-metric]")].find((f) => f.dataset.metric === box.dataset.chart);
    const show = () => { figure.hidden = !box.checked; };
    box.addEventListener("change", show);
    show(); // a browser may remember boxes over a reload
  }
  for (const box of document.querySelectorAll("input[data-run]")) {
    const show = () => {
      for (const curve of document.querySelectorAll(`[data-curve="${box.dataset.run}"]`)) {
        curve.style.display = box.checked ? "" : "none";
      }
    };
    box.addEventListener("change", show);
    show();
  }
}

// Rollouts: an index for each run, and chunks of whole groups, loaded when they are first shown

const KEPT_CHUNKS = 40; // in memory
const indices = new Map();
const chunks = new Map();
const waiting = new Map();

function receiveIndex(name, index) { indices.set(name, index); }
function receiveChunk(name, groups) {
  chunks.set(name, groups);
  if (chunks.size > KEPT_CHUNKS) chunks.delete(chunks.keys().next().value);
}

/** Run the script at `source` once; file:// allows no fetch. */
function load(source) {
  if (!waiting.has(source)) {
    waiting.set(source, new Promise((done, failed) => {
      const script = make("script", { src: source });
      script.onload = () => { script.remove(); waiting.delete(source); done(); };
      script.onerror = () => { script.remove(); waiting.delete(source); failed(new Error(`${source} is missing`)); };
      document.head.append(script);
    }));
  }
  return waiting.get(source);
}

async function readIndex(name) {
  if (!indices.has(name)) await load(`rollouts/${name}/index.js`);
  return indices.get(name);
}

/** Whole groups at these places of a run's index. */
async function readGroups(name, index, places) {
  const found = new Map();
  const numbers = [...new Set(places.map((place) => Math.floor(place / index.chunk)))];
  await Promise.all(numbers.map(async (number) => {
    const key = `${name}/${number}`;
    if (!chunks.has(key)) await load(`rollouts/${name}/chunk-${String(number).padStart(5, "0")}.js`);
    found.set(number, chunks.get(key));
  }));
  return places.map((place) => found.get(Math.floor(place / index.chunk))[place % index.chunk]);
}

// Columns of a row of the index
const [BATCH, UPDATE, ID, TASK, ZERO_ADVANTAGE, REWARD, ACCURACY] = [0, 1, 2, 3, 4, 5, 6];

/** Places of the groups that the filters let through, in the order asked for. */
function choose(index) {
  const [task, name, zero] = [byId("task").value, byId("name").value.trim(), byId("zero_advantage").value];
  const first = byId("first").value === "" ? -Infinity : Number(byId("first").value);
  const last = byId("last").value === "" ? Infinity : Number(byId("last").value);
  const rows = index.groups;
  const places = [...rows.keys()].filter((place) => {
    const row = rows[place];
    return (task === "" || row[TASK] === Number(task)) && row[ID].includes(name) && row[UPDATE] >= first
      && row[UPDATE] <= last && (zero === "" || row[ZERO_ADVANTAGE] === Number(zero));
  });
  const way = { low: 1, high: -1 }[byId("order").value];
  return way ? places.sort((a, b) => way * (rows[a][REWARD] - rows[b][REWARD]) || a - b) : places;
}

let asked = 0;

async function showGroups() {
  const mine = ++asked;
  const name = byId("log").value;
  try {
    const index = await readIndex(name);
    if (mine !== asked) return;
    const places = choose(index);
    const pages = Math.max(1, Math.ceil(places.length / PER_PAGE));
    const page = Math.min(Math.max(1, Number(byId("page").value) || 1), pages);
    byId("page").value = page;
    byId("page").max = pages;
    byId("pages").textContent = pages.toLocaleString("en");
    byId("previous").disabled = page === 1;
    byId("next").disabled = page === pages;
    byId("count").textContent = `${places.length.toLocaleString("en")} of ${index.groups.length.toLocaleString("en")} groups`;
    const shown = places.slice((page - 1) * PER_PAGE, page * PER_PAGE);
    const groups = await readGroups(name, index, shown);
    if (mine !== asked) return; // another page was asked for meanwhile
    byId("groups").replaceChildren(...groups.map((group, k) => groupCard(name, index, index.groups[shown[k]], group)));
  } catch (error) {
    if (mine === asked) byId("groups").replaceChildren(make("p", { class: "fault" }, String(error.message)));
  }
}

function groupCard(name, index, row, group) {
  const card = make("article", { class: "group" });
  const facts = `update ${row[UPDATE]}, batch ${row[BATCH]} · mean reward ${fixed(row[REWARD])} · mean IoU ${fixed(row[ACCURACY])}`;
  const head = make("h3", {}, make("b", {}, index.tasks[row[TASK]]), ` ${row[ID]} `, make("span", { class: "note" }, facts));
  if (row[ZERO_ADVANTAGE]) head.append(make("span", { class: "badge" }, "all rewards equal"));
  const question = make("p", { class: "question" }, group.question ?? "The question is not in the shards.");
  const pictures = make("div", { class: "pictures" });
  group.sizes.forEach((size, place) => pictures.append(picture(name, group, place, size)));
  const list = make("ol", { class: "completions" });
  group.completions.forEach((completion, k) => list.append(completionItem(card, completion, k)));
  card.append(head, question, make("div", { class: "columns" }, pictures, list));
  return card;
}

function picture(name, group, place, [width, height]) {
  const frame = make("div", { class: "frame", style: `aspect-ratio: ${width} / ${height}` });
  const file = group.pictures[place];
  if (file) frame.append(make("img", { src: `rollouts/${name}/pictures/${encodeURIComponent(file)}`, alt: "", loading: "lazy" }));
  // Boxes are [image, x1, y1, x2, y2]: those of this image.
  const here = (boxes) => boxes.filter(([image]) => image === place).map(([, ...box]) => box);
  const labels = group.labels.filter((_, k) => group.truths[k][0] === place);
  const target = labels.length > 0;
  const layer = make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none" });
  layer.append(...here(group.truths).map((box) => rectangle(box, { class: "true" })));
  group.completions.forEach((completion, k) => {
    layer.append(...here(completion.boxes).map((box) => rectangle(box, { class: "predicted", "data-completion": k })));
  });
  if (layer.childNodes.length) frame.append(layer);
  const caption = `image ${place + 1}${target ? `, true: ${labels.join(", ")}` : ""}${file ? "" : " (no picture)"}`;
  return make("figure", { class: target ? "target" : "" }, frame, make("figcaption", {}, caption));
}

/** A unit box, possibly inverted or outside: cut to the picture, sides put in order. */
function rectangle(box, attributes) {
  const [x1, y1, x2, y2] = box.map((value) => 100 * Math.min(1, Math.max(0, value)));
  const [left, top] = [Math.min(x1, x2), Math.min(y1, y2)];
  return make("rect", { x: left, y: top, width: Math.abs(x2 - x1), height: Math.abs(y2 - y1), ...attributes });
}

/** A model's JSON on one line, without its fence; the raw text is behind "as written". */
const brief = (answer) => answer.replace(/```(json)?/g, "").replace(/\s+/g, " ").trim();

/** Every reward by its name; the other fields of the record are no rewards. */
const terms = (reward) => Object.entries(reward).filter(([name]) => !["total", "failure", "failed"].includes(name))
  .map(([name, value]) => `${name} ${fixed(value)}`).join(" · ");

function completionItem(card, completion, k) {
  const { reward, advantage } = completion;
  const raw = make("pre", { hidden: "" }, completion.text);
  const button = make("button", { type: "button", class: "link" }, "as written");
  button.addEventListener("click", () => { raw.hidden = !raw.hidden; });
  const score = make("p", { class: "score" }, make("b", {}, `reward ${fixed(reward.total)}`),
    ` · IoU ${fixed(completion.iou)} · ${terms(reward)} · `,
    make("span", { class: ["loss", "", "gain"][1 + Math.sign(advantage)] }, `advantage ${signed(advantage)}`));
  if (reward.failure) score.append(make("span", { class: "badge" }, reward.failure));
  score.append(button);
  const item = make("li", {}, score);
  const parsed = completion.thinking !== null && completion.answer !== null;
  if (parsed) item.append(make("p", { class: "thinking" }, completion.thinking));
  item.append(make("code", {}, parsed ? brief(completion.answer) : completion.text || "(empty)"), raw);
  const mark = (on) => () => {
    card.classList.toggle("one", on);
    for (const box of card.querySelectorAll(`[data-completion="${k}"]`)) box.classList.toggle("chosen", on);
  };
  item.addEventListener("mouseenter", mark(true));
  item.addEventListener("mouseleave", mark(false));
  return item;
}

async function chooseLog() {
  const index = await readIndex(byId("log").value).catch(() => ({ tasks: [] })); // showGroups says what is missing
  byId("task").replaceChildren(make("option", { value: "" }, "all"),
    ...index.tasks.map((task, k) => make("option", { value: k }, task || "(not logged)")));
  return firstPage();
}

function firstPage() { byId("page").value = 1; return showGroups(); }
function turn(by) { byId("page").value = Number(byId("page").value) + by; return showGroups(); }

function setUpRollouts() {
  byId("log").append(...data.logs.map((log) => make("option", { value: log.name }, log.label)));
  byId("log").addEventListener("change", chooseLog);
  for (const id of ["task", "zero_advantage", "order"]) byId(id).addEventListener("change", firstPage);
  for (const id of ["name", "first", "last"]) byId(id).addEventListener("input", firstPage);
  byId("page").addEventListener("change", showGroups);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  // Nothing is loaded before a reader gets near.
  const near = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) { near.disconnect(); chooseLog(); }
  }, { rootMargin: "300px" });
  near.observe(byId("browser"));
}

if (byId("deltas")) setUpDeltas();
setUpCurves();
if (byId("browser")) setUpRollouts();
