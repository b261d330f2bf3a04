// Messages: what failed stays until it is tried again or let go.

import { Refusal } from "./api.js";
import { $, make } from "./dom.js";

let numUnsent = 0;
addEventListener("beforeunload", (event) => {
  if (numUnsent) event.preventDefault();
});

export function say(text, { isBad = false, actions = [], onClose = () => {} } = {}) {
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

export async function attempt(run) {
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
