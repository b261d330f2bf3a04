// How far audits are: of the one that the page shows, or of those in the list.

import { call } from "./api.js";
import { $, $$ } from "./dom.js";
import { attempt, say } from "./messages.js";
import { duration } from "./wording.js";

function showProgress(place, audit) {
  const state = $(".state", place);
  if (state) {
    state.className = `state ${audit.state}`;
    state.textContent = audit.state.replace("_", "-");
  }
  const bar = $("progress", place);
  if (bar) bar.value = audit.progress;
  const left = audit.eta_seconds === null ? "" : ` · ${duration(audit.eta_seconds)} left`;
  const texts = {
    "[data-detail]": `${Math.floor(100 * audit.progress)} %${left}`,
    "[data-stage]": audit.waiting ? `waiting: ${audit.waiting}` : audit.stage || "waiting for a worker",
    "[data-rate]": audit.samples_per_second ? Math.round(audit.samples_per_second) : "–",
    "[data-eta]": audit.eta_seconds === null ? "–" : duration(audit.eta_seconds),
  };
  for (const [selector, text] of Object.entries(texts)) {
    const element = $(selector, place);
    if (element) element.textContent = text;
  }
}

async function poll(place, seconds) {
  try {
    const audit = await call(`/v1/audits/${place.dataset.audit}`);
    showProgress(place, audit);
    if (audit.done) return location.reload();
  } catch (error) {
    if (error.status === 404) return say(error.message, { isBad: true });
  }
  setTimeout(() => poll(place, seconds), 1000 * seconds);
}

function follow(place) {
  const events = new EventSource(`/v1/audits/${place.dataset.audit}/events`);
  events.addEventListener("progress", (event) => showProgress(place, JSON.parse(event.data)));
  events.addEventListener("done", () => {
    events.close();
    location.reload();
  });
  events.addEventListener("error", () => {
    if (events.readyState === EventSource.CLOSED) poll(place, 2); // refused; a lost connection heals
  });
}

async function pollList(table) {
  for (const row of $$("tr[data-audit]", table).filter((each) => $("[data-live]", each))) {
    try {
      const audit = await call(`/v1/audits/${row.dataset.audit}`);
      showProgress(row, audit);
      if (audit.done && !$("dialog[open]")) return location.reload();
    } catch { /* the next look may succeed */ }
  }
  setTimeout(() => pollList(table), 3000);
}

export function startLive() {
  const audit = $("[data-live-audit]");
  if (audit) {
    follow(audit);
    $("[data-cancel]")?.addEventListener("click", () =>
      attempt(async () => {
        await call(`/v1/audits/${audit.dataset.audit}/cancel`, { method: "POST" });
        say("The audit will end within seconds.");
      }));
  }
  const list = $("[data-live-list]");
  if (list && $("[data-live]", list)) setTimeout(() => pollList(list), 2000);
}
