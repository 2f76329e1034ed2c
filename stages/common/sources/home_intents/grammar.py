"""The sentence templates of the package, and one random way through a template."""

from __future__ import annotations

import importlib.resources
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

from hassil.expression import (
    Alternative,
    Expression,
    Group,
    ListReference,
    Permutation,
    RuleReference,
    Sentence,
    TextChunk,
)
from hassil.intents import IntentData, Intents

from stages.common.errors import InputError

PACKAGE = "home-assistant-intents"


@dataclass(frozen=True, slots=True)
class Template:
    """One sentence template of one intent.

    Attributes:
        group: a name that is the same in every run; templates with the same words share it.
        combination: the slots that it fills, as the package names them.
        domains: of the devices that `{name}` may be.
        sentence: its parsed form; data: the block of the package's file that contains it.
    """

    intent: str
    group: str
    combination: str
    domains: tuple[str, ...]
    sentence: Sentence
    data: IntentData


@dataclass(frozen=True, slots=True)
class Grammar:
    """The templates of a language, and its parsed form for hassil."""

    language: str
    templates: tuple[Template, ...]
    intents: Intents


@cache
def load_grammar(language: str) -> Grammar:
    """Parse the templates of a language, once a process: it takes seconds.

    Raises:
        InputError: the package has no such language.
    """
    folder = importlib.resources.files("home_assistant_intents") / "data"
    file = folder / f"{language}.json"
    if not file.is_file():
        have = ", ".join(sorted(path.name[:-5] for path in folder.iterdir() if path.name.endswith(".json")))
        raise InputError(f"{PACKAGE} has no language {language!r}", f"set language to one of: {have}")
    raw = json.loads(file.read_text(encoding="utf-8"))
    for intent in raw["intents"].values():
        for block in intent["data"]:
            block["requires_context"] = drop_room(block.get("requires_context", {}))
    intents = Intents.from_dict(raw)
    templates = tuple(
        _template(intent.name, data, sentence)
        for intent in intents.intents.values()
        for data in intent.data
        for sentence in data.sentences
    )
    return Grammar(language, templates, intents)


def drop_room(context: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the requirement of a room that the text does not name.

    `requires_context: {area: {slot: true}}` takes the room from the position of the satellite. The model
    sees only the text, so no answer contains that room.
    """
    return {
        key: value for key, value in context.items() if not (isinstance(value, Mapping) and value.get("slot"))
    }


def _template(intent: str, data: IntentData, sentence: Sentence) -> Template:
    combination = (data.metadata or {}).get("slot_combination", "default")
    digest = sha256(f"{intent}\n{sentence.text}".encode()).hexdigest()[:6]
    domains = data.requires_context.get("domain", ())
    return Template(
        intent=intent,
        group=f"{intent}/{combination}/{digest}",
        combination=combination,
        domains=(domains,) if isinstance(domains, str) else tuple(domains),
        sentence=sentence,
        data=data,
    )


def select_reserved_groups(grammar: Grammar, share: float, seed: int) -> frozenset[str]:
    """Return the groups of templates that give no rows: phrasings that the model has not been trained on.

    Of each intent, `share` of its groups, rounded down, so that an intent with few templates keeps them
    all. The choice depends only on seed and group: a larger share includes what a smaller one does.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for template in grammar.templates:
        groups[template.intent].add(template.group)
    reserved: set[str] = set()
    for names in groups.values():
        order = sorted(names, key=lambda name: (sha256(f"{seed}/reserved/{name}".encode()).digest(), name))
        reserved.update(order[: int(share * len(order))])
    return frozenset(reserved)


def expand(expression: Expression, intents: Intents, rng: random.Random) -> Iterator[str | ListReference]:
    """Yield one random expansion of a template: its words, and its references to lists."""
    if isinstance(expression, TextChunk):
        yield expression.original_text
    elif isinstance(expression, ListReference):
        yield expression
    elif isinstance(expression, RuleReference):
        yield from expand(intents.expansion_rules[expression.rule_name].expression, intents, rng)
    elif isinstance(expression, Alternative):
        yield from expand(rng.choice(expression.items), intents, rng)
    elif isinstance(expression, Permutation):
        for item in rng.sample(expression.items, len(expression.items)):
            yield " "
            yield from expand(item, intents, rng)
            yield " "
    elif isinstance(expression, Group):
        for item in expression.items:
            yield from expand(item, intents, rng)
    else:
        raise TypeError(f"unknown expression of hassil: {expression!r}")


def expand_words(expression: Expression, intents: Intents, rng: random.Random) -> Iterator[str]:
    """Yield one random expansion of a list's value, which has words only."""
    for part in expand(expression, intents, rng):
        if not isinstance(part, str):
            raise TypeError(f"a list's value refers to the list {part.list_name}")
        yield part
