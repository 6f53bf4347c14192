// A chat: the question appears at once, the answer streams in below it, and when it has ended the server's own turn
// (with what it cost) takes its place. The operation itself is operation.js's work. Without this file each question is
// an ordinary POST.
(function () {
  const form = document.getElementById("composer");
  const panel = document.getElementById("chat-panel");
  if (!form || !panel || !window.ReadableStream) return;

  const asked = panel.querySelector("[data-chat-question]");
  const said = document.getElementById("chat-said");
  const end = document.getElementById("chat-end");
  const { question, chat_id: chatId } = form.elements;
  const NEAR_PX = 160;

  let isSending = false;
  let isFollowing = true; // the reader is at the end, and wants to stay there
  let turnUrl = "";

  // ---- staying at the end of what is being written ---------------------------------------------------------------
  const showEnd = () => end.scrollIntoView({ block: "end" });

  window.addEventListener(
    "scroll",
    () => (isFollowing = end.getBoundingClientRect().bottom - window.innerHeight < NEAR_PX),
    { passive: true },
  );

  // ---- asking ----------------------------------------------------------------------------------------------------
  question.addEventListener("keydown", (event) => {
    // On a phone Enter is the only way to a new line.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
    event.preventDefault();
    if (!isSending) form.requestSubmit();
  });

  form.addEventListener("submit", () => {
    if (isSending) return;
    isSending = true;
    isFollowing = true;
    turnUrl = "";
    said.textContent = "";
    asked.textContent = question.value.trim();
    panel.hidden = false;
    document.getElementById("chat-empty")?.remove();
    showEnd();
  });

  document.addEventListener(
    "submit",
    (event) => {
      if (!event.target.matches("[data-go-on]")) return;
      event.preventDefault();
      if (isSending) return;
      const typed = question.value;
      question.value = event.target.elements.question.value;
      form.requestSubmit(); // reads it at once
      question.value = typed;
    },
    true,
  );

  function begin({ detail }) {
    if (turnUrl || !detail.result_url) return; // shown already, or the chat was deleted
    turnUrl = detail.result_url;
    if (question.value.trim() === asked.textContent) question.value = "";
    document.getElementById("chat-next").replaceChildren();
    if (!chatId.value) {
      chatId.value = /\/chats\/(\d+)\//.exec(turnUrl)[1];
      document.getElementById("chat-project").hidden = true;
      history.replaceState(history.state, "", turnUrl);
    }
  }
  form.addEventListener("operation:started", begin);
  form.addEventListener("operation:done", begin); // without :started when it was started before

  form.addEventListener("operation:text", () => {
    if (isFollowing) showEnd();
  });

  form.addEventListener("operation:failed", () => {
    if (!question.value) question.value = asked.textContent;
  });

  form.addEventListener("operation:ended", async ({ detail }) => {
    isSending = false;
    said.textContent = ["done", "stopped"].includes(detail.outcome) ? panel.querySelector("[data-operation-status]").textContent : "";
    if (turnUrl) await showTurn(turnUrl);
    else panel.hidden = true;
    if (isFollowing) showEnd();
    if (detail.outcome !== "stopped") question.focus({ preventScroll: true });
  });

  // ---- the server's turn -----------------------------------------------------------------------------------------
  async function showTurn(url) {
    let page;
    try {
      const response = await fetch(url, { credentials: "same-origin" });
      if (!response.ok || response.redirected) return; // what was streamed stays on the page
      page = new DOMParser().parseFromString(await response.text(), "text/html");
    } catch {
      return;
    }
    const turn = page.getElementById(new URL(url, location.href).hash.slice(1));
    if (!turn) return;
    document.getElementById("turns").append(document.adoptNode(turn));
    process(turn);
    if (!isSending) panel.hidden = true;
    ["chat-title", "chat-total", "chat-actions", "chat-next", "chat-list"].forEach((id) => {
      const [old, fresh] = [document.getElementById(id), page.getElementById(id)];
      if (id === "chat-list") fresh.open = old.open;
      if (isSending && id === "chat-next") return;
      old.replaceWith(document.adoptNode(fresh));
      process(fresh);
    });
    document.title = page.title;
  }

  function process(element) {
    window.htmx?.process(element);
    document.dispatchEvent(new CustomEvent("htmx:load", { detail: { elt: element } }));
  }

  if (chatId.value && !location.hash) showEnd();
})();
