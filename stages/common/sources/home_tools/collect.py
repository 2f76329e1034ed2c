"""The packaged source of conversations: requests to a smart home, the calls of its tools, and what follows.

Requests are those of `home_intents`: sentences of Home Assistant's own templates, each read by its own
recogniser; the intent becomes the call of a tool. Follow-ups and results are templates of this package
(`phrase_data`). Every call fits its tool's schema, and every conversation has the same tools.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stages.common.messages import Message
from stages.common.records import Row, make_row
from stages.common.sources import Collected
from stages.common.sources.home_intents.collect import LICENSE, check_version
from stages.common.sources.home_intents.grammar import PACKAGE, load_grammar
from stages.common.sources.home_intents.writer import Writer
from stages.common.sources.home_tools.conversations import Conversation, ConversationWriter, make_tags
from stages.common.sources.home_tools.families import TemplatePlan, make_plan
from stages.common.sources.home_tools.follow_ups import read_follow_ups
from stages.common.sources.home_tools.phrases import LANGUAGE, read_words
from stages.common.sources.home_tools.tools import read_tools

SINGLE, PARALLEL, FOLLOW_UPS, NO_CALL = "single", "parallel", "follow_ups", "no_call"


def collect_home_tools(
    version: str,
    rows_per_tool: int,
    rows_per_pair: int,
    rows_per_family: int,
    seed: int,
    system_prompt: str | None,
) -> Collected:
    """Write conversations; the same arguments give the same rows everywhere.

    Args:
        rows_per_tool: conversations of one request, for each tool and for what no tool covers.
        rows_per_pair: conversations of each pair of templates for two requests in one sentence.
        rows_per_family: conversations with follow-ups of each family (`families`).

    Raises:
        InputError: another version of the package is installed.
    """
    check_version(version)
    grammar = load_grammar(LANGUAGE)
    writer = Writer(grammar, read_words(), seed)
    plan = make_plan(grammar.templates, read_follow_ups(), seed)
    conversations = ConversationWriter(grammar, writer, seed)
    before = [Message("system", system_prompt)] if system_prompt else []
    rows = [
        make_row(
            [*before, *conversation.messages],
            f"{PACKAGE}/{version}",
            LICENSE,
            group=group,
            tags=make_tags(conversation, shape, LANGUAGE),
            origin="template",
            tools=read_tools(),
        )
        for shape, group, conversation in _write(
            plan, conversations, rows_per_tool, rows_per_pair, rows_per_family
        )
    ]
    return Collected(tuple(rows), tuple(writer.rejected), _count(rows, plan, writer, conversations))


def _write(
    plan: TemplatePlan,
    writer: ConversationWriter,
    rows_per_tool: int,
    rows_per_pair: int,
    rows_per_family: int,
) -> Iterator[tuple[str, str, Conversation]]:
    """Yield each conversation with its shape and group."""
    for groups in plan.single.values():
        for group, templates in groups.items():
            wanted = math.ceil(rows_per_tool / len(groups) / len(templates))
            for template in templates:
                for conversation in writer.write_single(template, wanted):
                    yield SINGLE, group, conversation
    for pair in plan.pairs:
        for conversation in writer.write_pair(pair, rows_per_pair):
            yield PARALLEL, "+".join(template.group for template in pair), conversation
    for family in plan.families:
        for conversation in writer.write_family(family, rows_per_family):
            yield FOLLOW_UPS, family.name, conversation
    for one in plan.uncovered:
        for conversation in writer.write_uncovered(one, math.ceil(rows_per_tool / len(plan.uncovered))):
            yield NO_CALL, f"no_tool/{one.text}", conversation


def _count(
    rows: list[Row], plan: TemplatePlan, writer: Writer, conversations: ConversationWriter
) -> dict[str, Any]:
    calls = Counter(call.name for row in rows for message in row.messages for call in message.tool_calls)
    return {
        "tools": len(read_tools()),
        "calls": dict(sorted(calls.items())),
        "shapes": dict(sorted(Counter(row.tags["shape"] for row in rows).items())),
        "user_turns": dict(sorted(Counter(row.tags["user_turns"] for row in rows).items())),
        "families": len(plan.families),
        "follow_ups": dict(sorted(conversations.uses.items())),
        "sentences_drawn": writer.drawn,
        "sentences_rejected": dict(sorted(writer.rejected_by_reason.items())),
        "sentences_without_a_tool": conversations.unused,
        "rows_with_a_person": sum("person" in row.tags for row in rows),
    }
