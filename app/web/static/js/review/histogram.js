// The slider below the histogram: how many samples a cut of the scores selects.

import { $ } from "../dom.js";
import { samples } from "../wording.js";

export function startCut(form, review) {
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
