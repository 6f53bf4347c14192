// The images page: places for the images that are being made, and an image prompt that goes into the form at once.
// The operations themselves are operation.js's work; without scripts forms and links do the same.
(function () {
  const form = document.getElementById("images-form");
  const promptForm = document.getElementById("image-prompt-form");
  const awaited = document.getElementById("images-awaited");
  if (!form || !promptForm || !awaited) return;

  form.addEventListener("submit", () => awaited.replaceChildren());

  form.addEventListener("operation:started", () => {
    const places = Array.from({ length: Number(form.elements.count.value) }, () => {
      const item = document.createElement("li");
      const place = document.createElement("div");
      place.className = "image-awaited";
      place.dataset.size = form.elements.size.value;
      item.append(place);
      return item;
    });
    awaited.replaceChildren(...places);
    document.getElementById("images-panel").scrollIntoView({ block: "nearest" });
  });

  form.addEventListener("operation:ended", () => awaited.replaceChildren());

  document.getElementById("image-prompt-panel").addEventListener("click", (event) => {
    if (!event.target.closest('a[href*="?prompt="]')) return;
    event.preventDefault();
    const panel = event.currentTarget;
    form.elements.prompt.value = panel.querySelector("[data-operation-text]").textContent.trim();
    form.elements.style.value = promptForm.elements.style.value;
    form.elements.project.value = promptForm.elements.project.value;
    form.dispatchEvent(new Event("change"));
    form.elements.prompt.focus();
    form.scrollIntoView({ block: "start" });
  });
})();
