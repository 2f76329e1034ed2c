// The form that corrects calls: one field for each argument, made from the JSON schema of the tool.

import { element } from "./draw.js";
import { findTool, membersOf, nameOfTool } from "./tools.js";
import { indented, isRecord, jsonProblem, parse } from "./text.js";

let count = 0; // of fields, for ids
const NOT_GIVEN = "";

/** The right calls of one answer. */
export class CallsForm {
  constructor(root, tools) {
    Object.assign(this, { root, tools, calls: [] });
  }

  show(calls) {
    this.calls = calls.map((call) => new CallFields(this, call));
    this.draw();
  }

  add() {
    const call = new CallFields(this, { name: this.tools.length === 1 ? nameOfTool(this.tools[0]) : "", arguments: "{}" });
    this.calls.push(call);
    this.draw();
    call.focus();
  }

  remove(call) {
    this.calls = this.calls.filter((other) => other !== call);
    this.draw();
  }

  draw() {
    this.calls.forEach((call, place) => (call.legend.textContent = `Call ${place + 1}`));
    this.root.replaceChildren(...this.calls.map((call) => call.root));
  }

  focus(place) {
    this.calls[place]?.focus();
  }

  /** The calls as typed; undefined if a field is wrong, which then has the focus and tells why. */
  read() {
    const read = this.calls.map((call) => call.read());
    if (!read.includes(undefined)) return read;
    this.root.querySelector('[aria-invalid="true"]')?.focus();
    return undefined;
  }
}

class CallFields {
  constructor(form, call) {
    this.form = form;
    this.root = element("fieldset", "call-fields");
    this.legend = this.root.appendChild(element("legend"));
    this.known = Boolean(findTool(form.tools, call.name));
    this.tool = makeField("Tool", "", makeSelect([["Choose a tool", NOT_GIVEN], ...form.tools.map((tool) => [nameOfTool(tool), nameOfTool(tool)])]));
    this.tool.control.value = this.known ? call.name : NOT_GIVEN;
    this.tool.control.onchange = () => this.showArguments(this.typed());
    this.place = element("div", "arguments");
    const remove = element("button", "quiet", "Remove this call");
    remove.type = "button";
    remove.onclick = () => {
      const editor = this.root.closest("form");
      form.remove(this);
      editor.querySelector(".add-call").focus();
    };
    this.root.append(this.tool.root, this.place, remove);
    this.showArguments(new Map(membersOf(call.arguments || "{}")), true);
  }

  focus() {
    this.tool.control.focus();
  }

  typed() {
    return new Map(this.fields.flatMap((field) => (field.wholeObject ? membersOf(field.text()) : [[field.key, field.text()]])).filter(([, text]) => text !== ""));
  }

  /** Draw the fields of the chosen tool, filled with JSON texts by key; what the schema does not know stays only at first. */
  showArguments(texts, keepsUnknown = false) {
    const schema = findTool(this.form.tools, this.tool.control.value)?.function.parameters ?? {};
    const known = isRecord(schema.properties) ? schema.properties : {};
    const required = Array.isArray(schema.required) ? schema.required : [];
    const isOpen = !Object.keys(known).length && Object.keys(schema).some((key) => !["type", "properties", "required", "additionalProperties"].includes(key) || (key === "additionalProperties" && schema[key]));
    if (isOpen) {
      const whole = `{${[...texts].map(([key, text]) => `${JSON.stringify(key)}:${text}`).join(",")}}`;
      this.fields = [makeArgument("Arguments", { type: "object" }, true, whole)];
      this.fields[0].wholeObject = true;
    } else {
      this.fields = Object.entries(known).map(([key, schema]) => makeArgument(key, schema, required.includes(key), texts.get(key)));
      for (const [key, text] of keepsUnknown ? texts : []) if (!Object.hasOwn(known, key)) this.fields.push(makeArgument(key, {}, false, text, this.tool.control.value ? "not an argument of this tool; empty it to leave it out" : ""));
    }
    this.place.replaceChildren(...this.fields.map((field) => field.root));
    if (!this.fields.length && this.tool.control.value) this.place.append(element("p", "note", "This tool takes no arguments."));
  }

  read() {
    this.tool.showProblem(this.tool.control.value === NOT_GIVEN ? "Choose a tool." : "");
    let isRight = this.tool.control.value !== NOT_GIVEN;
    for (const field of this.fields) isRight = field.check() && isRight;
    if (!isRight) return undefined;
    const [first] = this.fields;
    const given = this.fields.filter((field) => field.text() !== "");
    const text = first?.wholeObject ? first.text() : `{${given.map((field) => `${JSON.stringify(field.key)}:${field.text()}`).join(",")}}`;
    return { name: this.tool.control.value, arguments: text };
  }
}

// ---------------------------------------------------------------- one argument

/** A field for an argument; its `text` is JSON, empty where the argument is left out. */
function makeArgument(key, schema, isRequired, given, remark = "") {
  const kind = kindOf(schema, given);
  const notes = [kind.name, isRequired ? "" : "optional", remark, typeof schema?.description === "string" ? schema.description : ""];
  const field = makeField(key, notes.filter(Boolean).join(" · "), kind.control(isRequired));
  const { control } = field;
  field.key = key;
  if (given !== undefined) kind.fill(control, given);
  field.text = () => kind.read(control);
  field.check = () => {
    const text = field.text();
    const problem = text === "" ? (isRequired ? "This argument is required." : "") : kind.find(text);
    field.showProblem(problem);
    return !problem;
  };
  return field;
}

function kindOf(schema, given) {
  const options = Array.isArray(schema?.enum) ? schema.enum : isRecord(schema) && "const" in schema ? [schema.const] : undefined;
  const type = schema?.type;
  if (options) return choice("one of these", options, given);
  if (type === "boolean") return choice("true or false", [true, false], given);
  if (type === "integer" || type === "number") return numeric(type, schema);
  if (type === "string") return plain;
  return json(typeof type === "string" ? type : "");
}

function choice(name, options, given) {
  const texts = options.map((option) => JSON.stringify(option));
  const same = texts.find((text) => given !== undefined && text === JSON.stringify(parse(given)));
  // A value outside the list stays to be seen, and is refused.
  const shown = given === undefined || same ? texts : [...texts, given];
  const labels = shown.map((text) => [typeof parse(text) === "string" && parse(parse(text)) === undefined ? parse(text) : text, text]);
  return {
    name,
    control: (isRequired) => makeSelect([[isRequired ? "Choose a value" : "Not given", NOT_GIVEN], ...labels]),
    fill: (control) => (control.value = same ?? given),
    read: (control) => control.value,
    find: (text) => (texts.includes(text) ? "" : "The tool does not take this value."),
  };
}

function numeric(type, schema) {
  return {
    name: type === "integer" ? "whole number" : "number",
    control: () => Object.assign(element("input"), { type: "text", inputMode: "decimal", autocomplete: "off" }),
    fill: (control, given) => (control.value = given), // a text keeps its quotes, and is refused
    read: (control) => control.value.trim(),
    find(text) {
      const value = parse(text);
      if (typeof value !== "number" || !Number.isFinite(value)) return "This is not a number.";
      if (type === "integer" && !Number.isInteger(value)) return "This is not a whole number.";
      if (value < schema.minimum) return `The least value is ${schema.minimum}.`;
      if (value > schema.maximum) return `The greatest value is ${schema.maximum}.`;
      return "";
    },
  };
}

const plain = {
  name: "text",
  control: () => makeArea(1),
  fill: (control, given) => (control.value = typeof parse(given) === "string" ? parse(given) : given),
  read: (control) => (control.value === "" ? "" : JSON.stringify(control.value)),
  find: () => "",
};

function json(type) {
  const fits = { object: isRecord, array: Array.isArray }[type];
  return {
    name: type ? `${type} as JSON` : "JSON",
    control: () => Object.assign(makeArea(3), { className: "json" }),
    fill: (control, given) => (control.value = indented(given)),
    read: (control) => control.value.trim(),
    find(text) {
      if (parse(text) === undefined) return `This is not valid JSON: ${jsonProblem(text)}`;
      return !fits || fits(parse(text)) ? "" : `This is not an ${type}.`;
    },
  };
}

// ---------------------------------------------------------------- parts of a form

function makeField(name, notes, control) {
  const root = element("div", "field");
  const label = element("label", "", name);
  const wrong = element("p", "wrong");
  control.id = `field-${++count}`;
  label.htmlFor = control.id;
  wrong.id = `${control.id}-wrong`;
  wrong.hidden = true;
  wrong.setAttribute("role", "alert");
  control.setAttribute("aria-describedby", notes ? `${control.id}-notes ${wrong.id}` : wrong.id);
  root.append(label);
  if (notes) root.append(Object.assign(element("span", "optional", notes), { id: `${control.id}-notes` }));
  root.append(control, wrong);
  const showProblem = (text) => {
    wrong.textContent = text;
    wrong.hidden = !text;
    control.ariaInvalid = String(Boolean(text));
  };
  return { root, control, showProblem };
}

function makeSelect(options) {
  const select = element("select");
  select.append(...options.map(([text, value]) => new Option(text, value)));
  return select;
}

/** An input would drop the line breaks of a text. */
function makeArea(rows) {
  return Object.assign(element("textarea"), { rows, spellcheck: false });
}
