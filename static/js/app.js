// The small behaviours every page shares: toasts, submit buttons, menus, local times, words for failed requests.
(function () {
  const TOAST_MS = 8000;
  const SUBMIT_GUARD_MS = 20000;

  // ---- toasts -------------------------------------------------------------------------------------------------
  function dismissLater(notice) {
    let timer;
    const start = () => {
      timer = setTimeout(() => notice.remove(), TOAST_MS);
    };
    const stop = () => clearTimeout(timer);
    notice.addEventListener("mouseenter", stop);
    notice.addEventListener("mouseleave", start);
    notice.addEventListener("focusin", stop);
    notice.addEventListener("focusout", start);
    start();
  }

  /** Shows `text` as a toast; tone is ok, info, warn or bad. Warnings and errors stay until they are closed. */
  function toast(text, tone = "info") {
    const region = document.getElementById("toasts");
    const template = document.getElementById("toast-template");
    if (!region || !template) return;
    const repeated = [...region.children].some((child) => child.querySelector("[data-text]")?.textContent === text);
    if (repeated) return;
    const notice = template.content.firstElementChild.cloneNode(true);
    notice.classList.add(`tone-${tone}`);
    notice.querySelector("[data-text]").textContent = text;
    notice.setAttribute("role", tone === "bad" ? "alert" : "status");
    region.append(notice);
    if (tone === "ok" || tone === "info") dismissLater(notice);
  }

  document.addEventListener("click", (event) => {
    const close = event.target.closest("[data-dismiss]");
    if (close) close.closest(".notice").remove();
  });

  // ---- forms: show that a submit is under way, and send it once -------------------------------------------------
  function setBusy(form, busy, submitter) {
    form.toggleAttribute("data-submitting", busy);
    const buttons = submitter ? [submitter] : form.querySelectorAll(".btn-loading");
    buttons.forEach((button) => {
      button.classList.toggle("btn-loading", busy);
      if (busy) button.setAttribute("aria-disabled", "true");
      else button.removeAttribute("aria-disabled");
    });
  }

  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.hasAttribute("data-submitting")) {
      event.preventDefault();
      return;
    }
    if (event.defaultPrevented || form.method !== "post" || form.hasAttribute("data-no-guard")) return;
    setBusy(form, true, event.submitter);
    setTimeout(() => setBusy(form, false, event.submitter), SUBMIT_GUARD_MS);
  });

  window.addEventListener("pageshow", (event) => {
    // A browser that kept the page all the same asks whether its reader is still signed in, before it shows anything.
    if (event.persisted && document.querySelector('[action="/accounts/logout/"]')) {
      document.documentElement.hidden = true;
      location.reload();
      return;
    }
    if (event.persisted) {
      document.querySelectorAll("form[data-submitting]").forEach((form) => {
        setBusy(form, false);
        document.querySelectorAll(`[form="${form.id}"].btn-loading`).forEach((b) => b.classList.remove("btn-loading"));
      });
    }
  });

  // What the editor keeps of unsaved texts goes with who typed it.
  document.addEventListener("submit", (event) => {
    if (event.target.matches('[action="/accounts/logout/"]')) sessionStorage.clear();
  });

  // ---- menus are <details>: close on Escape and on a click elsewhere --------------------------------------------
  document.addEventListener("click", (event) => {
    document.querySelectorAll("details.menu[open]").forEach((menu) => {
      if (!menu.contains(event.target)) menu.open = false;
    });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    document.querySelectorAll("details.menu[open]").forEach((menu) => {
      menu.open = false;
      menu.querySelector("summary").focus();
    });
  });

  // ---- times in the reader's own zone: the one of their settings, else the browser's, which the server is told ----
  const browserZone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (browserZone && !document.cookie.split("; ").includes(`time_zone=${browserZone}`)) {
    const secure = location.protocol === "https:" ? "; secure" : "";
    document.cookie = `time_zone=${browserZone}; path=/; max-age=31536000; samesite=lax${secure}`;
  }

  function timeFormat(options) {
    try {
      return new Intl.DateTimeFormat(undefined, { ...options, timeZone: document.documentElement.dataset.timeZone });
    } catch {
      return new Intl.DateTimeFormat(undefined, options); // a zone that this browser does not know
    }
  }

  const formats = {
    date: timeFormat({ dateStyle: "medium" }),
    datetime: timeFormat({ dateStyle: "medium", timeStyle: "short" }),
  };
  const fullFormat = timeFormat({ dateStyle: "full", timeStyle: "long" });

  function localTimes(scope) {
    const times = [...scope.querySelectorAll("time[datetime]")];
    if (scope.matches?.("time[datetime]")) times.push(scope);
    times.forEach((element) => {
      const at = new Date(element.dateTime);
      if (element.dataset.localized || Number.isNaN(at.getTime())) return;
      element.textContent = (formats[element.dataset.format] || formats.datetime).format(at);
      element.title = fullFormat.format(at);
      element.dataset.localized = "1";
    });
  }
  localTimes(document.documentElement);
  document.addEventListener("htmx:load", (event) => localTimes(event.detail.elt));

  // ---- htmx: clear words when a request fails -------------------------------------------------------------------
  function wordsFor(status) {
    if (status === 401 || status === 403) return "You may have been signed out. Reload the page and try again.";
    if (status === 404) return "This no longer exists. Reload the page to see what is there now.";
    if (status === 409) return "This was already sent with other details. Reload the page and try again.";
    if (status === 429) return "That was a lot in a short time. Wait a moment and try again.";
    if (status >= 500) return "Something went wrong on our side. Try again in a moment: nothing is charged twice.";
    return "This did not work. Reload the page and try again.";
  }

  const OFFLINE = "We could not reach the server. Check your connection and try again.";

  function requestFailed(event, words) {
    const element = event.detail.elt;
    // Regions that refresh by themselves fail quietly: they say so in place and try again.
    const quiet = element.closest("[data-quiet]");
    if (quiet) quiet.classList.add("is-stale");
    else toast(words, "bad");
  }

  document.addEventListener("htmx:responseError", (event) => requestFailed(event, wordsFor(event.detail.xhr.status)));
  document.addEventListener("htmx:sendError", (event) => requestFailed(event, OFFLINE));
  document.addEventListener("htmx:timeout", (event) => requestFailed(event, OFFLINE));
  // Who was signed out is led to the sign-in page, which has no place inside of another.
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (!new URL(event.detail.xhr.responseURL, location.href).pathname.startsWith("/accounts/login/")) return;
    event.detail.shouldSwap = false;
    requestFailed(event, wordsFor(401));
  });
  document.addEventListener("htmx:afterSwap", (event) => {
    event.detail.elt.closest?.("[data-quiet]")?.classList.remove("is-stale");
  });

  // ---- the drawer: a page's part beside the list that it was opened from --------------------------------------------
  document.addEventListener("htmx:afterSwap", (event) => {
    const { target, pathInfo } = event.detail;
    if (target?.id !== "drawer-body") return;
    const drawer = target.closest("dialog");
    drawer.querySelector("[data-drawer-link]").href = pathInfo.requestPath;
    drawer.showModal();
  });

  // ---- filters: what was chosen before htmx listened ----------------------------------------------------------------
  // `autocomplete="off"` keeps the browser from putting in what was chosen before Back, which is not this address's.
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll('form[hx-get][hx-push-url][autocomplete="off"]').forEach((form) => {
      const untouched = form.cloneNode(true);
      untouched.reset();
      const contents = (of) => new URLSearchParams(new FormData(of)).toString();
      if (contents(form) !== contents(untouched)) form.requestSubmit();
    });
  });

  // ---- the live balance ---------------------------------------------------------------------------------------------
  // Over HTTP/1.1 a browser has six connections to a server, for all its tabs: only the one that is seen keeps a stream.
  let stream = null;
  if (window.htmx) {
    window.htmx.createEventSource = (url) => {
      stream?.close();
      stream = new EventSource(url);
      if (document.hidden) stream.close();
      return stream;
    };
  }
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stream?.close();
    else if (stream?.readyState === EventSource.CLOSED) {
      window.htmx.trigger("#balance", "htmx:afterProcessNode"); // at which the extension opens one
    }
  });

  // The same balance again is no news: do not swap it, so that it neither flickers nor is read out twice.
  function isOldNews(html) {
    const region = document.getElementById("balance");
    const fresh = new DOMParser().parseFromString(html, "text/html").querySelector(".balance");
    const shown = region?.querySelector(".balance");
    const old = Boolean(fresh && shown) && fresh.outerHTML === shown.outerHTML;
    if (old) region.classList.remove("is-stale");
    return old;
  }

  document.addEventListener("htmx:beforeSwap", (event) => {
    const { target, xhr } = event.detail;
    if (target?.id === "balance" && xhr.status === 200 && isOldNews(xhr.responseText)) event.detail.shouldSwap = false;
  });
  document.addEventListener("htmx:sseBeforeMessage", (event) => {
    if (event.target.id === "balance" && isOldNews(event.detail.data)) event.preventDefault();
  });

  window.postmate = { toast, wordsFor, OFFLINE };
})();
