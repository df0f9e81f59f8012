() => {
  document.documentElement.lang = "en";
  const give = (id, attributes) => {
    const part = document.getElementById(id);
    for (const [name, value] of Object.entries(attributes)) part?.setAttribute(name, value);
  };
  give("say", { role: "status", "aria-live": "polite", "aria-atomic": "true" });
  // Gradio gives each choice a name of its own and the group none: arrow keys would not move between them. It does so
  // again whenever it draws a choice anew, so that names are watched, too; those that are there already draw no more.
  const join = () => {
    for (const [group, label] of [["faces", "Which face?"], ["model", "Which model?"]]) {
      give(group, { role: "radiogroup", "aria-label": label });
      for (const choice of document.querySelectorAll(`#${group} input`)) if (choice.name !== group) choice.name = group;
    }
  };
  new MutationObserver(join).observe(document.body, { childList: true, subtree: true, attributeFilter: ["name"] });
  join();
}
