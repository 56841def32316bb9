// Formulas by KaTeX, which lies beside this file; pictures open large.
document$.subscribe(() => {
  renderMathInElement(document.body, {
    delimiters: [
      { left: "\\[", right: "\\]", display: true },
      { left: "\\(", right: "\\)", display: false },
    ],
    throwOnError: false,
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
