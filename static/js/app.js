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
    if (status === 401 || status === 403) return "You may not do this, or this page was out of date. Try once more.";
    if (status === 404) return "This no longer exists. Reload the page to see what is there now.";
    if (status === 409) return "This was already sent with other details. Reload the page and try again.";
    if (status === 429) return "That was a lot in a short time. Wait a moment and try again.";
    if (status >= 500) return "Something went wrong on our side. Try again in a moment: nothing is charged twice.";
    return "This did not work. Reload the page and try again.";
  }

  const OFFLINE = "We could not reach the server. Check your connection and try again.";

  // Regions that refresh by themselves fail quietly: they say so in place and try again.
  function failedQuietly(event) {
    const quiet = event.detail.elt.closest("[data-quiet]");
    quiet?.classList.add("is-stale");
    return Boolean(quiet);
  }

  function requestFailed(event, words) {
    if (!failedQuietly(event)) toast(words, "bad");
  }

  document.addEventListener("htmx:responseError", async (event) => {
    const { status } = event.detail.xhr;
    if (failedQuietly(event)) return;
    if ((status === 401 || status === 403) && (await whoIsSignedIn()) === NOBODY) signedOut();
    else toast(wordsFor(status), "bad");
  });
  document.addEventListener("htmx:sendError", (event) => requestFailed(event, OFFLINE));
  document.addEventListener("htmx:timeout", (event) => requestFailed(event, OFFLINE));
  // Who was signed out is led to the sign-in page, which has no place inside of another.
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (!new URL(event.detail.xhr.responseURL, location.href).pathname.startsWith("/accounts/login/")) return;
    event.detail.shouldSwap = false;
    if (!failedQuietly(event)) signedOut();
  });
  document.addEventListener("htmx:afterSwap", (event) => {
    event.detail.elt.closest?.("[data-quiet]")?.classList.remove("is-stale");
  });

  // ---- signed out while a page is open: what was typed stays, and goes on after a sign-in in another tab -------------
  const [SAME, OTHER, NOBODY, UNKNOWN] = ["same", "other", "nobody", "unknown"];
  const reader = document.body.dataset.reader;
  let signIn = document.body.dataset.signIn; // which one this page belongs to: forms of another are refused
  const SIGN_IN_TAB = "sign-in"; // it is closed again as soon as somebody has signed in there
  let signInTab = null;

  /** Whether this page's reader is signed in still. If so, its forms get the token that a sign-in has renewed. */
  async function whoIsSignedIn() {
    const response = await fetch("/tokens/balance/", { credentials: "same-origin" }).catch(() => null);
    if (response?.status === 401) return NOBODY;
    if (!response?.ok) return UNKNOWN;
    if (response.headers.get("X-Reader") !== reader) return OTHER;
    const token = response.headers.get("X-CSRFToken");
    document.querySelectorAll("input[name=csrfmiddlewaretoken]").forEach((input) => {
      if (token) input.value = token;
    });
    return SAME;
  }

  function sayOnce(words) {
    document.getElementById("signed-out")?.remove();
    toast(words, "bad");
    const notice = document.getElementById("toasts").lastElementChild;
    notice.id = "signed-out";
    return notice;
  }

  /** The one thing to say to somebody who was signed out, until they are back. */
  function signedOut() {
    if (document.getElementById("signed-out")) return;
    const notice = sayOnce("You have been signed out. What you typed is still here.");
    const link = document.createElement("a");
    link.href = "/accounts/login/?next=/studio/";
    link.target = "_blank";
    link.className = "btn btn-sm mt-2";
    link.textContent = "Sign in";
    link.setAttribute("aria-label", "Sign in, in another tab");
    link.addEventListener("click", (event) => {
      signInTab = window.open(link.href, SIGN_IN_TAB);
      if (signInTab) event.preventDefault();
    });
    notice.querySelector("[data-text]").append(document.createElement("br"), link);
  }

  async function comeBack(newSignIn = signIn) {
    if (newSignIn === signIn && !document.getElementById("signed-out")) return;
    const who = await whoIsSignedIn();
    if (who === SAME) signIn = newSignIn;
    if (who === OTHER) sayOnce("Somebody else has signed in here. Copy what you need of this page, then reload it.");
    const notice = document.getElementById("signed-out");
    if (who !== SAME || !notice) return;
    notice.remove();
    signInTab?.close();
    toast("You are signed in again. Go on where you were.", "ok");
    if (stream?.readyState === EventSource.CLOSED) window.htmx.trigger("#balance", "htmx:afterProcessNode");
    document.querySelectorAll("[data-quote]").forEach((region) => window.htmx.trigger(region, "balance:changed"));
  }

  if (window.BroadcastChannel) {
    const tabs = new BroadcastChannel("signed-in");
    tabs.addEventListener("message", (event) => reader && comeBack(event.data));
    if (reader) tabs.postMessage(signIn);
  }
  document.addEventListener("visibilitychange", () => !document.hidden && comeBack());

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
      if (document.hidden || window.name === SIGN_IN_TAB) stream.close();
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
    if (old) {
      region.classList.remove("is-stale");
      followBalance(false);
    }
    return old;
  }

  // What else of the page shows the balance is brought up to date with it. Such a region says by a mark what it was
  // made from; a quote has none, and while something runs here it waits for its end.
  function followBalance(isNews) {
    const { mark } = document.querySelector("#balance .balance")?.dataset ?? {};
    const isRunning = document.querySelector("form[data-running]");
    document.querySelectorAll("[data-follows-balance]").forEach((region) => {
      const shown = region.dataset.followsBalance;
      if (shown ? shown !== mark : isNews && !isRunning) window.htmx.trigger(region, "balance:changed");
    });
  }
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.target.closest?.("#balance")) followBalance(true);
  });

  document.addEventListener("htmx:beforeSwap", (event) => {
    const { target, xhr } = event.detail;
    if (target?.id === "balance" && xhr.status === 200 && isOldNews(xhr.responseText)) event.detail.shouldSwap = false;
  });
  document.addEventListener("htmx:sseBeforeMessage", (event) => {
    if (event.target.id === "balance" && isOldNews(event.detail.data)) event.preventDefault();
  });

  window.postmate = { toast, wordsFor, OFFLINE, signedOut, whoIsSignedIn, SAME, NOBODY };
})();
