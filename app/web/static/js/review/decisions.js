// Decisions: sent one after the other, undone, and asked about where somebody else decided too.

import { call, newKey } from "../api.js";
import { ask, openDialog } from "../dialogs.js";
import { $, $$ } from "../dom.js";
import { attempt, say } from "../messages.js";
import { samples } from "../wording.js";

export class Decisions {
  constructor(review) {
    this.review = review;
    this.undoKey = `winnow-undo-${review.root.dataset.audit}`;
  }

  // One after the other, in the order of the keys: undo comes behind what it undoes.
  inTurn(run) {
    this.turn = (this.turn || Promise.resolve()).then(run);
    return this.turn;
  }

  async send(decision, { onDone, onSend = () => {}, asOf = this.review.version }) {
    const reviewer = await this.review.reviewer.name();
    if (reviewer === null) return undefined;
    onSend();
    const headers = { "Idempotency-Key": newKey() }; // tried again, it does not act twice
    return this.inTurn(() => attempt(async () => {
      let batch;
      try {
        batch = await call(`${this.review.path}/decisions`, {
          method: "POST", headers, json: { ...decision, ranking_id: this.review.ranking, as_of: asOf, reviewer },
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
    ask("Somebody else decided too", text, "", [
      ["Leave it", () => {}],
      ["Decide anyway", () => this.send(decision, { onDone, asOf })],
      ["Reload theirs", () => attempt(async () => {
        await this.review.refresh();
        const row = this.review.table.rows.find((each) => decision.indices?.includes(Number(each.dataset.index)));
        if (row) this.review.table.select(row); // the next one had come up already
      }), "primary"],
    ]);
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
      if (row === this.review.table.current && action !== "clear" && !$(".evidence", this.review.root)) this.review.table.move(1);
    };
    const onDone = (batch) => {
      for (const button of $$("[data-act]", row)) button.setAttribute("aria-pressed", String(button.dataset.act === action));
      const value = action === "accept" ? row.dataset.suggested : extra.label || extra.text || "";
      const who = batch.reviewer || this.review.reviewer.input?.value || "";
      $("[data-who]", row).textContent = action === "clear" ? "" : [value, who, "just now"].filter(Boolean).join(" · ");
      this.freshenReview();
    };
    return this.send({ action, indices: [Number(row.dataset.index)], ...extra }, { onDone, onSend })
      .finally(() => row.classList.remove("is-waiting"));
  }

  async freshenReview() {
    const part = $('[data-part="review"]', this.review.root);
    const response = await fetch(`/audits/${this.review.root.dataset.audit}/review?ranking=${this.review.ranking}`).catch(() => null);
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
    if (this.review.classes.length) input.value = row.dataset.suggested || row.dataset.given;
    else {
      input.value = "";
      call(`${this.review.path}/samples/${row.dataset.index}`)
        .then((sample) => { if (!input.value) input.value = (sample.decision && sample.decision.text) || sample.text_pair || ""; })
        .catch(() => {});
    }
    $("form", dialog).onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
      this.decide(row, "edit", { [this.review.classes.length ? "label" : "text"]: input.value });
    };
  }

  async decideAll(action) {
    const decision = { action, filter: this.review.filter };
    const found = await attempt(() =>
      call(`${this.review.path}/decisions/preview`, {
        method: "POST", json: { ...decision, ranking_id: this.review.ranking, as_of: this.review.version },
      }));
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
        await this.review.refresh();
      },
    });
    const go = found.num_conflicts
      ? [["Reload theirs", () => attempt(() => this.review.refresh())], ["Decide anyway", () => send(found.decision_version), "primary"]]
      : [[`Decide ${samples(found.num_samples - found.num_skipped)}`, () => send(this.review.version), "primary"]];
    ask("Decide the whole filter", `${samples(found.num_samples - found.num_skipped)} will ${verbs[action]}.${skipped}`,
      warning, [["Cancel", () => {}], ...go]);
  }

  async undo(batchId) {
    const reviewer = await this.review.reviewer.name();
    if (reviewer !== null) await this.inTurn(() => this.takeBack(batchId, reviewer));
  }

  async takeBack(batchId, reviewer) {
    const stack = JSON.parse(sessionStorage.getItem(this.undoKey) || "[]");
    const id = batchId || stack.at(-1);
    if (!id) return say("There is nothing to undo: you decided nothing in this tab.");
    const forget = () => sessionStorage.setItem(this.undoKey, JSON.stringify(stack.filter((each) => each !== id)));
    await attempt(async () => {
      try {
        const batch = await call(`${this.review.path}/decisions/${id}/undo`, { method: "POST", json: { reviewer } });
        say(`Undone: ${batch.action}, ${samples(batch.num_changed)}.`);
      } catch (error) {
        if (error.status !== 409 && error.status !== 404) throw error;
        say(error.message, { isBad: true });
      }
      forget();
      await this.review.refresh();
    });
  }
}
