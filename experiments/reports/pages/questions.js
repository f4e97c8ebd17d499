"use strict";
// Questions with their images and boxes: what the rollout browser and the page of predictions share.
// Everything that comes from a model or from data is put in as text, never as markup.

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
/** A model's JSON on one line, without its fence; the raw text is behind "as written". */
const brief = (answer) => answer.replace(/```(json)?/g, "").replace(/\s+/g, " ").trim();

/**
 * The images of a question with the true boxes, and the predicted boxes of each answer.
 *
 * question: {sizes: [[width, height]], truths: [[image, x1, y1, x2, y2]], labels: [text]}; sources: address of each
 * image, or nothing; predicted: [{key, boxes, kind}], where `key` is that of `singleOut`.
 */
function questionPictures(question, sources, predicted) {
  const pictures = make("div", { class: "pictures" });
  question.sizes.forEach(([width, height], place) => {
    const frame = make("div", { class: "frame", style: `aspect-ratio: ${width} / ${height}` });
    const here = (boxes) => boxes.filter(([image]) => image === place).map(([, ...box]) => box);
    const labels = question.labels.filter((_, k) => question.truths[k][0] === place);
    const caption = `image ${place + 1}${labels.length ? `, true: ${labels.join(", ")}` : ""}${sources[place] ? "" : " (no picture)"}`;
    if (sources[place]) frame.append(make("img", { src: sources[place], alt: caption, loading: "lazy" }));
    const layer = make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
    layer.append(...here(question.truths).map((box) => rectangle(box, { class: "true" })));
    for (const { key, boxes, kind = "" } of predicted) {
      layer.append(...here(boxes).map((box) => rectangle(box, { class: `predicted ${kind}`.trim(), "data-completion": key })));
    }
    if (layer.childNodes.length) frame.append(layer);
    pictures.append(make("figure", { class: labels.length ? "target" : "" }, frame, make("figcaption", {}, caption)));
  });
  return pictures;
}

/** A unit box, possibly inverted or outside: cut to the picture, sides put in order. */
function rectangle(box, attributes) {
  const [x1, y1, x2, y2] = box.map((value) => 100 * Math.min(1, Math.max(0, value)));
  const [left, top] = [Math.min(x1, x2), Math.min(y1, y2)];
  return make("rect", { x: left, y: top, width: Math.abs(x2 - x1), height: Math.abs(y2 - y1), ...attributes });
}

/** While an answer has the pointer, the finger or the focus, its boxes stand out in the card. */
function singleOut(card, item, key) {
  const mark = (on) => () => {
    card.classList.toggle("one", on);
    item.classList.toggle("marked", on);
    for (const box of card.querySelectorAll(`[data-completion="${key}"]`)) box.classList.toggle("chosen", on);
  };
  item.tabIndex = 0;
  for (const event of ["mouseenter", "focusin"]) item.addEventListener(event, mark(true));
  for (const event of ["mouseleave", "focusout"]) item.addEventListener(event, mark(false));
}

/** The text of an answer: thinking and answer where both were read; a button shows it as written. */
function answerText(completion) {
  const raw = make("pre", { hidden: "" }, completion.text);
  const button = make("button", { type: "button", class: "link", "aria-expanded": "false" }, "as written");
  button.addEventListener("click", () => {
    raw.hidden = !raw.hidden;
    button.setAttribute("aria-expanded", String(!raw.hidden));
  });
  const parsed = completion.thinking !== null && completion.answer !== null;
  const parts = parsed ? [make("p", { class: "thinking" }, completion.thinking)] : [];
  parts.push(make("code", {}, parsed ? brief(completion.answer) : completion.text || "(empty)"), raw);
  return { button, parts };
}

/** The buttons and the number of a pager: shows which of `count` cards are on the page, and gives their range. */
function turnPages(count, perPage) {
  const pages = Math.max(1, Math.ceil(count / perPage));
  const page = Math.min(Math.max(1, Number(byId("page").value) || 1), pages);
  byId("page").value = page;
  byId("page").max = pages;
  byId("pages").textContent = pages.toLocaleString("en");
  byId("previous").disabled = page === 1;
  byId("next").disabled = page === pages;
  return [(page - 1) * perPage, page * perPage];
}

/** Call `show` when the pager turns; returns what shows the first page, for filters. */
function setUpPager(show) {
  const turn = (by) => { byId("page").value = Number(byId("page").value) + by; return show(); };
  byId("page").addEventListener("change", show);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  return () => { byId("page").value = 1; return show(); };
}
