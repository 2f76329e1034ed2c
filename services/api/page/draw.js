// DOM elements, and the drawing of an answer. Model output reaches the page through textContent only.

import { humane, shown } from "./text.js";

export const byId = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export const fromTemplate = (id) => byId(id).content.firstElementChild.cloneNode(true);
/** Announce a text to screen readers. */
export const announce = (text) => (byId("status").textContent = text);

/** Draw a record as a card into `body`; existing elements stay, so that a growing answer does not flicker. */
export function drawCard(body, record, labelKey) {
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

export function slotRow(key) {
  const row = element("div", "slot");
  row.dataset.key = key;
  row.append(element("dt", "", humane(key)), element("dd"));
  return row;
}

export function drawWaiting(body) {
  const dots = element("div", "waiting");
  dots.append(element("i"), element("i"), element("i"), element("span", "unseen", "Waiting for the answer"));
  body.replaceChildren(dots);
}

export function drawText(body, text, className = "plain") {
  const tag = className === "code" ? "pre" : "p";
  if (body.firstElementChild?.className !== className) body.replaceChildren(element(tag, className));
  body.firstElementChild.textContent = text;
}
