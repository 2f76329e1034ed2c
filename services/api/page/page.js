// The playground: questions to one or two versions, streamed, with calls of tools, thumbs and corrections.

import { askResults, closeResults, drawCalls, drawThoughts } from "./calls.js";
import { markRecords, markWords } from "./compare.js";
import { CallsForm } from "./correct.js";
import { announce, byId, drawCard, drawText, drawWaiting, element, fromTemplate } from "./draw.js";
import { call, KEY, RequestError, RETRYABLE, streamAnswer, TITLES } from "./service.js";
import { canonical, findFault, formatAnswer, nameOfTool, readTools, toMessage } from "./tools.js";
import { compact, humane, humaneTime, formatWait, indented, isRecord, jsonProblem, looksLikeJson, parse, parseSoFar } from "./text.js";

const [question, send, stopButton] = ["question", "send", "stop"].map(byId);
const [left, right, sideBySide] = ["left", "right", "side-by-side"].map(byId);
const [toolsText, toolChoice] = ["tools-text", "tool-choice"].map(byId);
let offered = ""; // the text of the tools that the page itself put in

let models = [];
const running = new Set(); // an AbortController for each answer being streamed
let lastAsked = "";
let waitingForKey = []; // what to retry once a key is entered
let conversation = startConversation();

// ---------------------------------------------------------------- a panel: the answer of one version

class Panel {
  /** `request` has the messages that are sent, and the tools with their choice. */
  constructor(turn, model, request) {
    Object.assign(this, { turn, model, request });
    this.tools = request.tools;
    this.labelKey = model.perennial?.task?.label_key ?? null;
    this.root = fromTemplate("panel-template");
    this.part = (selector) => this.root.querySelector(selector);
    this.body = this.part(".answer");
    this.part(".alias").textContent = aliasOf(model);
    this.part(".version").textContent = model.perennial?.version ?? model.id;
    this.root.setAttribute("aria-label", `Answer of ${nameOf(model)}`);
    this.part(".feedback").setAttribute("aria-label", `Feedback on the answer of ${nameOf(model)}`);
    this.part(".raw-toggle").onclick = () => this.showRaw(this.part(".raw-toggle").ariaPressed !== "true");
    this.part(".problem button").onclick = () => this.retry();
    this.wireFeedback();
  }

  async ask() {
    this.result = { text: "", reasoning: "", calls: [], requestId: null, usage: null, finish: null };
    this.record = undefined;
    if (this.tools.length) showToolsProblem("");
    this.settled = false;
    this.root.dataset.state = "running";
    this.body.ariaBusy = "true";
    for (const name of [".problem", ".metrics", ".feedback", ".editor", ".raw-toggle"]) this.part(name).hidden = true;
    drawWaiting(this.body);
    const controller = new AbortController();
    running.add(controller);
    showBusy();
    try {
      await streamAnswer(this.model, this.request, controller.signal, this.result, () => this.scheduleDraw());
      this.finish();
    } catch (error) {
      if (error.name === "AbortError") this.finishStopped();
      else this.fail(error instanceof RequestError ? error : new RequestError("other", String(error.message ?? error)));
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

  /** The place of the answer's text, after its thoughts and before its calls. */
  spoken() {
    let place = this.body.querySelector(".spoken");
    if (!place) this.body.replaceChildren((place = element("div", "spoken")));
    return place;
  }

  drawSoFar() {
    const { text, reasoning, calls } = this.result;
    if (!text.trim() && !reasoning && !calls.length) return;
    const value = parseSoFar(text);
    if (!looksLikeJson(text) && text.trim()) drawText(this.spoken(), text);
    // Until the first member is complete, keep what is drawn.
    else if (isRecord(value) && Object.keys(value).length) drawCard(this.spoken(), value, this.labelKey);
    if (reasoning || calls.length) this.drawCalls(false);
  }

  drawCalls(isWhole) {
    this.spoken();
    drawThoughts(this.body, this.result.reasoning);
    drawCalls(this.body, this.result.calls, this.tools, isWhole);
  }

  draw() {
    const { text, calls } = this.result;
    const value = looksLikeJson(text) ? parse(text) : undefined;
    this.record = isRecord(value) && Object.keys(value).length ? value : undefined;
    this.part(".raw-toggle").hidden = !this.record;
    const place = this.spoken();
    if (this.record) {
      place.replaceChildren();
      drawCard(place, this.record, this.labelKey);
    } else if (text) drawText(place, value === undefined ? text : indented(text), value === undefined ? "plain" : "code");
    else place.replaceChildren(...(calls.length ? [] : [element("p", "note", "The answer is empty.")]));
    this.drawCalls(true);
  }

  finish() {
    this.settled = true;
    this.root.dataset.state = "done";
    this.draw();
    const { text, calls, finish } = this.result;
    if (this.labelKey && !calls.length && parse(text) === undefined) this.addNote("This is not valid JSON.");
    if (finish === "length") this.addNote("Cut off at the maximum length.");
    this.showMetrics();
    this.part(".feedback").hidden = !this.result.requestId;
    this.resetFeedback();
    this.goOn();
  }

  /** Keep the answer in the conversation, and ask for the results of its calls. */
  goOn() {
    const { text, calls } = this.result;
    if (!this.turn.isOpen || !this.turn.isConversation) return;
    if ((!text.trim() && !calls.length) || calls.some((call) => findFault(call, this.tools))) return this.addNote("The conversation goes on without this answer.");
    const messages = [...this.request.messages, toMessage(this.result)];
    conversation.messages.set(this.model.id, messages);
    if (!calls.length) return;
    for (const [place, item] of this.body.querySelectorAll(".call").entries()) {
      const button = item.firstChild.appendChild(element("button", "quiet", "Correct this call"));
      button.type = "button";
      button.onclick = () => this.showEditor(true, false, place);
      button.hidden = !this.result.requestId;
    }
    askResults(this.body, calls, (results) => this.turn.sendResults(this, [...messages, ...results]));
  }

  /** Take neither results nor another try: the conversation has moved on. */
  close() {
    closeResults(this.body);
    if (this.turn.isConversation) this.part(".problem button").hidden = true;
  }

  finishStopped() {
    this.settled = true;
    this.root.dataset.state = "stopped";
    const { text, reasoning, calls } = this.result;
    if (text || calls.length) this.draw();
    else this.body.replaceChildren();
    if (!text && !calls.length && reasoning) this.drawCalls(true);
    this.addNote("Stopped.");
  }

  addNote(text) {
    this.body.append(element("p", "note", text));
  }

  showMetrics() {
    const { firstMs, lastMs, usage } = this.result;
    const count = usage?.completion_tokens ?? 0;
    const streamedS = (lastMs - firstMs) / 1000;
    this.part(".first").textContent = firstMs === undefined ? "–" : humaneTime(firstMs);
    // The first token ends the wait, so the speed is that of the others.
    this.part(".speed").textContent = count > 2 && streamedS > 0 ? `${Math.round((count - 1) / streamedS)} tokens/s` : "–";
    this.part(".tokens").textContent = usage ? `${usage.prompt_tokens} in, ${count} out` : "–";
    this.part(".metrics").hidden = false;
  }

  showRaw(raw) {
    const toggle = this.part(".raw-toggle");
    toggle.ariaPressed = String(raw);
    if (raw) drawText(this.spoken(), this.result.text, "code");
    else {
      this.spoken().replaceChildren();
      drawCard(this.spoken(), this.record, this.labelKey);
      this.turn.compare();
    }
  }

  /** A short form of the answer, for the list of earlier questions. */
  summary() {
    if (this.root.dataset.state === "failed") return "no answer";
    if (this.root.dataset.state === "stopped") return "stopped";
    const label = this.record?.[this.labelKey];
    if (typeof label === "string") return humane(label);
    return this.result.text.trim() || this.result.calls.map((call) => call.name).join(", ");
  }

  // -------------------------------------------------------------- errors

  fail(problem) {
    this.settled = true;
    this.root.dataset.state = "failed";
    // An answer that the guard rejected is not shown, not even in part.
    if ((this.result.text || this.result.calls.length) && problem.kind !== "guard") this.draw();
    else this.body.replaceChildren();
    const box = this.part(".problem");
    this.part(".problem-title").textContent = TITLES[problem.kind];
    const text = this.part(".problem-text");
    text.textContent = problem.message;
    if (problem.reason && !problem.message.includes(problem.reason)) text.append(" Reason: ", element("code", "", problem.reason));
    const retry = this.part(".problem button");
    retry.hidden = !RETRYABLE.includes(problem.kind);
    box.hidden = false;
    if (!retry.hidden) countDown(retry, problem.waitS);
    if (problem.kind === "key") askForKey(() => this.ask());
    if (problem.kind === "gone") loadModels();
    if (/^tools?(_choice)?\b/.test(problem.param ?? "")) showToolsProblem(problem.message);
  }

  retry() {
    if (this.part(".problem button").ariaDisabled === "true") return;
    question.focus({ preventScroll: true });
    this.ask();
  }

  // -------------------------------------------------------------- feedback

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
    this.wrong = this.part(".editor > .wrong"); // each field of a call has one of its own
    this.wrong.id = `wrong-${++Panel.count}`;
    this.part(".correction").setAttribute("aria-describedby", this.wrong.id);
    const addCall = this.part(".add-call");
    addCall.hidden = !this.tools.length;
    if (!this.tools.length) return;
    this.callsForm = new CallsForm(this.part(".right-calls"), this.tools);
    addCall.onclick = () => this.callsForm.add();
    this.part(".correction-name").textContent = "Text of the answer";
    this.part(".correction").rows = 2;
  }

  resetFeedback() {
    for (const button of this.root.querySelectorAll(".thumb")) button.ariaPressed = "false";
    const { text } = this.result;
    this.part(".correction").value = parse(text) === undefined ? text : indented(text);
    this.part(".correction").classList.toggle("prose", !this.labelKey);
    this.callsForm?.show(this.result.calls.filter((call) => isRecord(parse(call.arguments || "{}"))));
    this.part(".comment").value = "";
    this.showMessage("");
  }

  showEditor(open, focusBack = false, place = 0) {
    this.part(".editor").hidden = !open;
    this.part(".better").ariaExpanded = String(open);
    this.showProblem("");
    if (open && this.callsForm?.calls.length) this.callsForm.focus(place);
    else if (open) this.part(".correction").focus();
    else if (focusBack) this.part(".better").focus();
  }

  showMessage(text, wrong = false) {
    const message = this.part(".message");
    message.textContent = text;
    message.toggleAttribute("data-wrong", wrong);
  }

  showProblem(text) {
    this.wrong.textContent = text;
    this.wrong.hidden = !text;
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
    if (this.labelKey && (typed || !this.callsForm?.calls.length) && parse(typed) === undefined) {
      this.showProblem(`This is not valid JSON: ${jsonProblem(typed)}`);
      return this.part(".correction").focus();
    }
    const calls = this.callsForm ? this.callsForm.read() : [];
    if (!calls) return;
    const tidy = (text) => (parse(text) === undefined ? text.trim() : compact(text.trim()));
    const right = formatAnswer(tidy(typed), calls);
    const correction = right && right !== formatAnswer(tidy(this.result.text), this.result.calls) ? right : null;
    if (!correction && !comment) {
      this.showProblem("Change the answer or add a comment first.");
      return this.part(".correction").focus();
    }
    // The thumb was sent by its own button already.
    if (await this.sendFeedback({ thumb: null, correction, comment })) this.showEditor(false, true);
  }

  async sendFeedback(feedback) {
    this.sending = true;
    this.showMessage("");
    try {
      const body = JSON.stringify({ request_id: this.result.requestId, ...feedback });
      await call("v1/feedback", { method: "POST", body });
      this.showMessage("Saved, thank you");
      return true;
    } catch (error) {
      if (error.kind === "key") askForKey(() => {});
      // What the service finds wrong with a correction is told in the form.
      if (error.param === "correction" && !this.part(".editor").hidden) this.showProblem(error.message);
      this.showMessage(`Not saved. ${error.message}`, true);
      return false;
    } finally {
      this.sending = false;
    }
  }
}
Panel.count = 0;

/** Disable a button for some seconds, with a countdown in its label. */
function countDown(button, seconds) {
  const until = Date.now() + seconds * 1000;
  clearInterval(button.timer);
  const tick = () => {
    const leftS = Math.ceil((until - Date.now()) / 1000);
    button.ariaDisabled = String(leftS > 0);
    button.textContent = leftS > 0 ? `Try again in ${formatWait(leftS)}` : "Try again";
    if (leftS > 0) return;
    clearInterval(button.timer);
    if (seconds) announce("You can try again now.");
  };
  button.timer = setInterval(tick, 250);
  tick();
}

// ---------------------------------------------------------------- a turn: a question and its panels

class Turn {
  /** `requestFor` makes the request to a model. */
  constructor(text, chosen, isConversation, requestFor) {
    Object.assign(this, { question: text, isConversation, isOpen: true });
    this.root = fromTemplate("turn-template");
    this.root.querySelector(".asked").textContent = text;
    this.columns = chosen.map((model) => {
      const root = this.root.querySelector(".panels").appendChild(element("div", "column"));
      return { root, panels: [] };
    });
    chosen.forEach((model, side) => this.addPanel(this.columns[side], model, requestFor(model)));
  }

  addPanel(column, model, request) {
    const panel = new Panel(this, model, request);
    column.panels.push(panel);
    column.root.append(panel.root);
    return panel;
  }

  get panels() {
    return this.columns.flatMap((column) => column.panels);
  }

  /** Ask for what follows on the results of a panel's calls; a choice of tools is for the question alone. */
  sendResults(panel, messages) {
    const column = this.columns.find((one) => one.panels.includes(panel));
    const next = this.addPanel(column, panel.model, { ...panel.request, messages, choice: panel.request.choice === "none" ? "none" : "auto" });
    announce("Waiting for the answer.");
    next.ask();
    next.root.scrollIntoView({ block: "nearest" });
    question.focus({ preventScroll: true });
  }

  close() {
    this.isOpen = false;
    for (const panel of this.panels) panel.close();
  }

  panelSettled() {
    if (!this.panels.every((panel) => panel.settled)) return;
    const last = this.columns.map((column) => column.panels.at(-1));
    const summarys = new Set(last.map((panel) => panel.summary()).filter(Boolean));
    this.root.querySelector(".outcome").textContent = [...summarys].join(" / ");
    this.compare();
  }

  /** Mark the differences between two answers, and summarise them in one line. */
  compare() {
    if (this.columns.length < 2) return;
    const [a, b] = this.columns.map((column) => column.panels[0]);
    const line = this.root.querySelector(".comparison");
    const done = [a, b].every((panel) => panel.settled && panel.root.dataset.state === "done");
    line.hidden = !done;
    if (!done) return;
    const differences = countDifferences(a, b);
    const plural = differences === 1 ? "one place" : `${differences} places`;
    line.textContent = !differences ? "Both answers are the same." : differences < 0 ? "The answers differ." : `The answers differ in ${plural}.`;
  }
}

/** Mark the differences of two answers and count them; -1: they differ. */
function countDifferences(a, b) {
  if ([a, b].some((panel) => panel.result.calls.length)) return canonical(a.result) === canonical(b.result) ? 0 : -1;
  return a.record && b.record ? markRecords(a, b) : markWords(a, b);
}

// ---------------------------------------------------------------- the conversation and its tools

/** The messages so far, by model: each version goes on with its own answers. */
function startConversation() {
  return { id: `${Date.now().toString(36)}`, messages: new Map(), turns: [] };
}

/** A task of single questions has no history, unless tools are given. */
const isConversational = (tools) => tools.length > 0 || chosenModels().some((model) => ["tools", "chat"].includes(model.perennial?.task?.kind));

function startAgain() {
  if (running.size) return;
  keepCurrent();
  for (const turn of conversation.turns) turn.close();
  conversation = startConversation();
  placeComposer();
}

/** The question follows the conversation; without one it is on top. */
function placeComposer() {
  const form = byId("ask");
  const goesOn = conversation.turns.length > 0;
  byId("again").hidden = !goesOn;
  question.placeholder = goesOn ? "Go on with the conversation…" : "Ask as your users would…";
  const before = goesOn ? byId("current") : byId("unreachable");
  if (form.previousElementSibling === before) return;
  const hadFocus = form.contains(document.activeElement);
  before.after(form);
  if (hadFocus) question.focus({ preventScroll: true });
}

/** The typed tools; undefined if they are wrong, which is told at their field. */
function readTypedTools() {
  try {
    const tools = readTools(toolsText.value);
    showToolsProblem("");
    return tools;
  } catch (error) {
    showToolsProblem(error.message);
    toolsText.focus();
    return undefined;
  }
}

function showToolsProblem(text) {
  byId("tools-wrong").textContent = text;
  byId("tools-wrong").hidden = !text;
  toolsText.ariaInvalid = String(Boolean(text));
  if (text) byId("tools").open = true;
}

/** Count the tools, and list them as choices. */
function showTools() {
  let tools = [];
  try {
    tools = readTools(toolsText.value);
  } catch {} // told when they are sent, not while they are typed
  byId("tools-count").textContent = tools.length ? `${tools.length} given` : "none given";
  const before = toolChoice.value;
  const fixed = Array.from(toolChoice.options).slice(0, 3);
  toolChoice.replaceChildren(...fixed, ...tools.map((tool) => new Option(`${nameOfTool(tool)} alone`, `tool ${nameOfTool(tool)}`)));
  toolChoice.value = before;
  if (toolChoice.selectedIndex < 0) toolChoice.value = "auto";
  byId("own-tools").hidden = !ownTools() || toolsText.value === ownTools();
}

/** The tools that the model was trained with, as text; empty where the service does not know them. */
function ownTools() {
  const tools = chosenModels()[0]?.perennial?.tools ?? [];
  return tools.length ? JSON.stringify(tools, null, 2) : "";
}

/** Offer the model's own tools, unless a person has typed others. */
function offerTools() {
  if (toolsText.value === offered) toolsText.value = ownTools();
  offered = ownTools();
  showTools();
}

function readChoice() {
  const { value } = toolChoice;
  return value.startsWith("tool ") ? { type: "function", function: { name: value.slice(5) } } : value;
}

// ---------------------------------------------------------------- versions, keys, the question box

const aliasOf = (model) => (model.perennial?.alias ? humane(model.perennial.alias) : "Version");
const nameOf = (model) => `${aliasOf(model).toLowerCase()} ${model.perennial?.version ?? model.id}`;
const labelOf = (model) => [aliasOf(model), model.perennial?.version ?? model.id, model.perennial?.engine].filter(Boolean).join(" · ");

/** List each version once, the champion first. */
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
    if (!models.length) throw new RequestError("down", "No model is served yet.");
    notice.hidden = true;
  } catch (error) {
    if (error.kind === "key") return askForKey(loadModels);
    notice.querySelector(".problem-title").textContent = TITLES[error.kind] ?? TITLES.down;
    notice.querySelector(".problem-text").textContent = error.message;
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
  showVersion();
}

/** Show what depends on the chosen versions; another version begins a conversation of its own. */
function showVersion() {
  const chosen = chosenModels().map((model) => model.id).join(" ");
  if (conversation.turns.length && chosen !== conversation.models) startAgain();
  showExamples();
  offerTools();
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
  // A focused button that disappears would lose the keyboard focus.
  if (!busy && document.activeElement === stopButton) question.focus({ preventScroll: true });
  stopButton.hidden = !busy;
  for (const button of [send, ...document.querySelectorAll("#examples button")]) button.ariaDisabled = String(busy || !models.length);
}

function ask(text) {
  const chosen = chosenModels();
  if (running.size || !chosen.length) return;
  if (!text.trim()) return question.focus();
  const tools = readTypedTools();
  if (!tools) return;
  const isConversation = isConversational(tools);
  const sent = { role: "user", content: text.trim() };
  const requestFor = (model) => {
    const before = isConversation ? (conversation.messages.get(model.id) ?? []) : [];
    return { messages: [...before, sent], tools, choice: readChoice(), session: isConversation ? conversation.id : null };
  };
  if (!isConversation) startAgain();
  for (const earlier of conversation.turns) earlier.close();
  const turn = new Turn(sent.content, chosen, isConversation, requestFor);
  if (isConversation) {
    if (!conversation.turns.length) keepCurrent();
    conversation.turns.push(turn);
    conversation.models = chosen.map((model) => model.id).join(" ");
  }
  byId("current").append(turn.root);
  placeComposer();
  announce(chosen.length > 1 ? "Waiting for both versions." : "Waiting for the answer.");
  for (const panel of turn.panels) panel.ask();
  if (isConversation) turn.root.scrollIntoView({ block: "nearest" });
  lastAsked = turn.question;
  question.value = "";
}

/** Move the current turns to the earlier ones, closed unless their editor is open. */
function keepCurrent() {
  for (const turn of [...byId("current").children]) {
    turn.open = Boolean(turn.querySelector(".editor:not([hidden])"));
    const item = element("li");
    item.append(turn);
    byId("earlier").querySelector("ol").prepend(item);
    byId("earlier").hidden = false;
  }
}

function stop() {
  if (!running.size) return;
  for (const controller of running) controller.abort();
  announce("Stopped.");
}

function askForKey(again) {
  const hint = byId("key-hint");
  if (sessionStorage.getItem(KEY)) {
    hint.textContent = "The service rejected this key. Check it and enter it again.";
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
  // While an input method is composing, Enter accepts its suggestion.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(question.value);
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
stopButton.onclick = stop;
sideBySide.onchange = showSides;
left.onchange = right.onchange = showVersion;
byId("again").onclick = () => {
  startAgain();
  question.focus();
};
toolsText.oninput = showTools;
byId("own-tools").onclick = () => {
  toolsText.value = offered = ownTools();
  showToolsProblem("");
  showTools();
  toolsText.focus();
};
byId("unreachable").querySelector("button").onclick = (event) => {
  if (event.currentTarget.ariaDisabled !== "true") loadModels();
};

showBusy();
question.focus({ preventScroll: true });
loadModels();
