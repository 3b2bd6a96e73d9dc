// The server, as the page asks it.

const KEPT = "bestroute-key";

/** The server has refused; the message is for whoever reads the page. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEPT, key);
}

export async function get(path, signal) {
  return (await asked(path, { signal })).json();
}

export async function post(path, body, signal) {
  return (await asked(path, sent(body, signal))).json();
}

/** What the server tells as it happens, one object after the other. */
export async function* told(path, body, signal) {
  const response = await asked(path, sent(body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await lost(reader.read());
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const said = JSON.parse(event.slice(6));
      if (said.error) throw new Refused(said.error.message, 200);
      yield said;
    }
  }
}

function sent(body, signal) {
  return {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  };
}

async function asked(path, options) {
  const key = sessionStorage.getItem(KEPT);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await lost(fetch(path, { ...options, headers, credentials: "same-origin" }));
  if (response.ok) return response;
  const text = await lost(response.text());
  const refused = new Refused(words(text, response.status), response.status);
  if (response.status === 401) {
    document.dispatchEvent(new CustomEvent("key-needed", { detail: key ? refused.message : "" }));
  }
  throw refused;
}

function words(text, status) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `the server has answered with status ${status}`;
  }
}

async function lost(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server can’t be reached; is it still running?", 0);
  }
}
