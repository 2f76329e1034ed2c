// Requests to the service.

export const KEY = "perennial-api-key";
// Identifies the tab in the stored events. Not randomUUID, which needs https or localhost.
const USER = "page-" + Array.from(crypto.getRandomValues(new Uint8Array(6)), (b) => b.toString(16).padStart(2, "0")).join("");

/** A failed request; `kind` is a key of `TITLES`, `reason` the guard's reason code, `param` the wrong field. */
export class RequestError extends Error {
  constructor(kind, message, { reason = null, waitS = 0, param = null } = {}) {
    super(message);
    Object.assign(this, { kind, reason, waitS, param });
  }
}

export const TITLES = {
  key: "An API key is required",
  guard: "Rejected by the guard",
  busy: "Too many requests",
  quota: "The quota is used up",
  gone: "This version is no longer served",
  down: "The service is not ready",
  failed: "The model failed",
  network: "No connection",
  other: "The request was rejected",
};
export const RETRYABLE = ["busy", "quota", "down", "failed", "network"];
const KIND_OF_CODE = {
  content_refused: "guard",
  insufficient_quota: "quota",
  model_not_found: "gone",
  engine_failed: "failed",
  store_unavailable: "down",
};
const KIND_OF_STATUS = { 401: "key", 429: "busy", 500: "failed" };

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

export async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { headers: headers(), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("network", "The service cannot be reached. Check the network, and that the service is running.");
  }
  if (!answer.ok) throw await readError(answer);
  return answer;
}

async function readError(answer) {
  const error = (await answer.json().catch(() => null))?.error ?? {};
  const message = error.message || `The service answered with status ${answer.status}.`;
  const kind = KIND_OF_CODE[error.code] ?? KIND_OF_STATUS[answer.status] ?? (answer.status > 500 ? "down" : "other");
  return new RequestError(kind, message, { reason: error.reason, param: error.param, waitS: secondsToWait(answer.headers.get("Retry-After")) });
}

/** Retry-After is a number of seconds, or a date. */
function secondsToWait(header) {
  if (!header) return 0;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Math.max(0, Math.ceil(seconds) || 0);
}

/** Yield the data of each server-sent event until the stream ends. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

/** Stream one answer into `result`; calls `onPiece` after each piece. */
export async function streamAnswer(model, request, signal, result, onPiece) {
  // The service adds the system prompt of training to a conversation without one.
  const { messages, tools, choice, session } = request;
  const started = performance.now();
  const answer = await call("v1/chat/completions", {
    method: "POST",
    signal,
    body: JSON.stringify({
      model: pinned(model),
      messages,
      ...(tools.length && { tools, tool_choice: choice }),
      stream: true,
      stream_options: { include_usage: true },
      user: USER,
      ...(session && { session: `${USER}-${session}` }),
    }),
  });
  result.requestId = answer.headers.get("X-Request-Id");
  try {
    for await (const data of events(answer.body)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        const { code, message = "The answer was interrupted.", reason } = chunk.error;
        throw new RequestError(KIND_OF_CODE[code] ?? "failed", message, { reason });
      }
      if (chunk.usage) result.usage = chunk.usage;
      const [picked] = chunk.choices ?? [];
      if (addPiece(result, picked?.delta ?? {})) {
        const now = performance.now();
        result.firstMs ??= now - started;
        result.lastMs = now - started;
        onPiece();
      }
      if (picked?.finish_reason) result.finish = picked.finish_reason;
    }
  } catch (error) {
    if (error instanceof RequestError || error.name === "AbortError") throw error;
    throw new RequestError("network", "The connection broke before the answer was complete.");
  }
  if (result.finish === "content_filter") throw new RequestError("guard", "The answer was rejected by the guard.");
  if (!result.finish) throw new RequestError("network", "The connection broke before the answer was complete.");
}

/** Add a piece of a stream to `result`; return whether it has anything. */
function addPiece(result, { content, reasoning_content: reasoning, tool_calls: calls = [] }) {
  result.text += content ?? "";
  result.reasoning += reasoning ?? "";
  for (const piece of calls) {
    const call = (result.calls[piece.index] ??= { id: null, name: "", arguments: "" });
    call.id ??= piece.id ?? null;
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }
  return Boolean(content || reasoning || calls.length);
}

/** The name of exactly this version: under the bare model name a canary may answer. */
const pinned = (model) => (model.perennial?.version ? `${model.id.split(":")[0]}:${model.perennial.version}` : model.id);
