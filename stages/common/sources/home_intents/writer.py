"""Write sentences of a template: expand it, fill its slots, keep what the recogniser reads as intended."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hassil.expression import ListReference
from hassil.intents import RangeSlotList, TextSlotList, WildcardSlotList
from hassil.util import normalize_whitespace

from stages.common.sources import Rejected
from stages.common.sources.home_intents.grammar import PACKAGE, Grammar, Template, expand, expand_words
from stages.common.sources.home_intents.lexicon import PERSON_MARK, Lexicon, Person, deal_people
from stages.common.sources.home_intents.recognition import (
    build_name_lists,
    find_best_answers,
    format_answer,
    recognize,
)

PERSON_SHARE = 0.4  # of the names, rooms and texts that can name a person

COURTEOUS_SHARE = 0.12  # of the sentences get a "please" or a "could you"

MAX_DRAWS = 400  # for one template; some have fewer sentences than wanted

# Usual values, as (from, to, step); one number in five is from the whole range of the list.
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


@dataclass(slots=True)
class Draft:
    """A sentence under construction: its words, the values of its slots, and the person it names."""

    words: list[str] = field(default_factory=list)
    slots: Slots = field(default_factory=dict)
    person: Person | None = None
    contradictory: bool = False

    def fill(self, slot: str, text: str, value: Any) -> None:
        """Add `text` to the sentence as the value `value` of a slot."""
        self.words.append(text)
        self.contradictory |= slot in self.slots
        self.slots[slot] = value


class Writer:
    """Writes sentences, template by template, and never the same sentence twice."""

    def __init__(self, grammar: Grammar, lexicon: Lexicon, seed: int) -> None:
        self.grammar = grammar
        self.lexicon = lexicon
        self.seed = seed
        self.drawn = 0
        self.rejected_by_reason: Counter[str] = Counter()
        self.rejected: list[Rejected] = []
        self._written: set[str] = set()
        self._people = deal_people(lexicon.people, random.Random(f"{seed}/people"))
        self._next_person = next(self._people)
        self._phrases = defaultdict(list)
        for phrase in lexicon.phrases:
            self._phrases[phrase.list_name, phrase.kind].append(phrase.text)

    def write(self, template: Template, wanted: int) -> Iterator[tuple[str, str, Person | None]]:
        """Yield up to `wanted` new sentences of a template, each with its answer and the person it names."""
        rng = random.Random(f"{self.seed}/{template.group}/{template.domains}")
        written = 0
        for _ in range(MAX_DRAWS):
            if written == wanted:
                return
            draft = self._draft(template, rng)
            text = self._add_courtesy(normalize_whitespace(" ".join("".join(draft.words).split())), rng)
            self.drawn += 1
            reason, answer = self._judge(template, draft, text)
            if reason is None:
                self._written.add(text.casefold())
                written += 1
                if draft.person:  # only now: the person of a rejected sentence is used in the next one
                    self._next_person = next(self._people)
                yield text, answer, draft.person
            else:
                self.rejected_by_reason[reason] += 1

    def _judge(self, template: Template, draft: Draft, text: str) -> tuple[str | None, str]:
        """Return why the sentence is rejected, or None, and its answer."""
        if text.casefold() in self._written:
            return "duplicate", ""
        if any(pattern.search(f"{template.intent}: {text}") for pattern in self.lexicon.unnatural):
            return "unnatural", ""
        filled = format_answer(template.intent, {**template.data.slots, **draft.slots})
        found = recognize(text, self.grammar.intents, build_name_lists(self.lexicon, text))
        own = find_best_answers(
            r for r in found if r.sentence is template.sentence and r.data is template.data
        )
        if draft.contradictory or own != {filled}:
            self._reject(template, "ambiguous_in_template", text, {filled} | own)
            return "ambiguous_in_template", ""
        everywhere = find_best_answers(found)
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
        """Fill one slot with a random value of its list."""
        name, slot = reference.list_name, reference.slot_name
        values = self.grammar.intents.slot_lists.get(name)
        if (texts := self._list_texts(draft, template, name)) is not None:
            text = self._pick_text(draft, texts, rng)
            draft.fill(slot, text, text)
        elif isinstance(values, TextSlotList):
            value = rng.choice(values.values)
            words = expand_words(value.text_in, self.grammar.intents, rng)
            draft.fill(slot, "".join(words), value.value_out)
        elif isinstance(values, RangeSlotList):
            number = pick_number(name, values, rng)
            draft.fill(slot, f"{number:g}", number * (1 if values.multiplier is None else values.multiplier))

    def _list_texts(self, draft: Draft, template: Template, name: str) -> Sequence[str] | None:
        """Return the lexicon's texts for a list; None for a list with values of its own."""
        if name == "area":
            return self.lexicon.areas
        if name == "floor":
            return self.lexicon.floors
        if name == "name":
            devices = self.lexicon.devices
            return [d.name for d in devices if not template.domains or d.domain in template.domains]
        if isinstance(self.grammar.intents.slot_lists[name], WildcardSlotList):
            kind = str(draft.slots.get("media_class", ""))
            return self._phrases[name, kind] or self._phrases[name, ""]
        return None

    def _pick_text(self, draft: Draft, texts: Sequence[str], rng: random.Random) -> str:
        """Pick a text; some name a person, at most one per sentence."""
        personal = [text for text in texts if PERSON_MARK in text]
        common = [text for text in texts if PERSON_MARK not in text]
        if not personal or (common and (draft.person or rng.random() >= PERSON_SHARE)):
            return rng.choice(common)
        draft.person = draft.person or self._next_person
        return rng.choice(personal).replace(PERSON_MARK, draft.person.name)

    def _add_courtesy(self, text: str, rng: random.Random) -> str:
        """Add words such as "please" to some sentences."""
        if rng.random() >= COURTEOUS_SHARE:
            return text
        verb_first = text.split(" ", 1)[0] in self.lexicon.verbs
        courtesy = rng.choice([c for c in self.lexicon.courtesies if verb_first or not c.verb_first])
        return " ".join(part for part in (courtesy.before, text, courtesy.after) if part)


def pick_number(name: str, values: RangeSlotList, rng: random.Random) -> float:
    """Pick a number of a range: usually a common round one, sometimes any."""
    usual = USUAL_NUMBERS.get(name, PERCENTAGES if (values.start, values.stop) == (0, 100) else None)
    if usual and rng.random() < 0.8:
        start, stop, step = usual
        return rng.randrange(start, stop + 1, step)
    numbers: list[float] = list(values.get_numbers())
    return rng.choice(numbers)
