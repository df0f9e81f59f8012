() => {
  document.documentElement.lang = "en";
  const give = (id, attributes) => {
    const part = document.getElementById(id);
    for (const [name, value] of Object.entries(attributes)) part?.setAttribute(name, value);
  };
  give("say", { role: "status", "aria-live": "polite", "aria-atomic": "true" });
  // Gradio gives each choice a name of its own and the group none: arrow keys would not move between them.
  new MutationObserver(() => {
    give("faces", { role: "radiogroup", "aria-label": "Which face?" });
    for (const choice of document.querySelectorAll("#faces input")) choice.name = "faces";
  }).observe(document.body, { childList: true, subtree: true });
}
