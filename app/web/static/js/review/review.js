// The page of an audit's suspects: its parts, drawn by the server and read again after a change.

import { Refusal, call } from "../api.js";
import { $, $$, make } from "../dom.js";
import { count, samples } from "../wording.js";
import { Decisions } from "./decisions.js";
import { startCut } from "./histogram.js";
import { listen } from "./keys.js";
import { Reviewer } from "./reviewer.js";
import { Table } from "./table.js";

export class Review {
  constructor(root) {
    this.root = root;
    this.path = `/v1/audits/${root.dataset.audit}`;
    this.ranking = root.dataset.ranking;
    this.classes = JSON.parse(root.dataset.classes);
    this.filter = JSON.parse(root.dataset.filter);
    this.reviewer = new Reviewer();
    this.table = new Table(root);
    this.decisions = new Decisions(this);
    listen(this);
    for (const part of $$("[data-load]")) this.load(part);
    this.countFilter();
  }

  // What the reviewer saw: own decisions since are no conflict, those of others are.
  get version() { return Number(this.root.dataset.version); }

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
    const index = this.table.current && this.table.current.dataset.index;
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
    if (row) this.table.select(row);
    this.countFilter();
  }

  go(changes) {
    const query = new URLSearchParams(location.search);
    for (const name of ["from_rank", "before_rank"]) query.delete(name);
    for (const [name, value] of Object.entries(changes)) query.set(name, value);
    location.assign(`${location.pathname}?${query}#suspects`);
  }
}
