// Text and JSON: parsing, also of incomplete JSON, and formatting.

/** Format an identifier for people: "HassTurnOn" → "Turn on", "start_minutes" → "Start minutes". */
export function humane(name) {
  const words = name
    .replace(/^Hass(?=[A-Z])/, "") // Home Assistant's prefix
    .replace(/([a-z0-9])([A-Z])/g, "$1 $2")
    .replace(/([A-Z]+)([A-Z][a-z])/g, "$1 $2")
    .split(/[\s_-]+/)
    .filter(Boolean)
    .map((word) => (word.length > 1 && word === word.toUpperCase() ? word : word.toLowerCase()));
  const text = words.join(" ");
  return text ? text[0].toUpperCase() + text.slice(1) : name;
}

/** Parse JSON; undefined if it is not valid. */
export function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Parse incomplete JSON: its complete members, or undefined without any. */
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

// Both work on the text, not on the parsed value, so that 1.0 stays 1.0 and keys keep their order.
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

/** Remove white space from JSON, which gives the form that the model generates. */
export function compact(text) {
  return text.replace(JSON_TOKEN, (token) => (token[0] === '"' ? token : token.replace(/\s+/g, "")));
}

export const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
export const looksLikeJson = (text) => /^\s*[{[]/.test(text);
export const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** The parser's message about text that is not JSON. */
export function jsonProblem(text) {
  try {
    JSON.parse(text);
  } catch (error) {
    return error.message;
  }
  return "";
}

export const humaneTime = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** Format a wait in hours, minutes or seconds: a quota may reset only at midnight. */
export function formatWait(seconds) {
  if (seconds < 120) return `${seconds} s`;
  return seconds < 7200 ? `${Math.ceil(seconds / 60)} min` : `${Math.ceil(seconds / 3600)} h`;
}
