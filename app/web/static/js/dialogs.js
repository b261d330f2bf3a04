// Dialogs and menus: opened and closed by what the pages say in data-open and data-close.

import { $, $$, make } from "./dom.js";

export function openDialog(id) {
  const dialog = document.getElementById(id);
  if (dialog && !dialog.open) dialog.showModal();
  return dialog;
}

export function ask(title, text, warning, actions) {
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

export function startDialogs() {
  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-open]");
    if (opener) openDialog(opener.dataset.open);
    if (event.target.closest("[data-close]")) event.target.closest("dialog").close();
    for (const menu of $$("details.menu[open]")) {
      if (!menu.contains(event.target)) menu.open = false;
    }
  });
  if (location.hash === "#new-audit" && $("#new-audit")) openDialog("new-audit");
}
