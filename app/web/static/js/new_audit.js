// The form of a new audit: it sends the files, then submits.

import { Refusal, call, newKey } from "./api.js";
import { $, $$ } from "./dom.js";

const FIELD_OF = [
  ["#/fine_tune/epochs", "epochs"], ["#/fine_tune", "fine_tune"], ["#/model", "model"], ["#/train", "train"],
  ["#/validation", "validation"], ["#/ranking", "ranking"], ["#/task", "task"],
];

export function startNewAudit(form) {
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
