// What keys, clicks and forms do in a review.

import { openDialog } from "../dialogs.js";
import { $ } from "../dom.js";

function onClick({ table, decisions }, event) {
  const row = event.target.closest("tr[data-index]");
  const { act, all, undo } = (event.target.closest("button") || { dataset: {} }).dataset;
  if (all) decisions.decideAll(all);
  else if (undo) decisions.undo(undo);
  else if (row && act) {
    table.select(row);
    if (act === "edit") decisions.edit(row);
    else decisions.decide(row, act);
  } else if (row && event.target.closest("[data-expand]")) {
    table.select(row);
    table.expand(row);
  } else if (row) row.focus();
}

function onSubmit(review, event) {
  if (event.target.matches("[data-jump]")) {
    event.preventDefault();
    const rank = Number($("input", event.target).value);
    if (rank >= 1) review.go({ from_rank: rank - 1 });
  } else if (event.target.matches("[data-filters]")) {
    event.preventDefault(); // an address without the fields that say nothing
    const said = [...new FormData(event.target)].filter(([, value]) => value.trim() !== "");
    location.assign(`${location.pathname}?${new URLSearchParams(said)}#suspects`);
  }
}

function onKey({ table, decisions }, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
  if (event.target.closest("input, select, textarea")) return;
  const row = table.current;
  const isOnRow = event.target === row;
  const actions = {
    j: () => table.move(1),
    k: () => table.move(-1),
    a: () => row && decisions.decide(row, "accept"),
    x: () => row && decisions.decide(row, "keep"),
    d: () => row && decisions.decide(row, "drop"),
    e: () => row && decisions.edit(row),
    u: () => decisions.undo(),
    n: () => $('.pager [rel="next"]', $("#suspects"))?.click(),
    p: () => $('.pager [rel="prev"]', $("#suspects"))?.click(),
    "?": () => openDialog("help"),
    Enter: isOnRow ? () => table.expand(row) : undefined,
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

export function listen(review) {
  review.root.addEventListener("click", (event) => onClick(review, event));
  review.root.addEventListener("submit", (event) => onSubmit(review, event));
  document.addEventListener("keydown", (event) => onKey(review, event));
}
