"use strict";
// The pages' one script. What it changes, it changes through the API; what it shows, it reads from
// the server's own pages, so that there is one place that draws.

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const count = (number) => number.toLocaleString("en-US");
const samples = (number) => `${count(number)} ${number === 1 ? "sample" : "samples"}`;

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// --- calls -------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(message, { status = 0, problem = {} } = {}) {
    super(message);
    this.status = status;
    this.problem = problem;
  }
}

async function call(path, { method = "GET", json, body, headers = {} } = {}) {
  const options = { method, body, headers: { Accept: "application/json", ...headers } };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refusal("The server cannot be reached: the connection was lost. Nothing was stored.");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  let message = answer.detail || answer.title || `The server answered ${response.status}.`;
  if (response.status === 401) {
    message = "Your session is over. Sign in in another tab, then try again: nothing here is lost.";
  } else if (response.status === 404) {
    message += " It may have been deleted since this page was loaded.";
  }
  throw new Refusal(message, { status: response.status, problem: answer });
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// --- messages: what failed stays until it is tried again or let go -------------------------------

let numUnsent = 0;
addEventListener("beforeunload", (event) => {
  if (numUnsent) event.preventDefault();
});

function say(text, { isBad = false, actions = [], onClose = () => {} } = {}) {
  const message = make("div", { className: isBad ? "message bad" : "message" }, make("p", { textContent: text }));
  const close = () => {
    message.remove();
    onClose();
  };
  for (const [label, run] of actions) {
    const button = make("button", { type: "button", textContent: label });
    button.addEventListener("click", () => {
      close();
      run();
    });
    message.append(button);
  }
  message.append(make("button", { type: "button", className: "quiet", textContent: isBad ? "Dismiss" : "OK", onclick: close }));
  $("#messages").append(message);
  if (!isBad && !actions.length) setTimeout(() => message.remove(), 6000);
}

async function attempt(run) {
  try {
    return await run();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    numUnsent += 1;
    const actions = [["Try again", () => attempt(run)]];
    if (error.status === 401) {
      actions.unshift(["Sign in", () => { open("/sign-in"); attempt(run); }]);
    }
    say(error.message, { isBad: true, actions, onClose: () => { numUnsent -= 1; } });
    return undefined;
  }
}

// --- dialogs -----------------------------------------------------------------------------------

function openDialog(id) {
  const dialog = document.getElementById(id);
  if (dialog && !dialog.open) dialog.showModal();
  return dialog;
}

document.addEventListener("click", (event) => {
  const opener = event.target.closest("[data-open]");
  if (opener) openDialog(opener.dataset.open);
  if (event.target.closest("[data-close]")) event.target.closest("dialog").close();
  for (const menu of $$("details.menu[open]")) {
    if (!menu.contains(event.target)) menu.open = false;
  }
});
if (location.hash === "#new-audit") openDialog("new-audit");

// --- progress ----------------------------------------------------------------------------------

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

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
    "[data-stage]": audit.stage || "waiting for a worker",
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

function startLive() {
  const audit = $("[data-live-audit]");
  if (audit) {
    follow(audit);
    $("[data-cancel]").addEventListener("click", () =>
      attempt(async () => {
        await call(`/v1/audits/${audit.dataset.audit}/cancel`, { method: "POST" });
        say("The audit will end within seconds.");
      }));
  }
  const list = $("[data-live-list]");
  if (list && $("[data-live]", list)) setTimeout(() => pollList(list), 2000);
}

// --- a new audit -------------------------------------------------------------------------------

const FIELD_OF = [
  ["#/fine_tune/epochs", "epochs"], ["#/fine_tune", "fine_tune"], ["#/model", "model"], ["#/train", "train"],
  ["#/validation", "validation"], ["#/ranking", "ranking"], ["#/task", "task"],
];

function startNewAudit(form) {
  const uploaded = new Map(); // a file that arrived is not sent again when something else is wrong
  let key = newKey();
  const working = $("[data-working]", form);

  function fail(field, text) {
    const place = $(`[data-error-for="${field}"]`, form) || $('[data-error-for=""]', form);
    place.textContent = text;
    place.hidden = false;
    const input = field && form.elements[field];
    if (input) {
      input.setAttribute("aria-invalid", "true");
      if (!form.querySelector(":focus[aria-invalid]")) input.focus();
    }
  }

  function failBy(error, field) {
    const errors = error.problem.errors || [];
    if (field || !errors.length) return fail(field || "", error.message);
    for (const { pointer, detail } of errors) {
      const found = FIELD_OF.find(([start]) => pointer === start || pointer.startsWith(`${start}/`));
      fail(found ? found[1] : "", found ? detail : `${pointer}: ${detail}`);
    }
  }

  async function upload(field) {
    const file = form.elements[field].files[0];
    if (!file) return null;
    const name = [file.name, file.size, file.lastModified].join();
    if (!uploaded.has(name)) {
      working.textContent = `Sending ${file.name} …`;
      const body = new FormData();
      body.append("file", file);
      uploaded.set(name, (await call("/v1/datasets", { method: "POST", body })).reference);
    }
    return uploaded.get(name);
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    for (const place of $$("[data-error-for]", form)) place.hidden = true;
    for (const input of $$("[aria-invalid]", form)) input.removeAttribute("aria-invalid");
    const { model, task, fine_tune: fineTune, epochs, ranking } = form.elements;
    if (!form.elements.train.files.length) fail("train", "Choose the file of the training set.");
    if (!model.value.trim()) fail("model", "Name the model: hf://owner/name@revision, or file:///… on the server.");
    if ($("[aria-invalid]", form)) return;
    const button = $("button.primary", form);
    button.disabled = true;
    let field = "train";
    try {
      const train = await upload("train");
      field = "validation";
      const validation = await upload("validation");
      field = "";
      working.textContent = "Submitting …";
      const request = {
        task: task.value,
        model: { reference: model.value.trim() },
        train: { reference: train },
        ranking: { estimator: ranking.value },
      };
      if (validation) request.validation = { reference: validation };
      if (fineTune.value === "yes") request.fine_tune = { epochs: Number(epochs.value) };
      if (ranking.value === "grad_cosine") Object.assign(request.ranking, { layers: "all", aggregation: "rank" });
      const audit = await call("/v1/audits", {
        method: "POST", json: request, headers: { "Idempotency-Key": key },
      });
      location.href = `/audits/${audit.id}`;
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      if (error.status) key = newKey(); // else the same call may have arrived: it must not act twice
      failBy(error, field);
    } finally {
      working.textContent = "";
      button.disabled = false;
    }
  });
}

// --- the review --------------------------------------------------------------------------------

class Review {
  constructor(root) {
    this.root = root;
    this.path = `/v1/audits/${root.dataset.audit}`;
    this.ranking = root.dataset.ranking;
    this.classes = JSON.parse(root.dataset.classes);
    this.filter = JSON.parse(root.dataset.filter);
    this.undoKey = `winnow-undo-${root.dataset.audit}`;
    this.nameInput = $("#reviewer");
    if (this.nameInput) {
      this.nameInput.value = localStorage.getItem("winnow-reviewer") || "";
      this.nameInput.addEventListener("change", () => localStorage.setItem("winnow-reviewer", this.nameInput.value.trim()));
    }
    root.addEventListener("click", (event) => this.onClick(event));
    root.addEventListener("submit", (event) => this.onSubmit(event));
    root.addEventListener("focusin", (event) => this.onFocus(event));
    document.addEventListener("keydown", (event) => this.onKey(event));
    for (const part of $$("[data-load]")) this.load(part);
    this.countFilter();
  }

  // What the reviewer saw: own decisions since are no conflict, those of others are.
  get version() { return Number(this.root.dataset.version); }
  get rows() { return $$("tr[data-index]", this.root); }
  get current() { return $("tr[data-index][aria-current]", this.root); }

  async load(part) {
    try {
      const response = await fetch(part.dataset.load);
      if (!response.ok) throw new Error();
      part.innerHTML = await response.text(); // drawn and escaped by the server
    } catch {
      const retry = make("button", { type: "button", textContent: "Try again" });
      retry.addEventListener("click", () => this.load(part));
      part.replaceChildren(make("p", { textContent: "The pictures could not be loaded. " }), retry);
      return;
    }
    const form = $("[data-cut]", part);
    if (form) startCut(form, this);
  }

  async countFilter() {
    if (!Object.keys(this.filter).length) return;
    const query = new URLSearchParams({ ranking_id: this.ranking });
    for (const [name, value] of Object.entries(this.filter)) {
      for (const each of [].concat(value)) query.append(name, each);
    }
    try {
      const found = await call(`${this.path}/suspects/summary?${query}`);
      const decided = found.num_matching - found.num_undecided;
      $("[data-summary]", this.root).textContent =
        `${samples(found.num_matching)} of this filter${decided ? `, ${count(decided)} decided` : ""}`;
    } catch { /* the buttons count again before they act */ }
  }

  async refresh() {
    const response = await fetch(location.href, { headers: { Accept: "text/html" } }).catch(() => null);
    if (!response || !response.ok || response.redirected) {
      throw new Refusal("The page could not be read again. What you decided is stored.", { status: response ? 401 : 0 });
    }
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    const index = this.current && this.current.dataset.index;
    const kept = $$("details[data-keep-open][open]", this.root).map((each) => each.dataset.keepOpen);
    for (const part of $$("[data-part]", fresh)) {
      $(`[data-part="${part.dataset.part}"]`, this.root).replaceChildren(...part.childNodes);
    }
    for (const name of kept) {
      const details = $(`details[data-keep-open="${name}"]`, this.root);
      if (details) details.open = true;
    }
    this.root.dataset.version = $("[data-review]", fresh).dataset.version;
    const row = index && $(`tr[data-index="${index}"]`, this.root);
    if (row) this.select(row);
    this.countFilter();
  }

  select(row) {
    for (const each of this.rows) {
      each.removeAttribute("aria-current");
      each.tabIndex = -1;
      for (const button of $$("[data-act]", each)) button.tabIndex = -1;
    }
    row.setAttribute("aria-current", "true");
    row.tabIndex = 0;
    for (const button of $$("[data-act]", row)) button.tabIndex = 0;
    if (!row.contains(document.activeElement)) row.focus();
  }

  move(step) {
    const rows = this.rows;
    if (!rows.length) return;
    const place = this.current ? rows.indexOf(this.current) + step : 0;
    const row = rows[Math.min(rows.length - 1, Math.max(0, place))];
    row.focus();
    row.scrollIntoView({ block: "nearest" });
  }

  async expand(row) {
    const button = $("[data-expand]", row);
    const next = row.nextElementSibling;
    if (next && next.classList.contains("evidence")) {
      next.remove();
      button.setAttribute("aria-expanded", "false");
      return;
    }
    button.setAttribute("aria-expanded", "true");
    const cell = make("td", { colSpan: 7, textContent: "Looking …" });
    cell.setAttribute("role", "cell");
    const evidence = make("tr", { className: "evidence" }, cell);
    evidence.setAttribute("role", "row");
    row.after(evidence);
    const response = await fetch(
      `/audits/${this.root.dataset.audit}/samples/${row.dataset.index}?part=true&ranking=${this.ranking}`).catch(() => null);
    if (response && response.ok && !response.redirected) {
      cell.innerHTML = await response.text(); // drawn and escaped by the server
    } else {
      cell.textContent = response && response.status === 404
        ? "This sample or its audit was deleted."
        : "The evidence could not be loaded. Close and open it to try again.";
    }
  }

  // --- decisions

  async reviewer() {
    if (!this.nameInput) return undefined; // the key's name
    if (this.nameInput.value.trim()) return this.nameInput.value.trim();
    const dialog = openDialog("name");
    const input = $("input", dialog);
    return new Promise((resolve) => {
      dialog.onclose = () => resolve(null);
      $("form", dialog).onsubmit = (event) => {
        event.preventDefault();
        const name = input.value.trim();
        if (!name) return;
        this.nameInput.value = name;
        localStorage.setItem("winnow-reviewer", name);
        resolve(name);
        dialog.close();
      };
    });
  }

  // One after the other, in the order of the keys: undo comes behind what it undoes.
  inTurn(run) {
    this.turn = (this.turn || Promise.resolve()).then(run);
    return this.turn;
  }

  async send(decision, { onDone, onSend = () => {}, asOf = this.version }) {
    const reviewer = await this.reviewer();
    if (reviewer === null) return undefined;
    onSend();
    const headers = { "Idempotency-Key": newKey() }; // tried again, it does not act twice
    return this.inTurn(() => attempt(async () => {
      let batch;
      try {
        batch = await call(`${this.path}/decisions`, {
          method: "POST", headers, json: { ...decision, ranking_id: this.ranking, as_of: asOf, reviewer },
        });
      } catch (error) {
        if (error.status !== 409 || error.problem.num_conflicts === undefined) throw error;
        this.askConflict(error, decision, onDone);
        return undefined;
      }
      this.remember(batch.id);
      await onDone(batch);
      return batch;
    }));
  }

  askConflict(error, decision, onDone) {
    const { num_conflicts: number, conflicts, decision_version: asOf } = error.problem;
    const names = [...new Set(conflicts.map((each) => each.reviewer))].join(", ");
    const places = conflicts.map((each) => each.index).join(", ");
    const text = `${names} decided ${samples(number)} of yours since this page was loaded: row ${places}`
      + `${number > conflicts.length ? ", …" : ""}. Nothing of yours was stored.`;
    this.ask("Somebody else decided too", text, "", [
      ["Leave it", () => {}],
      ["Decide anyway", () => this.send(decision, { onDone, asOf })],
      ["Reload theirs", () => attempt(async () => {
        await this.refresh();
        const row = this.rows.find((each) => decision.indices?.includes(Number(each.dataset.index)));
        if (row) this.select(row); // the next one had come up already
      }), "primary"],
    ]);
  }

  ask(title, text, warning, actions) {
    const dialog = openDialog("confirm");
    $("h2", dialog).textContent = title;
    $("[data-confirm-text]", dialog).textContent = text;
    const place = $("[data-confirm-warning]", dialog);
    place.textContent = warning;
    place.hidden = !warning;
    const buttons = actions.map(([label, run, kind = ""]) => {
      const button = make("button", { type: "button", textContent: label, className: kind });
      button.addEventListener("click", () => { dialog.close(); run(); });
      return button;
    });
    $("[data-confirm-actions]", dialog).replaceChildren(...buttons);
    buttons.at(-1).focus();
  }

  remember(batchId) {
    const stack = JSON.parse(sessionStorage.getItem(this.undoKey) || "[]");
    sessionStorage.setItem(this.undoKey, JSON.stringify([...stack, batchId].slice(-200)));
  }

  decide(row, action, extra = {}) {
    if (action === "accept" && !row.dataset.suggested) return say("This sample has no suggested label. Edit it instead.");
    const pressed = $(`[data-act="${action}"][aria-pressed="true"]`, row);
    if (pressed && action !== "edit") action = "clear";
    const onSend = () => {
      row.classList.add("is-waiting");
      if (row === this.current && action !== "clear" && !$(".evidence", this.root)) this.move(1);
    };
    const onDone = (batch) => {
      for (const button of $$("[data-act]", row)) button.setAttribute("aria-pressed", String(button.dataset.act === action));
      const value = action === "accept" ? row.dataset.suggested : extra.label || extra.text || "";
      const who = batch.reviewer || (this.nameInput && this.nameInput.value) || "";
      $("[data-who]", row).textContent = action === "clear" ? "" : [value, who, "just now"].filter(Boolean).join(" · ");
      this.freshenReview();
    };
    return this.send({ action, indices: [Number(row.dataset.index)], ...extra }, { onDone, onSend })
      .finally(() => row.classList.remove("is-waiting"));
  }

  async freshenReview() {
    const part = $('[data-part="review"]', this.root);
    const response = await fetch(`/audits/${this.root.dataset.audit}/review?ranking=${this.ranking}`).catch(() => null);
    if (!response || !response.ok || response.redirected) return;
    const isOpen = Boolean($("details[open]", part));
    part.innerHTML = await response.text(); // drawn and escaped by the server
    const details = $("details", part);
    if (details) details.open = isOpen;
  }

  edit(row) {
    const dialog = openDialog("edit");
    $("[data-edit-text]", dialog).textContent = $(".clip", row).textContent.trim().slice(0, 400);
    const input = $("select, textarea", dialog);
    if (this.classes.length) input.value = row.dataset.suggested || row.dataset.given;
    else {
      input.value = "";
      call(`${this.path}/samples/${row.dataset.index}`)
        .then((sample) => { if (!input.value) input.value = (sample.decision && sample.decision.text) || sample.text_pair || ""; })
        .catch(() => {});
    }
    $("form", dialog).onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
      this.decide(row, "edit", { [this.classes.length ? "label" : "text"]: input.value });
    };
  }

  async decideAll(action) {
    const decision = { action, filter: this.filter };
    const found = await attempt(() =>
      call(`${this.path}/decisions/preview`, { method: "POST", json: { ...decision, ranking_id: this.ranking, as_of: this.version } }));
    if (!found) return;
    const verbs = {
      accept: "take their suggested labels", keep: "be kept as they are", drop: "be dropped", clear: "lose their decisions",
    };
    const skipped = found.num_skipped ? ` ${samples(found.num_skipped)} without a suggested label will be left alone.` : "";
    const warning = found.num_conflicts
      ? `Somebody else has decided ${samples(found.num_conflicts)} of them since this page was loaded.` : "";
    const send = (asOf) => this.send(decision, {
      asOf,
      onDone: async (batch) => {
        say(`Done: ${samples(batch.num_changed)} changed.`, { actions: [["Undo", () => this.undo(batch.id)]] });
        await this.refresh();
      },
    });
    const go = found.num_conflicts
      ? [["Reload theirs", () => attempt(() => this.refresh())], ["Decide anyway", () => send(found.decision_version), "primary"]]
      : [[`Decide ${samples(found.num_samples - found.num_skipped)}`, () => send(this.version), "primary"]];
    this.ask("Decide the whole filter", `${samples(found.num_samples - found.num_skipped)} will ${verbs[action]}.${skipped}`,
      warning, [["Cancel", () => {}], ...go]);
  }

  async undo(batchId) {
    const reviewer = await this.reviewer();
    if (reviewer !== null) await this.inTurn(() => this.takeBack(batchId, reviewer));
  }

  async takeBack(batchId, reviewer) {
    const stack = JSON.parse(sessionStorage.getItem(this.undoKey) || "[]");
    const id = batchId || stack.at(-1);
    if (!id) return say("There is nothing to undo: you decided nothing in this tab.");
    const forget = () => sessionStorage.setItem(this.undoKey, JSON.stringify(stack.filter((each) => each !== id)));
    await attempt(async () => {
      try {
        const batch = await call(`${this.path}/decisions/${id}/undo`, { method: "POST", json: { reviewer } });
        say(`Undone: ${batch.action}, ${samples(batch.num_changed)}.`);
      } catch (error) {
        if (error.status !== 409 && error.status !== 404) throw error;
        say(error.message, { isBad: true });
      }
      forget();
      await this.refresh();
    });
  }

  // --- events

  onFocus(event) {
    const row = event.target.closest("tr[data-index]");
    if (row && row !== this.current) this.select(row);
  }

  onClick(event) {
    const row = event.target.closest("tr[data-index]");
    const { act, all, undo } = (event.target.closest("button") || { dataset: {} }).dataset;
    if (all) this.decideAll(all);
    else if (undo) this.undo(undo);
    else if (row && act) {
      this.select(row);
      if (act === "edit") this.edit(row);
      else this.decide(row, act);
    } else if (row && event.target.closest("[data-expand]")) {
      this.select(row);
      this.expand(row);
    } else if (row) row.focus();
  }

  onSubmit(event) {
    if (event.target.matches("[data-jump]")) {
      event.preventDefault();
      const rank = Number($("input", event.target).value);
      if (rank >= 1) this.go({ from_rank: rank - 1 });
    } else if (event.target.matches("[data-filters]")) {
      event.preventDefault(); // an address without the fields that say nothing
      const said = [...new FormData(event.target)].filter(([, value]) => value.trim() !== "");
      location.assign(`${location.pathname}?${new URLSearchParams(said)}#suspects`);
    }
  }

  go(changes) {
    const query = new URLSearchParams(location.search);
    for (const name of ["from_rank", "before_rank"]) query.delete(name);
    for (const [name, value] of Object.entries(changes)) query.set(name, value);
    location.assign(`${location.pathname}?${query}#suspects`);
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
    if (event.target.closest("input, select, textarea")) return;
    const row = this.current;
    const isOnRow = event.target === row;
    const actions = {
      j: () => this.move(1),
      k: () => this.move(-1),
      a: () => row && this.decide(row, "accept"),
      x: () => row && this.decide(row, "keep"),
      d: () => row && this.decide(row, "drop"),
      e: () => row && this.edit(row),
      u: () => this.undo(),
      n: () => $('.pager [rel="next"]', $("#suspects"))?.click(),
      p: () => $('.pager [rel="prev"]', $("#suspects"))?.click(),
      "?": () => openDialog("help"),
      Enter: isOnRow ? () => this.expand(row) : undefined,
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }
}

function startCut(form, review) {
  const edges = JSON.parse(form.dataset.edges);
  const below = JSON.parse(form.dataset.below);
  const range = $("input", form);
  const line = $(".cut", form.parentElement);
  const total = below.at(-1);
  const show = () => {
    const place = Number(range.value);
    const x = (480 * place) / below.length;
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    const text = `${samples(below[place - 1])} (${((100 * below[place - 1]) / total).toFixed(1)} %) score at most ${edges[place].toPrecision(4)}`;
    $("p", form).textContent = text;
    range.setAttribute("aria-valuetext", text);
  };
  const asked = review.filter.max_score;
  const flagged = Number(form.dataset.flagged);
  const start = asked === undefined
    ? below.findIndex((number) => number >= flagged)
    : edges.findIndex((edge) => edge >= asked) - 1;
  range.value = Math.max(0, start) + 1;
  range.addEventListener("input", show);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    review.go({ max_score: edges[Number(range.value)] });
  });
  show();
}

startLive();
for (const form of $$("[data-new-audit]")) startNewAudit(form);
for (const select of $$("[data-submits] select")) select.addEventListener("change", () => select.form.submit());
for (const root of $$("[data-review]")) new Review(root);
