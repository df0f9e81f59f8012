() => {
  document.documentElement.lang = "en";
  const give = (id, attributes) => {
    const part = document.getElementById(id);
    for (const [name, value] of Object.entries(attributes)) part?.setAttribute(name, value);
  };
  give("say", { role: "status", "aria-live": "polite", "aria-atomic": "true" });
}
