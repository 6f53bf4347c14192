// The editor of a piece: says what is unsaved and keeps it, hands the text and the selection to the operations beside
// it, and shows their outcome. Without this file the operations work on the saved text, and a passage is pasted.
(function () {
  const RUNNING_POLL_MS = 2000;
  const TYPING_PAUSE_MS = 600;

  const piece = document.getElementById("piece");
  const editor = document.getElementById("editor-form");
  const text = editor?.elements.namedItem("body");
  let isSent = false; // the form is being saved: leaving the page loses nothing
  let isBusy = false; // an operation of this page is running
  let isLocked = false; // and it revises the text
  let refreshes = 0;
  let pollTimer = null;

  // ---- what has not been saved ----------------------------------------------------------------------------------
  // `defaultValue` is the text as it is saved.
  const isUnsaved = () => "isUnsaved" in editor.dataset || text.value !== text.defaultValue;

  function showState() {
    const unsaved = isUnsaved();
    const words = isLocked ? "Being revised. You can type again in a moment." : unsaved ? "Unsaved changes" : "";
    const state = document.getElementById("editor-state");
    if (state.textContent !== words) state.textContent = words;
    if (!unsaved) putBackNote.hidden = true;
    if (!isLocked) keepUnsaved(unsaved);
    text.readOnly = isLocked;
    editor.querySelector(".btn-primary").disabled = isLocked; // saving would leave the page, and stop it
    document.querySelectorAll("form[data-needs-saved]").forEach((form) => {
      form.querySelector("[data-unsaved-note]").hidden = !unsaved;
      const submit = form.querySelector("[type=submit]");
      if (!submit.classList.contains("btn-loading")) submit.disabled = unsaved;
    });
  }

  function markSaved() {
    text.defaultValue = text.value;
    delete editor.dataset.isUnsaved;
  }

  // ---- what is unsaved outlives the page: whoever was signed out finds it again ---------------------------------
  // In this tab alone, until it is saved or somebody signs out (app.js). Nobody but its author opens the piece.
  const KEPT = `unsaved:${piece.dataset.url}`;
  const putBackNote = document.getElementById("put-back");

  function keepUnsaved(unsaved) {
    if (!unsaved) return sessionStorage.removeItem(KEPT);
    const base = editor.querySelector("input[name=base_number]").value;
    try {
      sessionStorage.setItem(KEPT, JSON.stringify({ text: text.value, saved: text.defaultValue, base }));
    } catch {
      // no room left: the browser still asks before the page is left
    }
  }

  function putBack() {
    const kept = JSON.parse(sessionStorage.getItem(KEPT));
    if (!kept || "isUnsaved" in editor.dataset || kept.text === text.value) return;
    if (text.value !== text.defaultValue) return; // typed into this page before its scripts were there
    if (kept.saved !== text.defaultValue) {
      // Changed elsewhere since: saving will say so.
      editor.dataset.isUnsaved = "";
      text.defaultValue = kept.text;
      setBase(kept.base);
    }
    text.value = kept.text;
    putBackNote.hidden = false;
  }

  function setBase(number) {
    document.querySelectorAll("input[name=base_number]").forEach((input) => {
      input.value = number;
    });
  }

  // ---- quotes: for the operation that is open, when the text or the passage changes ----------------------------
  function askForQuote() {
    document.querySelector(".choice[open] form")?.dispatchEvent(new Event("change"));
  }

  // ---- the passage ----------------------------------------------------------------------------------------------
  const selection = document.getElementById("selection-form");
  const useSelection = document.getElementById("use-selection");

  function takeSelection() {
    const selected = text.value.slice(text.selectionStart, text.selectionEnd);
    const passage = selected.trim(); // a double click takes the space behind a word along
    useSelection.hidden = !passage;
    if (!passage) return;
    const start = text.selectionStart + selected.indexOf(passage);
    selection.elements.namedItem("selection").value = passage;
    // The server counts characters, this language counts pairs of bytes.
    selection.elements.namedItem("start").value = Array.from(text.value.slice(0, start)).length;
    const words = passage.split(/\s+/).length;
    useSelection.querySelector("[data-words]").textContent =
      words === 1 ? "Refine the selected word" : `Refine the ${words} selected words`;
    if (selection.parentElement.open) askForQuote();
  }

  function forgetSelection() {
    useSelection.hidden = true;
    selection.elements.namedItem("selection").value = "";
    selection.elements.namedItem("start").value = "";
  }

  // ---- after an operation ---------------------------------------------------------------------------------------
  /** Shows what is saved now, around what is being typed. */
  async function refresh() {
    clearTimeout(pollTimer);
    const turn = ++refreshes;
    const response = await fetch(piece.dataset.url, { credentials: "same-origin" }).catch(() => null);
    if (!response || response.status >= 500) return pollLater(); // it will be seen the next time
    if (!response.ok || response.redirected) return; // deleted, or signed out: what is done next will say so
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    if (turn !== refreshes) return; // a newer one is under way
    const fresh = page.getElementById("piece");
    if (!editor) {
      // A page without a text has no editor yet.
      if ("hasText" in fresh.dataset || !("isRunning" in fresh.dataset)) return window.location.reload();
      return pollLater();
    }
    ["piece-facts", "versions", "derived", "costs"].forEach((id) => {
      const part = page.getElementById(id);
      document.getElementById(id).replaceWith(part);
      document.dispatchEvent(new CustomEvent("htmx:load", { detail: { elt: part } }));
    });
    document.getElementById("continuation").hidden = page.getElementById("continuation").hidden;
    if (!isLocked) showSaved(page.getElementById("editor-form"));
    if ("isRunning" in fresh.dataset && !isBusy) pollLater();
  }

  function showSaved(fresh) {
    const saved = fresh.elements.namedItem("body").value;
    if (!isUnsaved()) {
      if (text.value !== saved) forgetSelection();
      text.value = saved;
      markSaved();
    } else if (saved !== text.defaultValue) {
      return; // changed elsewhere under what is being typed: saving will say so
    }
    const number = fresh.elements.namedItem("base_number").value;
    setBase(number);
    showState();
    askForQuote();
  }

  function pollLater() {
    clearTimeout(pollTimer);
    pollTimer = setTimeout(refresh, RUNNING_POLL_MS);
  }

  if ("isRunning" in piece.dataset) pollLater();
  if (!editor) return;

  // The operations get the text as it stands, for their quotes too.
  document.addEventListener("formdata", (event) => {
    if (event.target !== editor && event.formData.has("body")) event.formData.set("body", text.value);
  });

  document.addEventListener("operation:sent", (event) => {
    isBusy = true;
    isLocked = "revises" in event.target.dataset;
    showState();
  });
  document.addEventListener("operation:started", () => {
    if (isLocked) sessionStorage.removeItem(KEPT); // it is a version now
    refresh();
  });
  document.addEventListener("operation:ended", (event) => {
    // Where it was started, what had been typed was saved as a version before.
    if (isLocked && event.detail.started) markSaved();
    isBusy = isLocked = false;
    showState();
    if (event.detail.started) refresh();
  });

  let typingTimer = null;
  text.addEventListener("input", () => {
    showState();
    clearTimeout(typingTimer);
    typingTimer = setTimeout(askForQuote, TYPING_PAUSE_MS);
  });
  text.addEventListener("select", takeSelection);
  text.addEventListener("click", takeSelection); // which ends a selection
  selection.elements.namedItem("selection").addEventListener("input", () => {
    selection.elements.namedItem("start").value = "";
  });
  useSelection.addEventListener("click", () => {
    selection.parentElement.open = true;
    selection.elements.namedItem("instruction").focus();
  });

  document.querySelectorAll(".choice").forEach((choice) => {
    choice.addEventListener("toggle", () => choice.open && askForQuote());
  });

  editor.addEventListener("submit", () => {
    isSent = true;
  });
  putBackNote.querySelector("button").addEventListener("click", () => {
    isSent = true;
    sessionStorage.removeItem(KEPT);
    window.location.reload();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "s" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (isUnsaved() && !isLocked) editor.requestSubmit();
  });
  window.addEventListener("beforeunload", (event) => {
    if (isUnsaved() && !isSent) event.preventDefault();
  });
  window.addEventListener("pageshow", () => {
    isSent = false;
    showState();
  });

  putBack();
  showState(); // what was saved is kept no longer, however soon the page is left

  function openChoiceOfAddress() {
    const choice = document.querySelector(".choice:target");
    if (choice && !choice.hidden) choice.open = true;
  }
  window.addEventListener("hashchange", openChoiceOfAddress);
  // Once htmx listens, which begins with the same event.
  document.addEventListener("DOMContentLoaded", () => {
    openChoiceOfAddress();
    askForQuote();
  });
})();
