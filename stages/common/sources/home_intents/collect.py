"""The packaged default source: spoken requests to a smart home, and the intents they call.

The package `home-assistant-intents` (Apache-2.0) has sentence templates; `hassil` is the recogniser that
Home Assistant uses. Each template is expanded at random, its slots are filled from `lexicon`, and the
answer is what the recogniser returns for the sentence with that template. A sentence is kept only if that
equals what was filled in, and if no other template of the language matches it as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import math
from collections import Counter

from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.records import Row, make_row
from stages.common.sources import Collected
from stages.common.sources.home_intents.grammar import (
    PACKAGE,
    Template,
    load_grammar,
    select_reserved_groups,
)
from stages.common.sources.home_intents.lexicon import Person, read_lexicon
from stages.common.sources.home_intents.writer import Writer

LICENSE = "apache-2.0"


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

    `reserved_share` of each intent's templates give no rows (`select_reserved_groups`).

    Raises:
        InputError: another version is installed, or the language is not in the package or the lexicon.
    """
    check_version(version)
    grammar = load_grammar(language)
    lexicon = read_lexicon(language)
    reserved = select_reserved_groups(grammar, reserved_share, seed)
    templates = [template for template in grammar.templates if template.group not in reserved]
    templates_of = Counter(template.intent for template in templates)
    writer = Writer(grammar, lexicon, seed)
    rows: list[Row] = []
    for template in templates:
        wanted = max(rows_per_template, math.ceil(min_rows_per_intent / templates_of[template.intent]))
        for text, answer, person in writer.write(template, wanted):
            rows.append(_row(template, text, answer, person, system_prompt, f"{PACKAGE}/{version}", language))
    metrics = {
        "templates": len(grammar.templates),
        "templates_with_rows": len({row.group for row in rows}),
        "intents": len({row.tags["intent"] for row in rows}),
        "sentences_drawn": writer.drawn,
        "sentences_rejected": dict(sorted(writer.rejected_by_reason.items())),
        "rows_with_a_person": sum("person" in row.tags for row in rows),
    }
    if reserved:
        metrics["templates_reserved"] = len(grammar.templates) - len(templates)
    return Collected(tuple(rows), tuple(writer.rejected), metrics)


def check_version(version: str) -> None:
    """Check that the installed templates are of the version that `params.yaml` names.

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
