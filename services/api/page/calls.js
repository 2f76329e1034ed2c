// Draw the thoughts and the calls of an answer, and read the results that are typed in.

import { element } from "./draw.js";
import { findFault, membersOf } from "./tools.js";
import { isRecord, parse, parseSoFar } from "./text.js";

let count = 0; // of results, for ids

export function drawThoughts(body, text) {
  let thoughts = body.querySelector(".thoughts");
  if (!text) return thoughts?.remove();
  if (!thoughts) {
    thoughts = element("details", "thoughts");
    thoughts.append(element("summary", "", "Thoughts"), element("p", "thought-text"));
    body.prepend(thoughts);
  }
  thoughts.lastChild.textContent = text;
}

/** Draw each call as a card; existing cards stay, so that a growing call does not flicker. */
export function drawCalls(body, calls, tools, isWhole) {
  let list = body.querySelector(".calls");
  if (!calls.length) return list?.remove();
  if (!list) body.append((list = element("ol", "calls")));
  calls.forEach((call, place) => fillCall(list.children[place] ?? list.appendChild(makeCall()), call, tools, isWhole));
}

function makeCall() {
  const item = element("li", "call");
  const head = element("div", "call-head");
  head.append(element("h4", "call-name"), element("code", "call-id"));
  item.append(head, element("p", "fault"), element("dl", "slots"));
  return item;
}

function fillCall(item, call, tools, isWhole) {
  const [name, id] = item.firstChild.children;
  name.textContent = call.name || "…";
  id.textContent = call.id ?? "";
  const fault = isWhole ? findFault(call, tools) : "";
  item.querySelector(".fault").textContent = fault;
  item.querySelector(".fault").hidden = !fault;
  const isBroken = isWhole && !isRecord(parse(call.arguments || "{}"));
  const rows = isBroken ? [["as written", call.arguments]] : argumentsOf(call, isWhole);
  const slots = item.querySelector(".slots");
  slots.classList.toggle("broken", isBroken);
  slots.hidden = !rows.length;
  slots.replaceChildren(...rows.map(([key, text]) => {
    const row = element("div", "slot");
    row.append(element("dt", "", key), element("dd", "", text));
    return row;
  }));
}

function argumentsOf(call, isWhole) {
  const members = isWhole ? membersOf(call.arguments || "{}") : Object.entries(parseSoFar(call.arguments) ?? {}).map(([key, value]) => [key, JSON.stringify(value)]);
  return members.map(([key, text]) => [key, showArgument(text)]);
}

/** A string without its quotes, unless it would look like another value: "30" is not 30. */
function showArgument(text) {
  const value = parse(text);
  return typeof value === "string" && value.trim() && parse(value) === undefined ? value : text;
}

/** Ask for the result of each call; `send` is called with the messages of the role tool. */
export function askResults(body, calls, send) {
  const list = body.querySelector(".calls");
  const fields = calls.map((call, place) => {
    const label = element("label", "result", `Result of ${call.name}`);
    const field = label.appendChild(element("textarea"));
    field.rows = 1;
    field.spellcheck = false;
    const wrong = element("p", "wrong");
    wrong.setAttribute("role", "alert");
    wrong.id = `result-wrong-${++count}`;
    wrong.hidden = true;
    field.setAttribute("aria-describedby", wrong.id);
    list.children[place].append(label, wrong);
    return field;
  });
  const foot = element("div", "line results-foot");
  const button = foot.appendChild(element("button", "primary", calls.length > 1 ? "Send the results" : "Send the result"));
  button.type = "button";
  list.after(foot);
  const sendAll = () => {
    if (fields[0].readOnly) return;
    for (const field of fields) showMissing(field);
    const missing = fields.find((field) => !field.value.trim());
    if (missing) return missing.focus();
    const messages = calls.map((call, place) => ({ role: "tool", tool_call_id: call.id, content: fields[place].value }));
    closeResults(body);
    send(messages);
  };
  button.onclick = sendAll;
  for (const field of fields) {
    field.onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) sendAll();
    };
  }
}

function showMissing(field) {
  const isMissing = !field.value.trim();
  const wrong = field.closest("li").querySelector(".wrong");
  wrong.textContent = isMissing ? "Type what the tool returned." : "";
  wrong.hidden = !isMissing;
  field.ariaInvalid = String(isMissing);
}

/** Take no more results: what was typed stays to be read, an empty field goes. */
export function closeResults(body) {
  body.querySelector(".results-foot")?.remove();
  for (const field of body.querySelectorAll(".result textarea")) {
    field.readOnly = true;
    if (!field.value.trim()) field.closest(".result").remove();
  }
}
