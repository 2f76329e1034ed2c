"""Recognise sentences with Home Assistant's own recogniser."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hassil.expression import Sentence
from hassil.intents import IntentData, Intents, SlotList, TextSlotList
from hassil.recognize import RecognizeResult, recognize_all

from stages.common.sources.home_intents.lexicon import PERSON_MARK, Lexicon


@dataclass(frozen=True, slots=True)
class Reading:
    """One interpretation of a sentence by hassil; a lower rank is a better one."""

    answer: str
    rank: tuple[int, int, int]
    sentence: Sentence
    data: IntentData


def recognize(text: str, intents: Intents, lists: dict[str, SlotList]) -> list[Reading]:
    """Return all interpretations of `text`.

    They are ranked as by `hassil.recognize.recognize_best`, which Home Assistant calls: fewer wildcards,
    then more literal words, then less text in wildcards. That function resolves equal ranks by the intent's
    name; here equal ranks are an ambiguity.
    """
    return [
        Reading(
            answer=format_answer(
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


def find_best_answers(found: Iterable[Reading]) -> set[str]:
    """Return the answers of the best rank: one, several if the sentence is ambiguous, or none."""
    found = list(found)
    best = min((reading.rank for reading in found), default=None)
    return {reading.answer for reading in found if reading.rank == best}


def format_answer(intent: str, slots: Mapping[str, Any]) -> str:
    """Return the answer as JSON: the intent first, then the slots by name; 21.0 is written as 21."""
    plain = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in sorted(slots.items())
    }
    return json.dumps({"intent": intent, **plain}, ensure_ascii=False, separators=(",", ":"))


def build_name_lists(lexicon: Lexicon, text: str) -> dict[str, SlotList]:
    """Return hassil's lists of the rooms, floors and devices that occur in `text`.

    Values that do not occur are removed, because a wildcard makes hassil try every value at every position;
    the interpretations are the same as with the whole lists.
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
