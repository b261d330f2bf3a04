// The table of suspects: one row is current, and a row opens to its evidence.

import { $, $$, make } from "../dom.js";

export class Table {
  constructor(root) {
    this.root = root;
    root.addEventListener("focusin", (event) => this.onFocus(event));
  }

  get rows() { return $$("tr[data-index]", this.root); }
  get current() { return $("tr[data-index][aria-current]", this.root); }

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
      `/audits/${this.root.dataset.audit}/samples/${row.dataset.index}?part=true&ranking=${this.root.dataset.ranking}`).catch(() => null);
    if (response && response.ok && !response.redirected) {
      cell.innerHTML = await response.text(); // drawn and escaped by the server
    } else {
      cell.textContent = response && response.status === 404
        ? "This sample or its audit was deleted."
        : "The evidence could not be loaded. Close and open it to try again.";
    }
  }

  onFocus(event) {
    const row = event.target.closest("tr[data-index]");
    if (row && row !== this.current) this.select(row);
  }
}
