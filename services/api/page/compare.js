// Mark the differences between two answers.

import { element, slotRow } from "./draw.js";

const MAX_DIFF_WORDS = 600; // the time of a diff grows with the product of both lengths

export function markRecords(a, b) {
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
  if (!slots) return; // the raw JSON is shown
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

/** Sort the rows of a card, so that equal keys are side by side. */
function alignRows(panel, keys) {
  const slots = panel.body.querySelector(".slots");
  const order = (row) => keys.indexOf(row.dataset.key);
  slots?.append(...Array.from(slots.children).sort((one, two) => order(one) - order(two)));
}

/** Mark the words that only one of two texts has; return the number of differing runs, -1 for long texts. */
export function markWords(a, b) {
  const [one, two] = [a, b].map((panel) => panel.result.text);
  if (one === two) return 0;
  const words = [one, two].map((text) => text.match(/\s+|[^\s]+/g) ?? []);
  if (a.record || b.record || words.some((list) => list.length > MAX_DIFF_WORDS)) return -1;
  const kept = commonWords(words[0], words[1]);
  const runs = [a, b].map((panel, side) => drawMarked(panel, words[side], kept[side]));
  return Math.max(...runs);
}

/** Return the longest common subsequence of two lists, as a set of indices for each. */
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
  let runs = 0;
  for (let i = 0; i < words.length; ) {
    const from = i;
    const common = kept.has(i);
    while (i < words.length && kept.has(i) === common) i++;
    const text = words.slice(from, i).join("");
    paragraph.append(common ? text : element("mark", "", text));
    if (!common) runs++;
  }
  return runs;
}
