// Typeset what arithmatex has marked, on every page that the theme shows.
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex:not([data-typeset])")) {
    const text = element.textContent.trim();
    const displayMode = text.startsWith("\\[");
    element.dataset.typeset = "";
    katex.render(text.slice(2, -2), element, { displayMode, throwOnError: false });
  }
});
