// The faults of an open page. Everything is measured in it: boxes in pixels of the screen, colours as they are shown.
() => {
  const faults = [];
  const name = (e) => `${e.tagName.toLowerCase()}${e.id ? "#" + e.id : ""}.${e.getAttribute("class") ?? ""} ${(e.textContent ?? "").trim().slice(0, 40)}`;
  const isShown = (e) => e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true }) && !e.closest(".unseen, .skip, [hidden]");
  const box = (e) => e.getBoundingClientRect();

  // 1. The page has the width of the screen, and each element that of its card. What scrolls may be wider.
  if (document.documentElement.scrollWidth > innerWidth) faults.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const card of document.querySelectorAll("section, header, figure.chart, figure.preview")) {
    const outer = box(card);
    for (const e of card.querySelectorAll("*")) {
      const scroller = e.closest(".scroll, .frame");
      if ((scroller && scroller !== e && card.contains(scroller)) || !isShown(e)) continue;
      if (e.closest("svg") && e.tagName.toLowerCase() !== "svg") continue; // drawn inside its svg, which is measured
      const b = box(e);
      if (b.width && (b.left < outer.left - 1 || b.right > outer.right + 1 || b.bottom > outer.bottom + 1)) faults.push(`outside its card: ${name(e)}`);
    }
  }
  // 2. Ticks: whole, inside their chart, and not on one another.
  for (const chart of document.querySelectorAll('[data-chart="lines"]')) {
    if (!isShown(chart)) continue;
    const outer = box(chart);
    for (const ticks of [".y-ticks", ".x-ticks"]) {
      const boxes = [...chart.querySelectorAll(`${ticks} .tick`)].map((e) => [box(e), e]);
      for (const [b, e] of boxes) {
        if (b.left < outer.left || b.right > outer.right || b.top < outer.top || b.bottom > outer.bottom) faults.push(`clipped tick: ${name(e)}`);
        if (e.scrollWidth > e.clientWidth + 1) faults.push(`cut tick: ${name(e)}`);
      }
      for (const [k, [a, e]] of boxes.entries()) {
        for (const [b, other] of boxes.slice(k + 1)) {
          if (a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom) faults.push(`ticks overlap: ${name(e)}, ${name(other)}`);
        }
      }
    }
    const plot = box(chart.querySelector(".plot"));
    if (plot.width < 120 || plot.height < 100) faults.push(`a plot of ${plot.width} x ${plot.height}`);
  }
  // Plotly's ticks, of the sweep's page.
  for (const text of document.querySelectorAll(".xtick text, .ytick text")) {
    const [b, outer] = [box(text), box(text.closest("svg"))];
    if (b.width && (b.left < outer.left - 1 || b.right > outer.right + 1 || b.bottom > outer.bottom + 1)) faults.push(`clipped tick: ${name(text)}`);
  }
  // 3. Text: contrast AA, and at least 11 pixels.
  const colour = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const [r, g, b, a = 1] = colour(getComputedStyle(e).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !isShown(e) || e.closest("svg, script, style, .frame, [disabled], .js-plotly-plot")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(colour(style.color)), light(ground(e))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(2)}: ${name(e)}`);
    if (parseFloat(style.fontSize) < 11) faults.push(`text of ${style.fontSize}: ${name(e)}`);
  }
  // 4. Names for those who do not see: images, drawings, fields.
  for (const e of document.querySelectorAll("img")) if (!e.alt) faults.push(`an image without alt: ${e.src.slice(0, 60)}`);
  for (const e of document.querySelectorAll("svg")) {
    if (!e.closest(".js-plotly-plot, .modebar, #js-plotly-tester") && !e.getAttribute("aria-label") && e.getAttribute("aria-hidden") !== "true") faults.push(`a drawing without words: ${name(e.parentElement)}`);
  }
  for (const e of document.querySelectorAll("input, select")) if (!e.labels?.length && !e.getAttribute("aria-label")) faults.push(`a field without a label: ${name(e)}`);
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) faults.push(`two elements with the id ${id}`);
  for (const a of document.querySelectorAll('a[href^="#"]')) if (!document.getElementById(a.getAttribute("href").slice(1))) faults.push(`a link to nothing: ${a.getAttribute("href")}`);
  return faults;
}
