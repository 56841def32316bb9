// Formulas by KaTeX, which lies beside this file; pictures open large.
document$.subscribe(() => {
  renderMathInElement(document.body, {
    delimiters: [
      { left: "\\[", right: "\\]", display: true },
      { left: "\\(", right: "\\)", display: false },
    ],
    throwOnError: false,
  });
  // No line begins with the comma after a formula: it goes with the formula's last part, which is not broken.
  document.querySelectorAll("span.arithmatex").forEach((formula) => {
    const after = formula.nextSibling, last = [...formula.querySelectorAll(".katex-html > .base")].pop();
    const mark = last && after && after.nodeType === Node.TEXT_NODE && after.data.match(/^[,.;:)]+/);
    if (!mark) return;
    after.data = after.data.slice(mark[0].length);
    last.append(mark[0]);
  });
  document.querySelectorAll("article img").forEach((picture) => {
    picture.title = "open large";
    picture.addEventListener("click", () => {
      const large = document.createElement("dialog");
      large.className = "large-picture";
      const copy = picture.cloneNode();
      copy.removeAttribute("width");
      large.append(copy);
      large.addEventListener("click", () => large.close());
      large.addEventListener("close", () => large.remove());
      document.body.append(large);
      large.showModal();
    });
  });
});
