// The forms that pay for an AI operation: each is posted by script, its answer read as a stream of server-sent events
// and shown as it comes. Without this file such a form is an ordinary POST.
//
// A form:  <form data-operation="draft" data-panel="#panel" method="post" …> with an `idempotency_key` and a
//          [data-operation-alert] that holds a [data-text]. `data-doing` is the status while it runs ("Writing"),
//          `data-follow` goes to the result once it is there.
// A panel: [data-operation-status], [data-operation-text], [data-operation-result], [data-operation-stop], and perhaps
//          a [data-operation-title], which shows what the form's `title` says. Hidden until something comes.
// Events:  operation:sent, then :started, :text, :done, :failed with the stream's data, and after everything :ended with
//          { outcome: "done" | "failed" | "stopped" | "broken" | "refused", started }, where `started` says that the
//          operation began, now or when the form was sent before. They bubble from the form.
(function () {
  if (!window.ReadableStream) return;

  const KEPT_ANYWAY = {
    balance: "Your balance ran out. What was written is kept.",
    length: "The text reached its limit. What was written is kept.",
    provider: "The provider broke off. What was written is kept.",
    reader: "It was stopped. What was written is kept.",
  };

  const OUTCOME_URL = "/studio/outcome/";
  // How long to wait for the end of what was stopped, and for the beginning of what may never have reached the server.
  const OUTCOME_WAITS_MS = [150, 250, 500, 1000, 2000, 3000, 4000];
  const BEGINNING_WAITS = 4;

  // What runs: panel (or form, when it has none) → { form, controller }.
  const running = new Map();

  const panelOf = (form) => (form.dataset.panel ? document.querySelector(form.dataset.panel) : null);
  const inPanel = (form, part) => panelOf(form)?.querySelector(`[data-operation-${part}]`);
  const costOf = ({ billable_tokens: count }) => `It cost ${count ? tokens(count) : "nothing"}.`;
  const tokens = (count) => `${Number(count).toLocaleString("en-US")} tokens`;

  function tell(form, name, detail) {
    form.dispatchEvent(new CustomEvent(`operation:${name}`, { bubbles: true, detail }));
  }

  function say(form, words) {
    const status = inPanel(form, "status");
    if (status) status.textContent = words;
  }

  // ---- errors ---------------------------------------------------------------------------------------------------
  function showAlert(form, words) {
    const alertBox = form.querySelector("[data-operation-alert]");
    alertBox.querySelector("[data-text]").textContent = words;
    alertBox.hidden = false;
    alertBox.scrollIntoView({ block: "nearest" });
  }

  function clearErrors(form) {
    form.querySelector("[data-operation-alert]").hidden = true;
    form.querySelectorAll(".field-error").forEach((element) => element.remove());
    form.querySelectorAll("[aria-invalid]").forEach((control) => {
      control.removeAttribute("aria-invalid");
      const describedBy = (control.getAttribute("aria-describedby") || "")
        .split(" ")
        .filter((id) => id && !id.endsWith("_error"));
      if (describedBy.length) control.setAttribute("aria-describedby", describedBy.join(" "));
      else control.removeAttribute("aria-describedby");
    });
  }

  /** Shows errors at their fields and returns those that have none on the page. */
  function showFieldErrors(form, fields) {
    const strays = [];
    let first = null;
    Object.entries(fields || {}).forEach(([name, errors]) => {
      const named = form.elements.namedItem(name);
      const control = named instanceof RadioNodeList ? named[0] : named;
      const field = control?.closest(".field");
      if (!field) {
        strays.push(...errors);
        return;
      }
      const error = document.createElement("div");
      error.className = "field-error";
      error.id = `${control.id}_error`;
      error.textContent = errors.join(" ");
      field.append(error);
      control.setAttribute("aria-invalid", "true");
      control.setAttribute("aria-describedby", `${control.getAttribute("aria-describedby") || ""} ${error.id}`.trim());
      first ??= control;
    });
    first?.focus();
    return strays;
  }

  // ---- the key that makes a retry safe --------------------------------------------------------------------------
  // Kept when the connection broke before an answer came, so that sending again cannot start a second operation: what
  // comes back then is the outcome of the first, as :text and :done or :failed without :started.
  function renewKey(form) {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const key = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    form.elements.namedItem("idempotency_key").value = key;
  }

  // The page that Back brings may have the key that it was sent with before, whose operation is done.
  window.addEventListener("pageshow", (event) => {
    if (!event.persisted && !running.size) document.querySelectorAll("form[data-operation]").forEach(renewKey);
  });

  // ---- server-sent events out of a fetch body -------------------------------------------------------------------
  async function* readEvents(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer = (buffer + value).replace(/\r\n/g, "\n");
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const block = buffer.slice(0, end);
        buffer = buffer.slice(end + 2);
        let name = "message";
        const data = [];
        block.split("\n").forEach((line) => {
          if (line.startsWith("event:")) name = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        });
        if (data.length) yield { name, data: JSON.parse(data.join("\n")) };
      }
    }
  }

  // ---- the panel ------------------------------------------------------------------------------------------------
  function setRunning(form, isRunning) {
    const submit = form.querySelector("[type=submit]");
    submit.classList.toggle("btn-loading", isRunning);
    submit.disabled = isRunning;
    form.toggleAttribute("data-running", isRunning);
    const stop = inPanel(form, "stop");
    if (stop) stop.hidden = !isRunning;
    const text = inPanel(form, "text");
    text?.classList.toggle("is-writing", isRunning);
    text?.setAttribute("aria-busy", String(isRunning));
  }

  function openPanel(form) {
    const panel = panelOf(form);
    if (!panel) return;
    const title = inPanel(form, "title");
    if (title) title.textContent = form.elements.namedItem("title")?.value.trim() || title.textContent;
    panel.hidden = false;
    panel.scrollIntoView({ block: "nearest" });
  }

  function emptyPanel(form) {
    inPanel(form, "text")?.replaceChildren();
    inPanel(form, "result")?.replaceChildren();
  }

  function addText(form, words) {
    const text = inPanel(form, "text");
    if (!text) return;
    const isAtItsEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 32;
    text.append(words);
    if (isAtItsEnd) text.scrollTop = text.scrollHeight;
  }

  function showResult(form, html) {
    const result = inPanel(form, "result");
    if (!result || !html) return;
    result.innerHTML = html; // our own template, rendered by the server; the model's text never comes this way
    window.htmx?.process(result);
    document.dispatchEvent(new CustomEvent("htmx:load", { detail: { elt: result } }));
  }

  /** How the operation of this key ended, `state` "unknown" when it never began; null when nobody says. */
  async function outcomeOf(key) {
    let unknown = 0;
    for (const wait of OUTCOME_WAITS_MS) {
      await new Promise((resolve) => setTimeout(resolve, wait));
      const url = `${OUTCOME_URL}?${new URLSearchParams({ idempotency_key: key })}`;
      const response = await fetch(url, { credentials: "same-origin" }).catch(() => null);
      if (response?.redirected) return null;
      const answer = response?.ok ? await response.json().catch(() => null) : null;
      if (answer?.state === "ended") return answer;
      if (answer?.state === "unknown" && ++unknown === BEGINNING_WAITS) return answer;
    }
    return null;
  }

  function wasStopped(form, outcome) {
    if (outcome?.state === "ended") {
      if (panelOf(form)?.hidden) openPanel(form);
      showResult(form, outcome.html);
      say(form, `Stopped. ${costOf(outcome)}`);
    } else if (outcome) {
      say(form, "Stopped before it began.");
    } else {
      say(form, "Stopped. You pay for what was read and written until then; your history says how much.");
    }
  }

  function brokeOff(form, started, outcome) {
    if (outcome?.state === "ended") {
      const words = `The connection ended early. What was written is kept. ${costOf(outcome)}`;
      showResult(form, outcome.html);
      say(form, words);
      showAlert(form, words);
    } else if (started) {
      say(form, "The connection ended early.");
      showAlert(form, "The connection ended early. What was written is kept; you pay for what was read and written.");
    } else {
      say(form, "The connection failed.");
      showAlert(form, `${window.postmate.OFFLINE} Everything you typed is still here.`);
    }
  }

  // ---- one operation --------------------------------------------------------------------------------------------
  async function refused(form, response) {
    let answer = {};
    try {
      answer = await response.json();
    } catch {
      // not JSON: the status alone has to do
    }
    const strays = showFieldErrors(form, answer.fields);
    showAlert(form, [answer.message || window.postmate.wordsFor(response.status), ...strays].join(" "));
    // After a failure of the server it is not known whether the operation was begun.
    if (response.status < 500) renewKey(form);
  }

  const onEvent = {
    started(form, data) {
      renewKey(form);
      const held = data.held_tokens ? `${tokens(data.held_tokens)} are reserved for it.` : "It is free.";
      say(form, `${form.dataset.doing || "Writing"}. ${held}`);
    },
    text(form, data) {
      addText(form, data.text);
    },
    done(form, data) {
      renewKey(form);
      say(form, `${KEPT_ANYWAY[data.stopped_by] || "Done."} ${costOf(data)}`);
      showResult(form, data.html);
    },
    failed(form, data) {
      if (data.html) renewKey(form); // without a result it is still under way
      say(form, "It failed.");
      showResult(form, data.html);
      showAlert(form, data.message);
    },
  };

  /** Runs the operation and returns how it ended. */
  async function run(form, controller, isSecondTry = false) {
    const response = await fetch(form.action, {
      method: "POST",
      body: new FormData(form),
      headers: { Accept: "text/event-stream" },
      credentials: "same-origin",
      signal: controller.signal,
    });
    if (response.redirected) {
      // To the sign-in page; going there would lose what was typed.
      window.postmate.signedOut();
      return { outcome: "refused" };
    }
    if (response.status === 403 && !isSecondTry) {
      // Before anything was begun: the form's token is of another sign-in than the browser's.
      const who = await window.postmate.whoIsSignedIn();
      if (who === window.postmate.SAME) return run(form, controller, true);
      if (who === window.postmate.NOBODY) {
        window.postmate.signedOut();
        return { outcome: "refused" };
      }
    }
    if (!response.ok || !(response.headers.get("Content-Type") || "").startsWith("text/event-stream")) {
      await refused(form, response);
      return { outcome: "refused" };
    }
    openPanel(form);
    let outcome = "broken";
    let resultUrl = "";
    for await (const { name, data } of readEvents(response.body)) {
      onEvent[name]?.(form, data);
      tell(form, name, data);
      if (name === "done" || name === "failed") outcome = name;
      resultUrl = data.result_url || resultUrl;
    }
    return { outcome, resultUrl };
  }

  async function submit(form) {
    const place = panelOf(form) || form;
    if (running.has(place)) {
      if (running.get(place).form !== form) {
        showAlert(form, "Another operation is still running here. Stop it, or wait until it has ended.");
      }
      return;
    }
    const controller = new AbortController();
    const key = form.elements.namedItem("idempotency_key").value;
    let started = false;
    let end = { outcome: "broken" };
    const notice = () => (started = true);
    form.addEventListener("operation:started", notice);
    form.addEventListener("operation:done", notice); // without :started when it was started before
    running.set(place, { form, controller });
    clearErrors(form);
    emptyPanel(form);
    setRunning(form, true);
    say(form, "Sending.");
    tell(form, "sent", {});
    try {
      end = await run(form, controller);
    } catch (error) {
      if (error.name === "AbortError") {
        end = { outcome: "stopped" };
        renewKey(form); // whoever stops and sends again wants another one
      }
    }
    form.removeEventListener("operation:started", notice);
    form.removeEventListener("operation:done", notice);
    if (end.outcome === "stopped" || (end.outcome === "broken" && started)) {
      const stop = inPanel(form, "stop");
      if (stop) stop.hidden = true;
      inPanel(form, "text")?.classList.remove("is-writing");
      say(form, end.outcome === "stopped" ? "Stopping." : "The connection ended early.");
      end.learnt = await outcomeOf(key);
      started ||= end.learnt?.state === "ended";
    }
    if (end.outcome === "stopped") wasStopped(form, end.learnt);
    if (end.outcome === "broken") brokeOff(form, started, end.learnt);
    running.delete(place);
    setRunning(form, false);
    const isPanelEmpty = !inPanel(form, "text")?.textContent && !inPanel(form, "result")?.hasChildNodes();
    if (panelOf(form) && isPanelEmpty) panelOf(form).hidden = true;
    form.dispatchEvent(new Event("change")); // the balance has changed, so has what the quote says about it
    tell(form, "ended", { outcome: end.outcome, started });
    if (end.outcome === "done" && end.resultUrl && "follow" in form.dataset) window.location.assign(end.resultUrl);
  }

  // Before all other listeners: to them the form is not being sent.
  document.addEventListener(
    "submit",
    (event) => {
      if (!event.target.matches("form[data-operation]")) return;
      event.preventDefault();
      submit(event.target);
    },
    true,
  );

  window.addEventListener("beforeunload", (event) => {
    const isWorking = [...running.values()].some(({ controller }) => !controller.signal.aborted);
    if (isWorking) event.preventDefault(); // to leave is to stop it
  });

  document.addEventListener("click", (event) => {
    const stop = event.target.closest("[data-operation-stop]");
    if (!stop) return;
    running.forEach(({ controller }, place) => {
      if (place.contains(stop)) controller.abort();
    });
  });
})();
