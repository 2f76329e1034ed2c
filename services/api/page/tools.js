// Tools that a request offers, and calls of them as text.

import { compact, isRecord, jsonProblem, parse } from "./text.js";

const FORM = '[{"type": "function", "function": {"name": "…", "parameters": {…}}}]';

/** Read the typed tools; an Error tells what is wrong with them. The service checks the schemas. */
export function readTools(text) {
  if (!text.trim()) return [];
  const tools = parse(text);
  if (tools === undefined) throw new Error(`This is not valid JSON: ${jsonProblem(text)}`);
  if (!Array.isArray(tools)) throw new Error(`Write the tools as a list: ${FORM}`);
  tools.forEach((tool, place) => {
    if (typeof tool?.function?.name !== "string") throw new Error(`Tool ${place + 1} has no function with a name. The form is ${FORM}`);
    const { parameters } = tool.function;
    if (parameters !== undefined && parameters !== null && !isRecord(parameters)) throw new Error(`The parameters of ${tool.function.name} are no JSON schema.`);
  });
  return tools;
}

export const nameOfTool = (tool) => tool.function.name;
export const findTool = (tools, name) => tools.find((tool) => nameOfTool(tool) === name);

/** What is wrong with a call that was written completely; empty if nothing is. */
export function findFault(call, tools) {
  if (!call.id || !call.name) return "This call is malformed: it has no name.";
  if (!isRecord(parse(call.arguments || "{}"))) return "This call is malformed: its arguments are not a JSON object.";
  return findTool(tools, call.name) ? "" : "No tool has this name.";
}

/** The members of a JSON object as pairs of key and JSON text, so that 1.0 stays 1.0 and no digit of a number is lost. */
export function membersOf(text) {
  if (!isRecord(parse(text))) return [];
  const inner = text.trim().slice(1, -1);
  const parts = [""];
  let depth = 0;
  for (const [token] of inner.matchAll(/"(?:[^"\\]|\\.)*"|[^"]/gs)) {
    if ("{[".includes(token)) depth++;
    if ("}]".includes(token)) depth--;
    if (!depth && (token === "," || token === ":")) parts.push("");
    else parts[parts.length - 1] += token;
  }
  const members = [];
  for (let i = 0; i + 1 < parts.length; i += 2) members.push([JSON.parse(parts[i]), parts[i + 1].trim()]);
  return members;
}

/** An answer as the text that is judged and learned: its content, or the calls without their ids. */
export function formatAnswer(content, calls) {
  if (!calls.length) return content;
  const text = content ? `"content":${JSON.stringify(content)},` : "";
  const written = calls.map((call) => `{"name":${JSON.stringify(call.name)},"arguments":${compact(call.arguments || "{}")}}`);
  return `{${text}"tool_calls":[${written.join(",")}]}`;
}

/** A text that is equal for answers with the same text and calls, in any order of arguments. */
export function canonical({ text, calls }) {
  const sorted = (_, value) => (isRecord(value) ? Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1))) : value);
  const written = calls.map((call) => JSON.stringify([call.name, parse(call.arguments || "{}") ?? call.arguments], sorted));
  return JSON.stringify([text.trim(), written.sort()]);
}

/** An answer as a message of the conversation. */
export function toMessage({ text, reasoning, calls }) {
  const message = { role: "assistant", content: text || null };
  if (reasoning) message.reasoning_content = reasoning;
  if (calls.length) message.tool_calls = calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  return message;
}
