// Calls to the API, and what they say when they are refused.

export class Refusal extends Error {
  constructor(message, { status = 0, problem = {} } = {}) {
    super(message);
    this.status = status;
    this.problem = problem;
  }
}

export async function call(path, { method = "GET", json, body, headers = {} } = {}) {
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

export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
