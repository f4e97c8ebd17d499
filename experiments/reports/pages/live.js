// The page of a running experiment: when its files change, the new content takes the place of the old one. What the
// reader has unfolded stays unfolded, and the scroll position is kept.

const folds = () => [...document.querySelectorAll("#content details")];
const foldName = (fold) => `${fold.closest("section, article")?.querySelector("h2, h3")?.textContent}/${fold.querySelector("summary").textContent}`;

async function look() {
  const connection = document.getElementById("connection");
  try {
    const state = await (await fetch("state")).text();
    if (state !== facts.state) {
      const answer = await fetch("./");
      if (!answer.ok) throw new Error(await answer.text());
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = new Set(folds().filter((fold) => fold.open).map(foldName));
      const top = scrollY;
      document.getElementById("content").replaceChildren(...page.getElementById("content").childNodes);
      document.querySelector("header").replaceChildren(...page.querySelector("header").childNodes);
      for (const fold of folds()) fold.open = open.has(foldName(fold));
      setUpCharts();
      setUpCopying();
      scrollTo(0, top);
      facts.state = state;
    } else {
      connection.textContent = "";
    }
  } catch (error) {
    connection.textContent = "The server does not answer: make watch may have ended.";
  }
  setTimeout(look, 1000 * facts.seconds);
}

setTimeout(look, 1000 * facts.seconds);
