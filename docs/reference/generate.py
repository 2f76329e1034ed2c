"""Write the pages that can be derived: parameters, commands, dependencies, families, API: `make docs`.

`python -m docs.reference.generate --check` exits 1 if a page is out of date.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flows.__main__ import COMMANDS
from services.api.fields import IGNORED
from stages.common.params.checked_yaml import Section
from stages.common.params.loading import Params
from tests.environments.wheels import GLIBC_MINOR, MACOS, PYTHONS
from tests.services.api.openai_gaps import GAPS, ROUTES, TAKEN, TAKEN_WITHIN
from tests.stages.families import EVERY_PART, KNOWN, Known

ROOT = Path(__file__).parents[2]
HERE = ROOT / "docs" / "reference"
SHIPPED = ("params.yaml", "params.tools.yaml")
# Licences that a package's metadata does not give as an expression, read in its licence file.
LICENSES = {
    "accelerate": "Apache-2.0",
    "axe-playwright-python": "MIT",
    "dvc": "Apache-2.0",
}
KEY_LINE = re.compile(r"^\s*(?:# )?\s*(?:- )?(?P<key>\w+):\s*(?P<value>.*?)\s*(?:#\s*(?P<comment>.*))?$")


Lines = dict[tuple[str, ...], tuple[str, str]]


def shipped_lines(text: str) -> Lines:
    """Return the value and comment of each key as params.yaml writes them, by the keys that lead to it.

    An entry of a list, and one that is shown in a comment only, is under the list's key, and under that
    and the entry's kind, where it begins with one.
    """
    found: Lines = {}
    kinds: dict[tuple[str, ...], str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = KEY_LINE.match(line)
        if match is None or line.startswith("# "):
            continue
        # The columns that a list's dash or a comment's mark takes are no depth of their own.
        column = match.start("key") - 2 * line.lstrip().startswith("#")
        path = [(at, key) for at, key in path if at < column] + [(column, match["key"])]
        value, comment = match["value"], match["comment"] or ""
        if line.lstrip().startswith("#") and not comment:  # a comment that explains a key of inline mappings
            value, comment = "", value
        *above, key = (key for _, key in path)
        if key == "kind" and "- kind:" in line:
            kinds[tuple(above)] = value
        found.setdefault((*above, key), (value, comment))
        if tuple(above) in kinds:
            found.setdefault((*above, kinds[tuple(above)], key), (value, comment))
    return found


def type_words(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Describe a type for a person: `integer ≥ 1`, `json · text`, `text or null`."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return type_words(inner, (*metadata, *more))
    if typing.get_origin(annotation) is Literal:
        return " · ".join(f"`{value}`" for value in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(type_words(part, metadata) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"list of {type_words(typing.get_args(annotation)[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true · false", type(None): "null"}
    word = "value" if annotation is Any else names.get(annotation, "mapping")
    return word if word in ("null", "mapping") else " ".join([word, *bounds(metadata)])


def bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    """Yield `≥ 1` and its like for each limit in a field's metadata."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for item in (part for whole in metadata for part in getattr(whole, "metadata", [whole])):
        for name, sign in signs.items():
            limit = getattr(item, name, None)
            if limit is not None:
                yield f"{sign} {limit}" if isinstance(limit, int) else f"{sign} {limit:g}"


def table(model: type[Section], lines: Lines, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the rows of the table of the section to which these keys lead."""
    yield "| key | type | shipped | what it does |"
    yield "|---|---|---|---|"
    kind = model.model_fields.get("kind")
    entry = (*path, *typing.get_args(kind.annotation)) if kind else path
    for name, field in model.model_fields.items():
        if sections_of(field):
            continue
        name = field.alias or name
        # A key of inline mappings is explained in a comment before them, a level up.
        places = (entry, path, path[:-1])
        found = next((lines[(*place, name)] for place in places if (*place, name) in lines), None)
        value, comment = found or (default_of(field), "")
        if name == "kind" and len(typing.get_args(field.annotation)) == 1:
            value, comment = typing.get_args(field.annotation)[0], "the kind of source"
        if not comment:
            raise SystemExit(f"params.yaml: {name} of {model.__name__} has no comment that describes it")
        value = value if len(value) <= 40 else value[:37] + "…"
        words = type_words(field.annotation, tuple(field.metadata))
        shown = f"`{value}`" if value and not value.startswith(">") else "…"
        yield f"| `{name}` | {words} | {shown} | {comment} |"


def default_of(field: FieldInfo) -> str:
    """Return the value that a left-out key takes, as YAML would write it."""
    return "" if field.default is PydanticUndefined else str(field.default)


def sections_of(field: FieldInfo) -> list[type[Section]]:
    """Return the sections nested in a field: one, or those of a list."""

    def walk(annotation: Any) -> Iterator[type[Section]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield annotation
        for part in typing.get_args(annotation):
            yield from walk(part)

    return list(walk(field.annotation))


def chapter(model: type[Section], lines: Lines, path: tuple[str, ...]) -> Iterator[str]:
    """Yield a section's heading, table, and the chapters of the sections in it."""
    title = ".".join(path) + f": {model.__name__}" * (len(path) > 1)
    yield from ("#" * min(len(path) + 1, 4) + f" {title}", "", str(model.__doc__), "")
    if any(not sections_of(field) for field in model.model_fields.values()):
        yield from (*table(model, lines, path), "")
    for name, field in model.model_fields.items():
        for nested in sections_of(field):
            yield from chapter(nested, lines, (*path, name))


def page() -> str:
    """Return the reference of every parameter as Markdown."""
    lines, of_tools = (shipped_lines((ROOT / name).read_text(encoding="utf-8")) for name in SHIPPED)
    out = [
        "# Parameters",
        "",
        "Every key of `params.yaml`, from that file, `params.tools.yaml` and their types, by `make docs`.",
        "`shipped` is the value in `params.yaml`; the [last table](#paramstoolsyaml) has the other file's.",
        "An unknown key, a wrong type or contradicting values stop every command before any work.",
        "",
    ]
    for name, field in Params.model_fields.items():
        key = field.alias or name
        model = field.annotation
        assert isinstance(model, type)
        out += chapter(model, of_tools | lines, (key,))
    out += differences(lines, of_tools)
    return "\n".join(out).rstrip() + "\n"


def differences(lines: Lines, of_tools: Lines) -> Iterator[str]:
    """Yield the chapter of what the second shipped file has other values for."""
    yield from ("## params.tools.yaml", "")
    yield "The packaged home task as conversations with tools: `make run TASK=tools` makes it `params.yaml`."
    yield from ("Its other values, besides the entry of `collect.sources`:", "")
    yield from ("| key | `params.yaml` | `params.tools.yaml` |", "|---|---|---|")
    for path, (value, _) in lines.items():
        other, _ = of_tools.get(path, (value, ""))
        if other != value and "sources" not in path:
            yield f"| `{'.'.join(path)}` | `{value}` | `{other}` |"
    yield ""


def commands_page() -> str:
    """Return the commands of `perennial` as Markdown."""
    out = [
        "# Commands",
        "",
        "Run `perennial COMMAND` in the checkout, with the environment activated (`. .venv/bin/activate`).",
        "`perennial COMMAND --help` shows a command's options, `perennial --install-completion` adds shell",
        "completion. Each command is `python -m` of its module. Generated by `make docs`.",
        "",
    ]
    for group, commands in COMMANDS.items():
        out += [f"## {group}", "", "| command | what it does | module | extras |", "|---|---|---|---|"]
        for command in commands:
            name = " ".join((command.name, "\\|".join(command.subcommands))).strip()
            out.append(f"| `{name}` | {command.help} | `{command.module}` | {', '.join(command.extras)} |")
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def dependencies_page() -> str:
    """Return the direct dependencies of each extra with version and licence as Markdown."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    out = [
        "# Dependencies",
        "",
        "What each extra asks for directly, generated by `make docs`. The exact version of everything,",
        "also of what these bring along, is in `requirements.lock`. Licences as the packages state them.",
        "",
    ]
    out += [*platforms(), ""]
    asked = {"always": project["dependencies"], **project["optional-dependencies"]}
    for extra, requirements in asked.items():
        out += [f"## {extra}", "", "| package | version | licence |", "|---|---|---|"]
        names = {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements}
        versions = locked if extra != "gpu" else dict(pin.split("==") for pin in requirements)
        out += [
            f"| {name} | {versions[name.lower()]} | {license_of(name, versions)} |" for name in sorted(names)
        ] + [""]
    return "\n".join(out).rstrip() + "\n"


def platforms() -> Iterator[str]:
    """Yield the table of the Pythons and systems that `make check-wheels` checks."""
    pythons = ", ".join("{}.{}".format(*version) for version in PYTHONS)
    glibc = {machine: f"glibc 2.{minor} or newer" for machine, minor in GLIBC_MINOR.items()}
    yield from ("## Platforms", "")
    yield f"CPython {pythons}. Every package has a wheel for each on each system, or is pure Python"
    yield from ("(`make check-wheels`). CI runs 3.11; 3.12 and 3.13 have been run by hand.", "")
    yield from ("| system | needs | state |", "|---|---|---|")
    yield f"| Linux on x86-64 | {glibc['x86_64']} (Debian 11, Ubuntu 20.04) | tested |"
    yield f"| Linux on ARM | {glibc['aarch64']} (Debian 12, Ubuntu 22.04) | should work, not tested |"
    yield f"| macOS on Apple silicon | macOS {MACOS[0]} or newer | should work, not tested |"


def license_of(name: str, locked: dict[str, str]) -> str:
    """Return the licence that a package states; one that is not installed keeps the page's word."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        page = (HERE / "dependencies.md").read_text(encoding="utf-8")
        kept = re.search(
            rf"^\| {re.escape(name)} \| {re.escape(locked[name.lower()])} \| (.*) \|$", page, re.M
        )
        if kept is None:
            raise SystemExit(
                f"{name} {locked[name.lower()]} is not installed: pip install it, then make docs"
            ) from None
        return kept[1]
    words = metadata.get("License-Expression") or metadata.get("License") or ""
    if 0 < len(words) < 120 and "\n" not in words:
        return str(words)
    classified = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License")]
    found = ", ".join(c for c in classified if c != "OSI Approved") or LICENSES.get(name)
    if not found:
        raise SystemExit(f"{name} states no licence; read its licence file and name it in LICENSES")
    return found


def openai_page() -> str:
    """Return what OpenAI's API has and the service does not, as the tests send it, as Markdown."""
    out = [
        "# What OpenAI's API has and the service does not",
        "",
        "A test (`tests/services/api/test_openai_gaps.py`) sends each request here and checks that the",
        "response is a 422 whose `param` names the field. It also compares the table with all fields that",
        "OpenAI's client has: each is done, taken without effect, or in the table. Written by `make docs`.",
        "",
    ]
    for path, gaps in GAPS.items():
        out += [
            f"## POST {path}",
            "",
            "| field | for instance | words of the refusal |",
            "|---|---|---|",
        ]
        for gap in gaps:
            sent = json.dumps(gap.sent)
            out.append(f"| `{gap.param}` | `{sent}` | {gap.instead} |")
        out.append("")
        if TAKEN[path]:
            names = ", ".join(f"`{name}`" for name in sorted(TAKEN[path]))
            out += [f"Taken, without effect on the answer: {names}.", ""]
        if TAKEN_WITHIN[path]:
            names = ", ".join(f"`{taken.param}`" for taken in TAKEN_WITHIN[path])
            out += [f"Taken within objects, and not shown to the model: {names}.", ""]
    ignored = ", ".join(f"`{name}`" for name in sorted(IGNORED))
    out += [
        "## Fields that are ignored",
        "",
        "On every route, in the request and in each object within it, where the route has no such field of",
        f"its own, as they change no answer: {ignored}.",
        "",
    ]
    out += ["## Routes that are not there", "", "| route | status |", "|---|---|"]
    out += [f"| `{method} {path}` | {status} |" for method, path, status in ROUTES]
    return "\n".join(out).rstrip() + "\n"


def families_page() -> str:
    """Return which model families work with what, as the tests hold it, as Markdown."""
    out = [
        "# Model families",
        "",
        "What works with which base model. A test trains, exports, evaluates and serves a tiny model of each",
        "family (`tests/stages/test_families.py`). Others compare the fast path with transformers' losses",
        "and gradients, the GGUF with llama.cpp, and `paged` with transformers. Written by `make docs`.",
        "",
        "| family | `model_type` | train | fast path on a CPU | GGUF | evaluated by | `paged` | `openvino` "
        "| `vllm` | `transformers` |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for known in KNOWN.values():
        fast = "all" if known.fast == EVERY_PART else ", ".join(known.fast)
        gguf = f"not {known.stripping}" if known.stripping else "yes"
        openvino = f"not {known.sentencepiece}" if known.sentencepiece else gguf
        engines = [gguf if known.paged else "no", openvino if known.openvino else "no"]
        cells = [
            known.models,
            f"`{known.model_type}`",
            "yes",
            fast,
            gguf if known.gguf else "no",
            _name_evaluating(known),
            *engines,
            "listed" if known.adapters else "no adapters",
            "yes",
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join([*out, "", FAMILY_NOTES])


def _name_evaluating(known: Known) -> str:
    """Return which engine answers the test rows on a CPU."""
    if not known.paged:
        return "`transformers`"
    return f"`paged`; {known.stripping} by `transformers`" if known.stripping else "`paged`"


FAMILY_NOTES = """\
- *fast path*: the parts of a LoRA training step that [run faster](../benchmarks.md#training-speed); the rest
  is transformers' own. Sliding windows and caps of attention scores are kept. Without it one pass forward
  and backward took 1.9 times as long for a Llama, 2.1 for Qwen 3, 2.5 for Gemma 3 and 1.7 for GPT-NeoX: six
  layers of random weights as wide as the default model's, 16 rows of 52 tokens that begin with the same 17,
  bfloat16, two cores with other work on them, medians of four, 2026-11-29. GPT-2 has a dropout in its
  attention, which stays transformers' own: 1.2 and 1.5 times in two runs (one core, 2026-11-30).
- *not Phi 3*: its tokenizer strips the blanks after control tokens, which a GGUF cannot say. `preflight`
  compares the tokens of training rows with those that llama.cpp would give, and names `export.gguf: false`.
- A GGUF has tokenizers of byte-level BPE and of SentencePiece's BPE (Llama 2, Mistral 7B, Gemma), not of
  Unigram. Tests compare llama.cpp's own tokens with those of tokenizers made for it; by hand also Mistral's
  own vocabularies, all equal. Gemma's and Llama 2's own were not at hand: `preflight` compares yours.
- `paged` and `openvino` read the GGUF. Without one, or where both columns have *no*, `auto` takes
  `transformers` on a CPU. With the default model it is 19 times slower than `paged` for one request, and 45
  times for 32 at once ([measured](../benchmarks.md#serving)). An engine that is named in `params.yaml` and
  does not compute the model is refused before training.
- `openvino` is not given scaled positions (Llama 3.1 and later) or a Llama with biases: its answers
  would be wrong. It cannot read a tokenizer of SentencePiece from a GGUF.
- *listed*: in vLLM's list of models that take adapters. Tested here with Llama only.
- Of a mixture of experts attention, experts and router are trained; *all* is without the latter two there.
- Other families that transformers loads as causal language models are trained the same way. What is fast is
  found out for each module, and [checked](../adr/0004-fast-training-without-a-compiler.md). `transformers`
  serves them.
"""


def main() -> None:
    """Write the pages, or check them."""
    pages = {
        "params": page(),
        "commands": commands_page(),
        "dependencies": dependencies_page(),
        "openai": openai_page(),
        "families": families_page(),
    }
    for name, text in pages.items():
        path = HERE / f"{name}.md"
        if sys.argv[1:] != ["--check"]:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.relative_to(ROOT)} is out of date; run: make docs")


if __name__ == "__main__":
    main()
