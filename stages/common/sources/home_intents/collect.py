"""The packaged default: spoken requests to a smart home, and the intents they call.

The package `home-assistant-intents` (Apache-2.0) has sentence templates; `hassil` is the
recogniser that Home Assistant reads them with. Each template is expanded at random, its open
places are filled from `lexicon`, and the answer is what the recogniser itself makes of the
sentence when it is given that template. A sentence is kept only if that is what was filled in,
and if no other template of the language has as good a claim to it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from hassil.intents import IntentData, Intents, RangeSlotList, SlotList, TextSlotList, WildcardSlotList
from hassil.recognize import RecognizeResult, recognize_all
from hassil.util import normalize_whitespace

from stages.common.errors import InputError
from stages.common.records import Message, Row, make_row
from stages.common.sources import Collected, Rejected
from stages.common.sources.home_intents.lexicon import PERSON_MARK, Lexicon, Person, deal_people, read_lexicon

PACKAGE = "home-assistant-intents"
LICENSE = "apache-2.0"

PERSON_SHARE = 0.4  # of the names, rooms and texts that could belong to somebody
COURTEOUS_SHARE = 0.12  # of the sentences get a "please" or a "could you"
TRIES = 400  # for one template; one with few sentences in it gives up here

# What people mostly say, as (from, to, step); one number in five is from the list's whole range.
USUAL_NUMBERS = {
    "timer_hours": (1, 12, 1),
    "timer_minutes": (1, 60, 1),
    "timer_seconds": (5, 90, 5),
    "temperature": (15, 28, 1),
    "color_temperature": (2000, 6500, 100),
    "volume_step_up": (5, 30, 5),
    "volume_step_down": (5, 30, 5),
}
PERCENTAGES = (5, 100, 5)

Slots = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Template:
    """One sentence template of one intent.

    Attributes:
        group: a name that holds in every run; templates with the same words share it.
        combination: which slots it fills, in the package's words.
        domains: of the devices that `{name}` may be.
        sentence: its parsed form; data: the block it stands in.
    """

    intent: str
    group: str
    combination: str
    domains: tuple[str, ...]
    sentence: Sentence
    data: IntentData


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language's templates, and all that hassil knows of it."""

    language: str
    templates: tuple[Template, ...]
    intents: Intents


@dataclass(frozen=True, slots=True)
class Reading:
    """One way in which hassil understands a sentence; of two, the one with the lower rank is better."""

    answer: str
    rank: tuple[int, int, int]
    sentence: Sentence
    data: IntentData


@dataclass(slots=True)
class Draft:
    """A sentence in the making: its words so far, what was put in, and whose things it names."""

    words: list[str] = field(default_factory=list)
    slots: Slots = field(default_factory=dict)
    person: Person | None = None
    contradictory: bool = False

    def fill(self, slot: str, text: str, value: Any) -> None:
        """Say `text`, and remember that it means `value`."""
        self.words.append(text)
        self.contradictory |= slot in self.slots
        self.slots[slot] = value


def collect_home_intents(
    version: str,
    language: str,
    rows_per_template: int,
    min_rows_per_intent: int,
    seed: int,
    system_prompt: str | None,
    reserved_share: float = 0.0,
) -> Collected:
    """Expand the templates of `language` into rows; the same arguments give the same rows everywhere.

    `reserved_share` of each intent's templates give no rows at all (`reserved_groups`).

    Raises:
        InputError: another version is installed, or the language is not in the package or the lexicon.
    """
    check_version(version)
    grammar = load_grammar(language)
    lexicon = read_lexicon(language)
    reserved = reserved_groups(grammar, reserved_share, seed)
    templates = [template for template in grammar.templates if template.group not in reserved]
    templates_of = Counter(template.intent for template in templates)
    writer = Writer(grammar, lexicon, seed)
    rows: list[Row] = []
    for template in templates:
        wanted = max(rows_per_template, math.ceil(min_rows_per_intent / templates_of[template.intent]))
        for text, answer, person in writer.write(template, wanted):
            rows.append(_row(template, text, answer, person, system_prompt, f"{PACKAGE}/{version}", language))
    figures = {
        "templates": len(grammar.templates),
        "templates_with_rows": len({row.group for row in rows}),
        "intents": len({row.tags["intent"] for row in rows}),
        "sentences_drawn": writer.drawn,
        "sentences_left_out": dict(sorted(writer.left_out.items())),
        "rows_with_a_person": sum("person" in row.tags for row in rows),
    }
    if reserved:
        figures["templates_reserved"] = len(grammar.templates) - len(templates)
    return Collected(tuple(rows), tuple(writer.rejected), figures)


def reserved_groups(grammar: Grammar, share: float, seed: int) -> frozenset[str]:
    """Return the groups of templates that are kept out of the rows.

    They are phrasings that a model taught with these rows has never seen: what people may say
    tomorrow. Of each intent it is `share` of its groups, rounded down, so that an intent with few
    templates keeps them all. Which ones hangs on the seed and the group alone: a larger share
    keeps out what a smaller one does, and some more.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for template in grammar.templates:
        groups[template.intent].add(template.group)
    reserved: set[str] = set()
    for names in groups.values():
        order = sorted(names, key=lambda name: (sha256(f"{seed}/reserved/{name}".encode()).digest(), name))
        reserved.update(order[: int(share * len(order))])
    return frozenset(reserved)


def check_version(version: str) -> None:
    """Refuse to expand other templates than the ones `params.yaml` names.

    Raises:
        InputError: the package is missing, or has another version.
    """
    try:
        installed = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{PACKAGE} is not installed", f"pip install {PACKAGE}=={version}") from None
    if installed != version:
        raise InputError(
            f"{PACKAGE} {installed} is installed, but collect.sources asks for version {version}",
            f"set version: {installed} in params.yaml, or pip install {PACKAGE}=={version}",
        )


def load_grammar(language: str) -> Grammar:
    """Parse the templates of a language, each on its own.

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
            block["requires_context"] = without_room(block.get("requires_context", {}))
    intents = Intents.from_dict(raw)
    templates = tuple(
        _template(intent.name, data, sentence)
        for intent in intents.intents.values()
        for data in intent.data
        for sentence in data.sentences
    )
    return Grammar(language, templates, intents)


def without_room(context: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the demand for a room that the text does not name.

    `requires_context: {area: {slot: true}}` fills the room in from where the satellite stands. The
    model sees the text alone, so that room is in no answer.
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


class Writer:
    """Writes sentences template by template; keeps what was said, so that nothing is said twice."""

    def __init__(self, grammar: Grammar, lexicon: Lexicon, seed: int) -> None:
        self.grammar = grammar
        self.lexicon = lexicon
        self.seed = seed
        self.drawn = 0
        self.left_out: Counter[str] = Counter()
        self.rejected: list[Rejected] = []
        self._said: set[str] = set()
        self._people = deal_people(lexicon.people, random.Random(f"{seed}/people"))
        self._next_person = next(self._people)
        self._phrases = defaultdict(list)
        for phrase in lexicon.phrases:
            self._phrases[phrase.list_name, phrase.kind].append(phrase.text)

    def write(self, template: Template, wanted: int) -> Iterator[tuple[str, str, Person | None]]:
        """Yield up to `wanted` new sentences of a template, each with its answer and the person it names."""
        rng = random.Random(f"{self.seed}/{template.group}/{template.domains}")
        written = 0
        for _ in range(TRIES):
            if written == wanted:
                return
            draft = self._draft(template, rng)
            text = self._courteous(normalize_whitespace(" ".join("".join(draft.words).split())), rng)
            self.drawn += 1
            reason, answer = self._judge(template, draft, text)
            if reason is None:
                self._said.add(text.casefold())
                written += 1
                if draft.person:  # dealt only now: a person of a sentence left out gets the next one
                    self._next_person = next(self._people)
                yield text, answer, draft.person
            else:
                self.left_out[reason] += 1

    def _judge(self, template: Template, draft: Draft, text: str) -> tuple[str | None, str]:
        """Return why the sentence is left out, or None, and its answer."""
        if text.casefold() in self._said:
            return "said_before", ""
        if any(pattern.search(f"{template.intent}: {text}") for pattern in self.lexicon.unnatural):
            return "unnatural", ""
        filled = answer_json(template.intent, {**template.data.slots, **draft.slots})
        found = readings(text, self.grammar.intents, name_lists(self.lexicon, text))
        own = best_answers(r for r in found if r.sentence is template.sentence and r.data is template.data)
        if draft.contradictory or own != {filled}:
            self._reject(template, "ambiguous_in_template", text, {filled} | own)
            return "ambiguous_in_template", ""
        everywhere = best_answers(found)
        if everywhere != {filled}:
            self._reject(template, "ambiguous", text, {filled} | everywhere)
            return "ambiguous", ""
        return None, filled

    def _reject(self, template: Template, reason: str, text: str, answers: Iterable[str]) -> None:
        file = f"{PACKAGE}:{self.grammar.language}.json"
        self.rejected.append(
            Rejected(file, None, reason, f"{template.group}: " + " or ".join(sorted(answers)), text)
        )

    def _draft(self, template: Template, rng: random.Random) -> Draft:
        draft = Draft()
        for part in expand(template.sentence.expression, self.grammar.intents, rng):
            if isinstance(part, str):
                draft.words.append(part)
            else:
                self._fill(draft, template, part, rng)
        return draft

    def _fill(self, draft: Draft, template: Template, reference: ListReference, rng: random.Random) -> None:
        name, slot = reference.list_name, reference.slot_name
        if name == "area":
            text = self._owned(draft, self.lexicon.areas, rng)
            draft.fill(slot, text, text)
        elif name == "floor":
            text = self._owned(draft, self.lexicon.floors, rng)
            draft.fill(slot, text, text)
        elif name == "name":
            names = [
                d.name for d in self.lexicon.devices if not template.domains or d.domain in template.domains
            ]
            text = self._owned(draft, names, rng)
            draft.fill(slot, text, text)
        else:
            values = self.grammar.intents.slot_lists[name]
            if isinstance(values, WildcardSlotList):
                kind = str(draft.slots.get("media_class", ""))
                text = self._owned(draft, self._phrases[name, kind] or self._phrases[name, ""], rng)
                draft.fill(slot, text, text)
            elif isinstance(values, TextSlotList):
                value = rng.choice(values.values)
                draft.fill(slot, "".join(_words(value.text_in, self.grammar.intents, rng)), value.value_out)
            elif isinstance(values, RangeSlotList):
                number = pick_number(name, values, rng)
                draft.fill(
                    slot, f"{number:g}", number if values.multiplier is None else number * values.multiplier
                )

    def _owned(self, draft: Draft, texts: Sequence[str], rng: random.Random) -> str:
        """Pick a text; some of them name a person, at most one in a sentence."""
        personal = [text for text in texts if PERSON_MARK in text]
        common = [text for text in texts if PERSON_MARK not in text]
        if not personal or (common and (draft.person or rng.random() >= PERSON_SHARE)):
            return rng.choice(common)
        draft.person = draft.person or self._next_person
        return rng.choice(personal).replace(PERSON_MARK, draft.person.name)

    def _courteous(self, text: str, rng: random.Random) -> str:
        if rng.random() >= COURTEOUS_SHARE:
            return text
        verb_first = text.split(" ", 1)[0] in self.lexicon.verbs
        courtesy = rng.choice([c for c in self.lexicon.courtesies if verb_first or not c.verb_first])
        return " ".join(part for part in (courtesy.before, text, courtesy.after) if part)


def expand(expression: Expression, intents: Intents, rng: random.Random) -> Iterator[str | ListReference]:
    """Yield one random way through a template: words, and the places left open."""
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
        raise TypeError(f"hassil has an expression this project does not know: {expression!r}")


def _words(expression: Expression, intents: Intents, rng: random.Random) -> Iterator[str]:
    for part in expand(expression, intents, rng):
        if not isinstance(part, str):
            raise TypeError(f"a list's value refers to the list {part.list_name}")
        yield part


def pick_number(name: str, values: RangeSlotList, rng: random.Random) -> float:
    """Pick a number of a range as people say it: mostly usual and round, now and then any."""
    usual = USUAL_NUMBERS.get(name, PERCENTAGES if (values.start, values.stop) == (0, 100) else None)
    if usual and rng.random() < 0.8:
        start, stop, step = usual
        return rng.randrange(start, stop + 1, step)
    numbers: list[float] = list(values.get_numbers())
    return rng.choice(numbers)


def name_lists(lexicon: Lexicon, text: str) -> dict[str, SlotList]:
    """Return the rooms, floors and devices for hassil that could occur in `text`.

    The lists are cut to what the text holds, because a wildcard makes hassil try every value of
    a list at every place; the readings are the same as with the whole lists.
    """
    folded = text.casefold()
    people = [person.name for person in lexicon.people if person.name.casefold() in folded]

    def present(texts: Iterable[str]) -> list[str]:
        named = (t.replace(PERSON_MARK, p) for t in texts if PERSON_MARK in t for p in people)
        return [t for t in (*(t for t in texts if PERSON_MARK not in t), *named) if t.casefold() in folded]

    domains = sorted({device.domain for device in lexicon.devices})
    devices = [
        (name, name, {"domain": domain})
        for domain in domains
        for name in present([device.name for device in lexicon.devices if device.domain == domain])
    ]
    return {
        "area": TextSlotList.from_strings(present(lexicon.areas), allow_template=False),
        "floor": TextSlotList.from_strings(present(lexicon.floors), allow_template=False),
        "name": TextSlotList.from_tuples(devices, allow_template=False),
    }


def readings(text: str, intents: Intents, lists: dict[str, SlotList]) -> list[Reading]:
    """Return all that hassil's recogniser makes of `text`.

    They are ranked as `hassil.recognize.recognize_best` ranks them, which is what Home Assistant
    calls: fewer wildcards, then more literal words, then less text in wildcards. That function
    settles ties by the intent's name; here a tie is an ambiguity.
    """
    return [
        Reading(
            answer=answer_json(
                found.intent.name, {entity.name: entity.value for entity in found.entities_list}
            ),
            rank=_rank(found),
            sentence=found.intent_sentence,
            data=found.intent_data,
        )
        for found in recognize_all(text, intents, slot_lists=lists)
    ]


def _rank(found: RecognizeResult) -> tuple[int, int, int]:
    wildcards = [entity for entity in found.entities_list if entity.is_wildcard]
    return len(wildcards), -found.text_chunks_matched, sum(len(entity.text or "") for entity in wildcards)


def best_answers(found: Iterable[Reading]) -> set[str]:
    """Return the answers of the best readings: one, several with equal rights, or none."""
    found = list(found)
    best = min((reading.rank for reading in found), default=None)
    return {reading.answer for reading in found if reading.rank == best}


def answer_json(intent: str, slots: Mapping[str, Any]) -> str:
    """Return the answer's one JSON text: the intent first, then the slots by name; 21.0 is 21."""
    plain = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in sorted(slots.items())
    }
    return json.dumps({"intent": intent, **plain}, ensure_ascii=False, separators=(",", ":"))


def _row(
    template: Template,
    text: str,
    answer: str,
    person: Person | None,
    system_prompt: str | None,
    source: str,
    language: str,
) -> Row:
    tags = {"intent": template.intent, "language": language, "slots": template.combination}
    if person:
        tags |= {"person": person.name, "person_gender": person.gender, "person_origin": person.origin}
    messages = [Message("system", system_prompt)] if system_prompt else []
    messages += [Message("user", text), Message("assistant", answer)]
    return make_row(messages, source, LICENSE, group=template.group, tags=tags, origin="template")
