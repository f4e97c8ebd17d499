"use strict";
// Everything that the page shows of runs is put in as text, never as markup: a completion may hold any.

const PER_PAGE = 5;
const data = JSON.parse(document.getElementById("data").textContent);

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
    return make("tr", { class: kind }, ...cells, make("td", { class: "delta" }, make("div", {}, bar)));
  });
  const heads = ["task", before.label, after.label, "difference", ""].map((text) => make("th", {}, text));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
  byId("deltas").replaceChildren(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "differences by task" }, table));
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
    const figure = [...document.querySelectorAll("div[data-metric]")].find((f) => f.dataset.metric === box.dataset.chart);
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
    const [from, to] = turnPages(places.length, PER_PAGE);
    byId("count").textContent = `${places.length.toLocaleString("en")} of ${index.groups.length.toLocaleString("en")} groups`;
    const shown = places.slice(from, to);
    const groups = await readGroups(name, index, shown);
    if (mine !== asked) return; // another page was asked for meanwhile
    byId("groups").replaceChildren(...groups.map((group, k) => groupCard(name, index, index.groups[shown[k]], group)));
  } catch (error) {
    if (mine === asked) byId("groups").replaceChildren(make("p", { class: "fault" }, String(error.message)));
  }
}

function groupCard(name, index, row, group) {
  const card = make("article", { class: "group" });
  const leftOut = group.completions.some((completion) => completion.reward.left_out);
  const reward = leftOut ? "no reward" : `mean reward ${fixed(row[REWARD])}`;
  const facts = `update ${row[UPDATE]}, batch ${row[BATCH]} · ${reward} · mean IoU ${fixed(row[ACCURACY])}`;
  const head = make("h3", {}, make("b", {}, index.tasks[row[TASK]]), ` ${row[ID]} `, make("span", { class: "note" }, facts));
  if (leftOut) head.append(make("span", { class: "badge" }, "left out: a reward could not judge it"));
  else if (row[ZERO_ADVANTAGE]) head.append(make("span", { class: "badge" }, "all rewards equal"));
  const question = make("p", { class: "question" }, group.question ?? "The question is not in the shards.");
  const sources = group.pictures.map((file) => `rollouts/${name}/pictures/${encodeURIComponent(file)}`);
  const pictures = questionPictures(group, sources, group.completions.map((completion, k) => ({ key: k, boxes: completion.boxes })));
  const list = make("ol", { class: "completions" });
  group.completions.forEach((completion, k) => list.append(completionItem(card, completion, k)));
  card.append(head, question, make("div", { class: "columns" }, pictures, list));
  return card;
}

/** Every reward by its name; the other fields of the record are no rewards. */
const terms = (reward) => Object.entries(reward).filter(([name]) => !["total", "failure", "failed", "left_out"].includes(name))
  .map(([name, value]) => `${name} ${fixed(value)}`).join(" · ");

function completionItem(card, completion, k) {
  const { reward, advantage } = completion;
  const { button, parts } = answerText(completion);
  const score = make("p", { class: "score" }, make("b", {}, reward.left_out ? "no reward" : `reward ${fixed(reward.total)}`),
    ` · IoU ${fixed(completion.iou)} · ${terms(reward)} · `,
    make("span", { class: ["loss", "", "gain"][1 + Math.sign(advantage)] }, `advantage ${signed(advantage)}`));
  if (reward.failed) score.append(make("span", { class: "badge" }, `not judged: ${reward.failed.join(", ")}`));
  if (reward.failure) score.append(make("span", { class: "badge" }, reward.failure));
  score.append(button);
  const item = make("li", {}, score, ...parts);
  singleOut(card, item, k);
  return item;
}

async function chooseLog() {
  const index = await readIndex(byId("log").value).catch(() => ({ tasks: [] })); // showGroups says what is missing
  byId("task").replaceChildren(make("option", { value: "" }, "all"),
    ...index.tasks.map((task, k) => make("option", { value: k }, task || "(not logged)")));
  return firstPage();
}

const firstPage = byId("browser") ? setUpPager(showGroups) : null;

function setUpRollouts() {
  byId("log").append(...data.logs.map((log) => make("option", { value: log.name }, log.label)));
  byId("log").addEventListener("change", chooseLog);
  for (const id of ["task", "zero_advantage", "order"]) byId(id).addEventListener("change", firstPage);
  for (const id of ["name", "first", "last"]) byId(id).addEventListener("input", firstPage);
  // Nothing is loaded before a reader gets near.
  const near = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) { near.disconnect(); chooseLog(); }
  }, { rootMargin: "300px" });
  near.observe(byId("browser"));
}

if (byId("deltas")) setUpDeltas();
setUpCurves();
if (byId("browser")) setUpRollouts();
