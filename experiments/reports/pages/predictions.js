"use strict";
// The answers of one or two models: filters, order, and a card for each question.

const PER_PAGE = 8;
const data = JSON.parse(document.getElementById("data").textContent);

/** The value of a field; what stands for an empty field, or for one that this page does not have, is `otherwise`. */
const read = (id, otherwise) => (byId(id) && byId(id).value !== "" ? byId(id).value : otherwise);

/** Whether the answers to a question are of the chosen kind. */
function isOfKind(question, kind) {
  const [first, second] = question.answers.map((answer) => answer.correct);
  const [word, model] = kind.split("-");
  const answer = question.answers[Number(model ?? 0)];
  return {
    "": true, wrong: !answer.correct, right: answer.correct, unread: answer.failure !== null,
    gained: !first && second, lost: first && !second, both: !first && !second,
  }[word];
}

/** The questions that the filters let through, in the order asked for. */
function choose() {
  const [column, kind, words, order] = ["column", "kind", "words", "order"].map((id) => read(id, ""));
  const [least, most, of] = [Number(read("least", -1)), Number(read("most", 2)), Number(read("of", 0))];
  const sought = words.trim().toLowerCase();
  const chosen = data.questions.filter((question) => {
    const iou = question.answers[of].iou;
    const texts = [question.id, question.question ?? "", ...question.answers.map((answer) => answer.text)];
    return (column === "" || question.column === Number(column)) && isOfKind(question, kind)
      && (iou === null || (iou >= least && iou <= most)) && texts.some((text) => text.toLowerCase().includes(sought));
  });
  const keys = { low: (q) => q.answers[of].iou ?? 2, high: (q) => -(q.answers[of].iou ?? -1), long: (q) => -Math.max(...q.answers.map((a) => a.text.length)) };
  return order ? chosen.map((q, k) => [keys[order](q), k, q]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, , q]) => q) : chosen;
}

function show() {
  const chosen = choose();
  const [from, to] = turnPages(chosen.length, PER_PAGE);
  const rates = data.models.map((label, k) => {
    const right = chosen.filter((question) => question.answers[k].correct).length;
    return `${label} ${right.toLocaleString("en")} right`;
  });
  byId("count").textContent = `${chosen.length.toLocaleString("en")} of ${data.questions.length.toLocaleString("en")} questions; ${rates.join(", ")}`;
  byId("groups").replaceChildren(...chosen.slice(from, to).map(questionCard));
}

function questionCard(question) {
  const card = make("article", { class: "group" });
  const head = make("h3", {}, make("b", {}, data.columns[question.column]), ` ${question.id}`);
  const text = make("p", { class: "question" }, question.question ?? "The question is not on this machine.");
  const sources = question.pictures.map((place) => (place === null ? null : data.pictures[place]));
  const predicted = question.answers.map((answer, k) => ({ key: k, boxes: answer.boxes, kind: k ? "second" : "" }));
  const answers = make("div", { class: "answers" }, ...question.answers.map((answer, k) => answerCard(card, answer, k)));
  const right = make("div", {}, ...(question.truth ? [make("p", { class: "note" }, `right: ${question.truth}`)] : []), answers);
  card.append(head, text, make("div", { class: "columns" }, questionPictures(question, sources, predicted), right));
  return card;
}

function answerCard(card, answer, k) {
  const { button, parts } = answerText(answer);
  const verdict = make("span", { class: answer.correct ? "gain" : "loss" }, answer.correct ? "right" : "wrong");
  const facts = [answer.iou === null ? `option ${answer.option ?? "–"}` : `IoU ${fixed(answer.iou)}`];
  if (answer.f1 !== null) facts.push(`F1 ${fixed(answer.f1)}`);
  if (answer.tokens) facts.push(`${answer.tokens} tokens`);
  const score = make("p", { class: "score" }, make("b", {}, data.models[k]), " · ", verdict, ` · ${facts.join(" · ")}`);
  if (answer.failure) score.append(make("span", { class: "badge" }, answer.failure));
  if (!answer.finished) score.append(make("span", { class: "badge" }, "cut at the limit"));
  score.append(button);
  const item = make("div", { class: "answer-item" }, score, ...parts);
  if (answer.boxes.length) singleOut(card, item, k);
  return item;
}

byId("column").append(...data.columns.map((column, k) => make("option", { value: k }, column)));
const firstPage = setUpPager(show);
for (const id of ["column", "kind", "order", "of"]) byId(id)?.addEventListener("change", firstPage);
for (const id of ["least", "most", "words"]) byId(id)?.addEventListener("input", firstPage);
show();
