// The playground: one question to one or two versions, streamed, with thumbs and better answers.
// What a model wrote reaches the page through textContent alone.

const byId = (id) => document.getElementById(id);
const [question, send, stopButton] = ["question", "send", "stop"].map(byId);
const [left, right, sideBySide] = ["left", "right", "side-by-side"].map(byId);

const KEY = "perennial-api-key";
// Names the tab in the stored events. Not randomUUID, which plain http beyond localhost lacks.
const USER = "page-" + Array.from(crypto.getRandomValues(new Uint8Array(6)), (b) => b.toString(16).padStart(2, "0")).join("");
// Word by word, a diff costs the product of both lengths.
const MAX_DIFF_WORDS = 600;

let models = [];
const running = new Set(); // an AbortController for each answer being streamed
let lastAsked = "";
let waitingForKey = []; // what to do again once a key is given

// ---------------------------------------------------------------- text and JSON

/** Say a name as a person would: "HassTurnOn" → "Turn on", "start_minutes" → "Start minutes". */
export function humane(name) {
  const words = name
    .replace(/^Hass(?=[A-Z])/, "") // Home Assistant's prefix tells a reader nothing
    .replace(/([a-z0-9])([A-Z])/g, "$1 $2")
    .replace(/([A-Z]+)([A-Z][a-z])/g, "$1 $2")
    .split(/[\s_-]+/)
    .filter(Boolean)
    .map((word) => (word.length > 1 && word === word.toUpperCase() ? word : word.toLowerCase()));
  const text = words.join(" ");
  return text ? text[0].toUpperCase() + text.slice(1) : name;
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Read JSON that is still being written: its members so far that are whole, undefined when there is none. */
export function parseSoFar(text) {
  const whole = parse(text);
  if (whole !== undefined) return whole;
  const closers = [];
  let inString = false;
  let last = "";
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (inString) {
      if (c === "\\") i++;
      else if (c === '"') inString = false;
    } else if (c === '"') inString = true;
    else if (c === "{" || c === "[") {
      closers.unshift(c === "{" ? "}" : "]");
      last = text.slice(0, i + 1) + closers.join("");
    } else if (c === "}" || c === "]") {
      closers.shift();
      last = text.slice(0, i + 1) + closers.join("");
    } else if (c === ",") last = text.slice(0, i) + closers.join("");
  }
  return parse(last);
}

// Both work on the text, not on the parsed value: 1.0 stays 1.0, and keys keep their order.
const JSON_TOKEN = /"(?:[^"\\]|\\.)*"|\{\s*\}|\[\s*\]|[{}[\],:]|\s+/g;

/** Indent JSON for the editor. */
export function indented(text) {
  let depth = 0;
  const newline = () => "\n" + "  ".repeat(depth);
  return text.trim().replace(JSON_TOKEN, (token) => {
    if (token[0] === '"') return token;
    if (token.trim() === "") return "";
    if (token.length > 1) return token.replace(/\s+/g, "");
    if ("{[".includes(token)) return depth++, token + newline();
    if ("}]".includes(token)) return depth--, newline() + token;
    return token === "," ? token + newline() : token + " ";
  });
}

/** Take the white space out of JSON: the form in which the model writes it. */
export function compact(text) {
  return text.replace(JSON_TOKEN, (token) => (token[0] === '"' ? token : token.replace(/\s+/g, "")));
}

const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const looksLikeJson = (text) => /^\s*[{[]/.test(text);
const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const fromTemplate = (id) => byId(id).content.firstElementChild.cloneNode(true);
const tell = (text) => (byId("status").textContent = text);

// ---------------------------------------------------------------- the service

/** What a request met. `kind` is a key of `TITLES`, `reason` the guard's own word. */
class Trouble extends Error {
  constructor(kind, message, { reason = null, waitS = 0 } = {}) {
    super(message);
    Object.assign(this, { kind, reason, waitS });
  }
}

const TITLES = {
  key: "A key is needed",
  guard: "Refused by the guard",
  busy: "Too many requests just now",
  quota: "The quota is used up",
  gone: "This version is no longer served",
  down: "The service is not ready",
  failed: "The model failed",
  network: "No connection",
  other: "The request was not accepted",
};
const WORTH_A_RETRY = ["busy", "quota", "down", "failed", "network"];
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

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { headers: headers(), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("network", "The service cannot be reached. Check the network, or whether it is running.");
  }
  if (!answer.ok) throw await troubleOf(answer);
  return answer;
}

async function troubleOf(answer) {
  const error = (await answer.json().catch(() => null))?.error ?? {};
  const message = error.message || `The service answered with status ${answer.status}.`;
  const kind = KIND_OF_CODE[error.code] ?? KIND_OF_STATUS[answer.status] ?? (answer.status > 500 ? "down" : "other");
  return new Trouble(kind, message, { reason: error.reason, waitS: secondsToWait(answer.headers.get("Retry-After")) });
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

/** Stream one answer; `onText` gets all the text so far. */
async function streamAnswer(model, text, signal, result, onText) {
  // The service puts the system prompt of training before a conversation that has none.
  const messages = [{ role: "user", content: text }];
  const started = performance.now();
  const answer = await call("v1/chat/completions", {
    method: "POST",
    signal,
    body: JSON.stringify({ model: pinned(model), messages, stream: true, stream_options: { include_usage: true }, user: USER }),
  });
  result.requestId = answer.headers.get("X-Request-Id");
  try {
    for await (const data of events(answer.body)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        const { code, message = "The answer broke off.", reason } = chunk.error;
        throw new Trouble(KIND_OF_CODE[code] ?? "failed", message, { reason });
      }
      if (chunk.usage) result.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) {
        const now = performance.now();
        result.firstMs ??= now - started;
        result.lastMs = now - started;
        result.text += choice.delta.content;
        onText();
      }
      if (choice?.finish_reason) result.finish = choice.finish_reason;
    }
  } catch (error) {
    if (error instanceof Trouble || error.name === "AbortError") throw error;
    throw new Trouble("network", "The connection broke before the answer was complete.");
  }
  if (result.finish === "content_filter") throw new Trouble("guard", "The answer did not pass the checks.");
  if (!result.finish) throw new Trouble("network", "The connection broke before the answer was complete.");
}

// ---------------------------------------------------------------- an answer, drawn

/** Draw a record as a card into `body`. What is already there stays, so a growing answer does not flicker. */
function drawCard(body, record, labelKey) {
  let card = body.querySelector(".card");
  if (!card) {
    card = element("div", "card");
    card.append(element("dl", "slots"));
    body.replaceChildren(card);
  }
  const slots = card.querySelector(".slots");
  const drawn = new Map(Array.from(slots.children, (row) => [row.dataset.key, row]));
  for (const [key, value] of Object.entries(record)) {
    if (key === labelKey && typeof value === "string") {
      if (!card.querySelector(".card-title")) slots.before(element("p", "card-title"), element("code", "card-label"));
      card.querySelector(".card-title").textContent = humane(value);
      card.querySelector(".card-label").textContent = value;
      continue;
    }
    let row = drawn.get(key);
    if (!row) slots.append((row = slotRow(key)));
    const text = shown(value);
    if (row.lastChild.textContent !== text) row.lastChild.textContent = text;
  }
}

function slotRow(key) {
  const row = element("div", "slot");
  row.dataset.key = key;
  row.append(element("dt", "", humane(key)), element("dd"));
  return row;
}

function drawWaiting(body) {
  const dots = element("div", "waiting");
  dots.append(element("i"), element("i"), element("i"), element("span", "unseen", "Waiting for the answer"));
  body.replaceChildren(dots);
}

function drawText(body, text, className = "plain") {
  const tag = className === "code" ? "pre" : "p";
  if (body.firstElementChild?.className !== className) body.replaceChildren(element(tag, className));
  body.firstElementChild.textContent = text;
}

// ---------------------------------------------------------------- one panel: a version's answer to a question

class Panel {
  constructor(turn, model) {
    this.turn = turn;
    this.model = model;
    this.labelKey = model.perennial?.task?.label_key ?? null;
    this.root = fromTemplate("panel-template");
    this.part = (selector) => this.root.querySelector(selector);
    this.body = this.part(".answer");
    this.part(".alias").textContent = aliasOf(model);
    this.part(".version").textContent = model.perennial?.version ?? model.id;
    this.root.setAttribute("aria-label", `Answer of ${nameOf(model)}`);
    this.part(".feedback").setAttribute("aria-label", `Your opinion on the answer of ${nameOf(model)}`);
    this.part(".raw-toggle").onclick = () => this.showRaw(this.part(".raw-toggle").ariaPressed !== "true");
    this.part(".trouble button").onclick = () => this.retry();
    this.wireFeedback();
  }

  async ask() {
    this.result = { text: "", requestId: null, usage: null, finish: null };
    this.record = undefined;
    this.settled = false;
    this.root.dataset.state = "running";
    this.body.ariaBusy = "true";
    for (const name of [".trouble", ".figures", ".feedback", ".editor", ".raw-toggle"]) this.part(name).hidden = true;
    drawWaiting(this.body);
    const controller = new AbortController();
    running.add(controller);
    showBusy();
    try {
      await streamAnswer(this.model, this.turn.question, controller.signal, this.result, () => this.scheduleDraw());
      this.finish();
    } catch (error) {
      if (error.name === "AbortError") this.finishStopped();
      else this.fail(error instanceof Trouble ? error : new Trouble("other", String(error.message ?? error)));
    } finally {
      running.delete(controller);
      this.settled = true;
      this.body.ariaBusy = "false";
      showBusy();
      this.turn.panelSettled();
    }
  }

  /** Draw at most once a frame: a fast model sends several chunks in one. */
  scheduleDraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (!this.settled) this.drawSoFar();
    });
  }

  drawSoFar() {
    const { text } = this.result;
    if (!looksLikeJson(text) && text.trim()) return drawText(this.body, text);
    const value = parseSoFar(text);
    // Half a word of JSON says nothing: until a member is whole, what was drawn stays.
    if (isRecord(value) && Object.keys(value).length) drawCard(this.body, value, this.labelKey);
  }

  draw() {
    const { text } = this.result;
    const value = looksLikeJson(text) ? parse(text) : undefined;
    this.record = isRecord(value) && Object.keys(value).length ? value : undefined;
    this.part(".raw-toggle").hidden = !this.record;
    if (this.record) {
      this.body.replaceChildren();
      drawCard(this.body, this.record, this.labelKey);
    } else if (!text) this.body.replaceChildren(element("p", "note", "The answer is empty."));
    else drawText(this.body, value === undefined ? text : indented(text), value === undefined ? "plain" : "code");
  }

  finish() {
    this.settled = true;
    this.root.dataset.state = "done";
    this.draw();
    const { text, finish } = this.result;
    if (this.labelKey && parse(text) === undefined) this.addNote("This is not valid JSON.");
    if (finish === "length") this.addNote("Cut off at the longest answer allowed.");
    this.showFigures();
    this.part(".feedback").hidden = !this.result.requestId;
    this.resetFeedback();
  }

  finishStopped() {
    this.settled = true;
    this.root.dataset.state = "stopped";
    if (this.result.text) this.draw();
    else this.body.replaceChildren();
    this.addNote("Stopped.");
  }

  addNote(text) {
    this.body.append(element("p", "note", text));
  }

  showFigures() {
    const { firstMs, lastMs, usage } = this.result;
    const count = usage?.completion_tokens ?? 0;
    const streamedS = (lastMs - firstMs) / 1000;
    this.part(".first").textContent = firstMs === undefined ? "–" : humaneTime(firstMs);
    // The first token ends the wait; the others are what the time after it was for.
    this.part(".speed").textContent = count > 2 && streamedS > 0 ? `${Math.round((count - 1) / streamedS)} tokens/s` : "–";
    this.part(".tokens").textContent = usage ? `${usage.prompt_tokens} in, ${count} out` : "–";
    this.part(".figures").hidden = false;
  }

  showRaw(raw) {
    const toggle = this.part(".raw-toggle");
    toggle.ariaPressed = String(raw);
    if (raw) drawText(this.body, this.result.text, "code");
    else {
      this.body.replaceChildren();
      drawCard(this.body, this.record, this.labelKey);
      this.turn.compare();
    }
  }

  /** The answer in a few words, for the list of earlier questions. */
  gist() {
    if (this.root.dataset.state === "failed") return "no answer";
    if (this.root.dataset.state === "stopped") return "stopped";
    const label = this.record?.[this.labelKey];
    return typeof label === "string" ? humane(label) : this.result.text.trim();
  }

  // -------------------------------------------------------------- what went wrong

  fail(trouble) {
    this.settled = true;
    this.root.dataset.state = "failed";
    // A guard that refuses an answer means it is not to be shown, not even in part.
    if (this.result.text && trouble.kind !== "guard") this.draw();
    else this.body.replaceChildren();
    const box = this.part(".trouble");
    this.part(".trouble-title").textContent = TITLES[trouble.kind];
    const text = this.part(".trouble-text");
    text.textContent = trouble.message;
    if (trouble.reason && !trouble.message.includes(trouble.reason)) text.append(" Reason: ", element("code", "", trouble.reason));
    const retry = this.part(".trouble button");
    retry.hidden = !WORTH_A_RETRY.includes(trouble.kind);
    box.hidden = false;
    if (!retry.hidden) countDown(retry, trouble.waitS);
    if (trouble.kind === "key") askForKey(() => this.ask());
    if (trouble.kind === "gone") loadModels();
  }

  retry() {
    if (this.part(".trouble button").ariaDisabled === "true") return;
    question.focus({ preventScroll: true });
    this.ask();
  }

  // -------------------------------------------------------------- what the person thinks

  wireFeedback() {
    for (const button of this.root.querySelectorAll(".thumb")) button.onclick = () => this.giveThumb(button);
    this.part(".better").onclick = () => this.showEditor(this.part(".editor").hidden);
    this.part(".cancel").onclick = () => this.showEditor(false, true);
    this.part(".editor").onsubmit = (event) => {
      event.preventDefault();
      this.giveCorrection();
    };
    this.part(".editor").onkeydown = (event) => {
      if (event.key === "Escape") this.showEditor(false, true);
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.giveCorrection();
    };
    const wrong = this.part(".wrong");
    wrong.id = `wrong-${++Panel.count}`;
    this.part(".correction").setAttribute("aria-describedby", wrong.id);
  }

  resetFeedback() {
    for (const button of this.root.querySelectorAll(".thumb")) button.ariaPressed = "false";
    const { text } = this.result;
    this.part(".correction").value = parse(text) === undefined ? text : indented(text);
    this.part(".correction").classList.toggle("prose", !this.labelKey);
    this.part(".comment").value = "";
    this.say("");
  }

  showEditor(open, focusBack = false) {
    this.part(".editor").hidden = !open;
    this.part(".better").ariaExpanded = String(open);
    this.complain("");
    if (open) this.part(".correction").focus();
    else if (focusBack) this.part(".better").focus();
  }

  say(text, wrong = false) {
    const said = this.part(".said");
    said.textContent = text;
    said.toggleAttribute("data-wrong", wrong);
  }

  complain(text) {
    this.part(".wrong").textContent = text;
    this.part(".wrong").hidden = !text;
    this.part(".correction").ariaInvalid = String(Boolean(text));
  }

  async giveThumb(button) {
    if (button.ariaPressed === "true" || this.sending) return;
    const thumb = button.dataset.thumb;
    const sent = await this.sendFeedback({ thumb, correction: null, comment: null });
    if (!sent) return;
    for (const other of this.root.querySelectorAll(".thumb")) other.ariaPressed = String(other === button);
    if (thumb === "down" && this.part(".editor").hidden) this.showEditor(true);
  }

  async giveCorrection() {
    if (this.sending) return;
    const typed = this.part(".correction").value.trim();
    const comment = this.part(".comment").value.trim() || null;
    if (this.labelKey && parse(typed) === undefined) {
      this.complain(`This is not JSON yet: ${jsonProblem(typed)}`);
      return this.part(".correction").focus();
    }
    const tidy = (text) => (parse(text) === undefined ? text.trim() : compact(text.trim()));
    const correction = typed && tidy(typed) !== tidy(this.result.text) ? tidy(typed) : null;
    if (!correction && !comment) {
      this.complain("Change the answer or write a comment first.");
      return this.part(".correction").focus();
    }
    // The thumb has been sent by its own button: each thing said is stored once.
    if (await this.sendFeedback({ thumb: null, correction, comment })) this.showEditor(false, true);
  }

  async sendFeedback(feedback) {
    this.sending = true;
    this.say("");
    try {
      const body = JSON.stringify({ request_id: this.result.requestId, ...feedback });
      await call("v1/feedback", { method: "POST", body });
      this.say("Saved, thank you");
      return true;
    } catch (error) {
      if (error.kind === "key") askForKey(() => {});
      this.say(`Not saved. ${error.message}`, true);
      return false;
    } finally {
      this.sending = false;
    }
  }
}
Panel.count = 0;

function jsonProblem(text) {
  try {
    JSON.parse(text);
  } catch (error) {
    return error.message;
  }
  return "";
}

const humaneTime = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** A quota may end only at midnight: hours, then minutes, then seconds. */
function humaneWait(seconds) {
  if (seconds < 120) return `${seconds} s`;
  return seconds < 7200 ? `${Math.ceil(seconds / 60)} min` : `${Math.ceil(seconds / 3600)} h`;
}

/** Keep a button from use for some seconds and say on it how many are left. */
function countDown(button, seconds) {
  const until = Date.now() + seconds * 1000;
  clearInterval(button.timer);
  const tick = () => {
    const leftS = Math.ceil((until - Date.now()) / 1000);
    button.ariaDisabled = String(leftS > 0);
    button.textContent = leftS > 0 ? `Try again in ${humaneWait(leftS)}` : "Try again";
    if (leftS > 0) return;
    clearInterval(button.timer);
    if (seconds) tell("You can try again now.");
  };
  button.timer = setInterval(tick, 250);
  tick();
}

// ---------------------------------------------------------------- a turn: a question and its panels

class Turn {
  constructor(text, chosen) {
    this.question = text;
    this.root = fromTemplate("turn-template");
    this.root.querySelector(".asked").textContent = text;
    this.panels = chosen.map((model) => new Panel(this, model));
    this.root.querySelector(".panels").append(...this.panels.map((panel) => panel.root));
  }

  panelSettled() {
    if (!this.panels.every((panel) => panel.settled)) return;
    const gists = new Set(this.panels.map((panel) => panel.gist()).filter(Boolean));
    this.root.querySelector(".outcome").textContent = [...gists].join(" / ");
    this.compare();
  }

  /** Mark what differs between two answers and say it in one line. */
  compare() {
    const [a, b] = this.panels;
    if (!b) return;
    const line = this.root.querySelector(".comparison");
    const done = [a, b].every((panel) => panel.settled && panel.root.dataset.state === "done");
    line.hidden = !done;
    if (!done) return;
    const differences = a.record && b.record ? markRecords(a, b) : markWords(a, b);
    const plural = differences === 1 ? "one place" : `${differences} places`;
    line.textContent = !differences ? "Both versions agree." : differences < 0 ? "The answers differ." : `The answers differ in ${plural}.`;
  }
}

function markRecords(a, b) {
  const keys = [...new Set([...Object.keys(a.record), ...Object.keys(b.record)])];
  const text = (panel, key) => (key in panel.record ? JSON.stringify(panel.record[key]) : undefined);
  const differing = keys.filter((key) => text(a, key) !== text(b, key));
  for (const panel of [a, b]) {
    for (const key of differing) markKey(panel, key);
    alignRows(panel, keys);
  }
  return differing.length;
}

function markKey(panel, key) {
  const slots = panel.body.querySelector(".slots");
  if (!slots) return; // its raw JSON is shown
  const title = key === panel.labelKey ? panel.body.querySelector(".card-title") : null;
  let marked = title ?? Array.from(slots.children).find((row) => row.dataset.key === key);
  if (!marked) {
    marked = slotRow(key);
    marked.classList.add("absent");
    marked.lastChild.textContent = "not given";
    slots.append(marked);
  }
  if (marked.classList.contains("differs")) return;
  marked.classList.add("differs");
  (title ?? marked.lastChild).append(element("span", "unseen", " (differs)"));
}

/** Put the rows of both cards into one order, so that the eye can go across. */
function alignRows(panel, keys) {
  const slots = panel.body.querySelector(".slots");
  const order = (row) => keys.indexOf(row.dataset.key);
  slots?.append(...Array.from(slots.children).sort((one, two) => order(one) - order(two)));
}

/** Mark the words that only one of two texts has. Returns how many stretches differ, -1 for texts too long. */
function markWords(a, b) {
  const [one, two] = [a, b].map((panel) => panel.result.text);
  if (one === two) return 0;
  const words = [one, two].map((text) => text.match(/\s+|[^\s]+/g) ?? []);
  if (a.record || b.record || words.some((list) => list.length > MAX_DIFF_WORDS)) return -1;
  const kept = commonWords(words[0], words[1]);
  const stretches = [a, b].map((panel, side) => drawMarked(panel, words[side], kept[side]));
  return Math.max(...stretches);
}

/** The longest common subsequence of two lists, as one set of indices for each. */
function commonWords(a, b) {
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const kept = [new Set(), new Set()];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) kept[0].add(i++), kept[1].add(j++);
    else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return kept;
}

function drawMarked(panel, words, kept) {
  const paragraph = panel.body.querySelector(".plain");
  if (!paragraph) return 1;
  paragraph.replaceChildren();
  let stretches = 0;
  for (let i = 0; i < words.length; ) {
    const from = i;
    const common = kept.has(i);
    while (i < words.length && kept.has(i) === common) i++;
    const text = words.slice(from, i).join("");
    paragraph.append(common ? text : element("mark", "", text));
    if (!common) stretches++;
  }
  return stretches;
}

// ---------------------------------------------------------------- versions, keys, the question box

const aliasOf = (model) => (model.perennial?.alias ? humane(model.perennial.alias) : "Version");
const nameOf = (model) => `${aliasOf(model).toLowerCase()} ${model.perennial?.version ?? model.id}`;
const labelOf = (model) => [aliasOf(model), model.perennial?.version ?? model.id, model.perennial?.engine].filter(Boolean).join(" · ");

/** The name of this very version: under the model's bare name a trial may answer with the other one. */
const pinned = (model) => (model.perennial?.version ? `${model.id.split(":")[0]}:${model.perennial.version}` : model.id);

/** Each version once, though it may be listed both by its alias and by its hash. The champion comes first. */
function distinct(listed) {
  const seen = new Map();
  const rank = (model) => ({ champion: 0, challenger: 1 })[model.perennial?.alias] ?? 2;
  for (const model of [...listed].sort((a, b) => rank(a) - rank(b))) {
    const key = `${model.id.split(":")[0]} ${model.perennial?.version ?? model.id}`;
    if (!seen.has(key)) seen.set(key, model);
  }
  return [...seen.values()];
}

async function loadModels() {
  const notice = byId("unreachable");
  try {
    models = distinct((await (await call("v1/models")).json()).data ?? []);
    if (!models.length) throw new Trouble("down", "It serves no model yet.");
    notice.hidden = true;
  } catch (error) {
    if (error.kind === "key") return askForKey(loadModels);
    notice.querySelector(".trouble-title").textContent = TITLES[error.kind] ?? TITLES.down;
    notice.querySelector(".trouble-text").textContent = error.message;
    notice.hidden = false;
    countDown(notice.querySelector("button"), error.waitS ?? 0);
    return;
  } finally {
    showBusy();
  }
  showModels();
}

function showModels() {
  const several = models.length > 1;
  for (const [select, first] of [[left, 0], [right, 1]]) {
    const before = select.value;
    select.replaceChildren(...models.map((model) => new Option(labelOf(model), model.id)));
    select.value = models.some((model) => model.id === before) ? before : (models[first] ?? models[0]).id;
  }
  byId("choice").hidden = !several;
  byId("model").textContent = several ? models[0].id.split(":")[0] : `${models[0].id.split(":")[0]} · ${labelOf(models[0])}`;
  showSides();
}

function showSides() {
  const two = sideBySide.checked && models.length > 1;
  byId("right-pick").hidden = !two;
  byId("left-name").textContent = two ? "Left" : "Version";
  document.body.classList.toggle("wide", two);
  showExamples();
}

function showExamples() {
  const examples = chosenModels()[0]?.perennial?.examples ?? [];
  byId("examples").replaceChildren(
    ...examples.map((text) => {
      const item = element("li");
      const button = item.appendChild(element("button", "", text));
      button.type = "button";
      button.onclick = () => ask(text);
      return item;
    }),
  );
  byId("examples").hidden = !examples.length;
}

function chosenModels() {
  const selects = sideBySide.checked && models.length > 1 ? [left, right] : [left];
  return selects.map((select) => models.find((model) => model.id === select.value)).filter(Boolean);
}

function showBusy() {
  const busy = running.size > 0;
  // A button that vanishes under the focus would leave the keyboard nowhere.
  if (!busy && document.activeElement === stopButton) question.focus({ preventScroll: true });
  stopButton.hidden = !busy;
  for (const button of [send, ...document.querySelectorAll("#examples button")]) button.ariaDisabled = String(busy || !models.length);
}

function ask(text) {
  const chosen = chosenModels();
  if (running.size || !chosen.length) return;
  if (!text.trim()) return question.focus();
  const turn = new Turn(text.trim(), chosen);
  keepCurrent();
  byId("current").append(turn.root);
  tell(chosen.length > 1 ? "Asking both versions." : "Asking.");
  for (const panel of turn.panels) panel.ask();
  lastAsked = turn.question;
  question.value = "";
}

/** Move the turn on show to the earlier ones, closed unless something is being written in it. */
function keepCurrent() {
  const turn = byId("current").firstElementChild;
  if (!turn) return;
  turn.open = Boolean(turn.querySelector(".editor:not([hidden])"));
  const item = element("li");
  item.append(turn);
  byId("earlier").querySelector("ol").prepend(item);
  byId("earlier").hidden = false;
}

function stop() {
  if (!running.size) return;
  for (const controller of running) controller.abort();
  tell("Stopped.");
}

function askForKey(again) {
  const hint = byId("key-hint");
  if (sessionStorage.getItem(KEY)) {
    hint.textContent = "The service did not accept this key. Check it, and give it once more.";
    hint.dataset.wrong = "";
    sessionStorage.removeItem(KEY);
  }
  waitingForKey.push(again);
  byId("key-form").hidden = false;
  byId("key").focus();
}

byId("key-form").onsubmit = (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!key) return;
  sessionStorage.setItem(KEY, key);
  byId("key").value = "";
  byId("key-form").hidden = true;
  question.focus();
  const again = waitingForKey;
  waitingForKey = [];
  for (const retry of again) retry();
};
byId("ask").onsubmit = (event) => {
  event.preventDefault();
  ask(question.value);
};
question.onkeydown = (event) => {
  if (event.key === "ArrowUp" && !question.value) {
    event.preventDefault();
    question.value = lastAsked;
  }
  // While an input method composes, Enter accepts its proposal.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(question.value);
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
stopButton.onclick = stop;
sideBySide.onchange = showSides;
left.onchange = showExamples;
byId("unreachable").querySelector("button").onclick = (event) => {
  if (event.currentTarget.ariaDisabled !== "true") loadModels();
};

showBusy();
question.focus({ preventScroll: true });
loadModels();
