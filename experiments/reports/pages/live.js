// The page of a running experiment: when its files change, the new content takes the place of the old one. What the
// reader has unfolded stays unfolded, and the scroll position is kept. While the reader moves the cursor of a chart, the
// old content stays.

const folds = () => [...document.querySelectorAll("#content details")];
const foldName = (fold) => `${fold.closest("section, article")?.querySelector("h2, h3")?.textContent}/${fold.querySelector("summary").textContent}`;

const isReading = () => document.activeElement?.closest("#content .cursor");

function show(page) {
  const open = new Set(folds().filter((fold) => fold.open).map(foldName));
  const top = scrollY;
  document.getElementById("content").replaceChildren(...page.getElementById("content").childNodes);
  document.querySelector("header").replaceChildren(...page.querySelector("header").childNodes);
  for (const fold of folds()) fold.open = open.has(foldName(fold));
  setUpCharts();
  setUpCopying();
  scrollTo(0, top);
}

async function look() {
  let problem = "";
  try {
    const state = await (await fetch("state")).text();
    if (state !== facts.state && !isReading()) {
      const answer = await fetch("./");
      const text = await answer.text();
      if (!answer.ok) {
        problem = text;
      } else if (!isReading()) { // nor since the page was asked for
        show(new DOMParser().parseFromString(text, "text/html"));
        facts.state = state;
      }
    }
  } catch (error) {
    problem = `The server does not answer: make watch may have ended (${error.message}).`;
  }
  document.getElementById("connection").textContent = problem;
  setTimeout(look, 1000 * facts.seconds);
}

setTimeout(look, 1000 * facts.seconds);
