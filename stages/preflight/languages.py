"""Compare the languages that the model card states with those of the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from stages.common.errors import InputError
from stages.common.params.types import LANGUAGE_CODE
from stages.common.records import Row
from stages.common.sources.detection.languages import LANGUAGES, NO_LANGUAGE, SHORT, detect_language

STATED = "model_card.language"
SAMPLE_ROWS = 2000  # without a tag, whose language is detected
MIN_DETECTED = 20  # rows of a known language, below which nothing is concluded from them
MIN_SHARE = 0.1  # of these; a language with less may be a wrong guess
# Codes for what the detector takes for one language.
SAME = {"nb": "no", "nn": "no", "cmn": "zh", "yue": "zh", "iw": "he", "in": "id"}


@dataclass(frozen=True, slots=True)
class Languages:
    """The languages of the rows, by the primary part of their code.

    Attributes:
        tagged: rows by their tag `language`.
        detected: of a sample of the rows without the tag, those in a language that is known; None where the
            detector is not installed.
        untagged: rows without the tag.
    """

    tagged: Mapping[str, int]
    detected: Mapping[str, int] | None
    untagged: int


def count_languages(sides: Sequence[Sequence[Row]]) -> Languages:
    """Count the rows by language; a tag that is no code counts as none."""
    tagged: Counter[str] = Counter()
    detected: Counter[str] | None = Counter()
    step = max(1, sum(map(len, sides)) // SAMPLE_ROWS)
    for place, row in enumerate(chain.from_iterable(sides)):
        tag = row.tags.get("language", "")
        if re.fullmatch(LANGUAGE_CODE, tag):
            tagged[shorten(tag)] += 1
        elif place % step == 0 and detected is not None:
            try:
                detected[detect_language(row.question)] += 1
            except InputError:  # the detector is not installed
                detected = None
    if detected is not None:
        del detected[SHORT], detected[NO_LANGUAGE]
    return Languages(tagged, detected, sum(map(len, sides)) - tagged.total())


def shorten(code: str) -> str:
    """Return the primary part of a language's code: `en` for `en-GB`."""
    primary = code.partition("-")[0].lower()
    return SAME.get(primary, primary)


def find_language_problems(stated: Sequence[str], found: Languages) -> list[InputError]:
    """Return which stated languages no row has, and which languages of tags are not stated."""
    wrong = [code for code in stated if _is_refuted(shorten(code), found)]
    known = {shorten(code) for code in stated}
    missing = [f"{code} ({rows} rows)" for code, rows in found.tagged.items() if code not in known]
    lines = []
    if wrong:
        lines.append(f"{STATED} names {', '.join(wrong)}, which no row has: {describe_languages(found)}")
    if missing:
        lines.append(f"{STATED} does not name the rows' tag language: {', '.join(missing)}")
    fix = (
        f"correct {STATED} in params.yaml, or write null: the card then names those of the rows' tag language"
    )
    return [InputError("\n".join(lines), fix)] if lines else []


def _is_refuted(code: str, found: Languages) -> bool:
    if code in found.tagged:
        return False
    if not found.untagged:
        return True
    detected = found.detected or {}
    return code in LANGUAGES and code not in detected and sum(detected.values()) >= MIN_DETECTED


def list_unstated(stated: Sequence[str], found: Languages) -> list[str]:
    """Return the languages that many rows seem to be in, and that are not stated."""
    known = {shorten(code) for code in stated}
    detected = found.detected or {}
    least = max(MIN_DETECTED, MIN_SHARE * sum(detected.values()))
    return [code for code, rows in detected.items() if rows >= least and code not in known]


def describe_languages(found: Languages) -> str:
    """Return the languages of the rows in one line, the commonest first."""
    parts = [_list("by tag", found.tagged), _list("detected", found.detected or {})]
    return "; ".join(part for part in parts if part)


def _list(how: str, counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{how} {', '.join(f'{code} {rows}' for code, rows in ordered)}" if counts else ""


def to_evidence(found: Languages) -> dict[str, Any]:
    """Return the counts for `metrics.json`."""
    detected = None if found.detected is None else dict(sorted(found.detected.items()))
    return {"tagged": dict(sorted(found.tagged.items())), "detected": detected}
