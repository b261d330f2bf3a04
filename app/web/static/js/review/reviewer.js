// Who reviews: asked once in each browser, where no key says it.

import { openDialog } from "../dialogs.js";
import { $ } from "../dom.js";

export class Reviewer {
  constructor() {
    this.input = $("#reviewer");
    if (this.input) {
      this.input.value = localStorage.getItem("winnow-reviewer") || "";
      this.input.addEventListener("change", () => localStorage.setItem("winnow-reviewer", this.input.value.trim()));
    }
  }

  // undefined where the key says it; null if the question was closed.
  async name() {
    if (!this.input) return undefined;
    if (this.input.value.trim()) return this.input.value.trim();
    const dialog = openDialog("name");
    const input = $("input", dialog);
    return new Promise((resolve) => {
      dialog.onclose = () => resolve(null);
      $("form", dialog).onsubmit = (event) => {
        event.preventDefault();
        const name = input.value.trim();
        if (!name) return;
        this.input.value = name;
        localStorage.setItem("winnow-reviewer", name);
        resolve(name);
        dialog.close();
      };
    });
  }
}
