"""Keep personal data and secrets that a row was rejected for out of the files about rejects and changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from stages.common.messages import Message, Tool, format_arguments
from stages.common.privacy.redaction import redact, redact_json
from stages.common.records import Row, format_reject
from stages.curate.rules import PERSONAL, Rejection
from stages.curate.spelling import Change

Rejected = Sequence[tuple[Row, Rejection]]


def format_rejects(rejected: Rejected, kinds: Sequence[str]) -> Iterator[str]:
    """Yield one JSON object a line: id, reason, detail, row; other rows than those keep their text.

    Args:
        kinds: of personal data and secrets that a row is rejected for.
    """
    for row, rejection in rejected:
        shown = redact_row(row, kinds) if is_private(rejection) else row
        yield format_reject(shown, rejection.reason, rejection.detail)


def redact_changes(changes: Iterable[Change], rejected: Rejected, kinds: Sequence[str]) -> Iterator[Change]:
    """Yield the changes, redacted where their row was rejected for personal data."""
    private = {row.id for row, rejection in rejected if is_private(rejection)}
    return (
        replace(change, before=redact_text(change.before, kinds), after=redact_text(change.after, kinds))
        if change.row in private
        else change
        for change in changes
    )


def is_private(rejection: Rejection) -> bool:
    """Return whether a row was rejected for personal data or a secret."""
    return rejection.reason.startswith(PERSONAL)


def redact_row(row: Row, kinds: Sequence[str]) -> Row:
    """Return the row under its own id, with its texts, its group and its tags redacted."""
    return replace(
        row,
        messages=tuple(_redact_message(message, kinds) for message in row.messages),
        rejected=_redact_message(row.rejected, kinds) if row.rejected else None,
        tools=tuple(Tool(_redact_object(tool.text, kinds)) for tool in row.tools),
        group=row.group if row.group == row.id else redact(row.group, kinds),
        tags={key: redact(value, kinds) for key, value in row.tags.items()},
    )


def redact_text(text: str, kinds: Sequence[str]) -> str:
    """Return a text redacted: as JSON where it is JSON, then whatever crosses its strings."""
    return redact(redact_json(text, lambda part: redact(part, kinds)), kinds)


def _redact_message(message: Message, kinds: Sequence[str]) -> Message:
    return replace(
        message,
        content=redact_text(message.content, kinds),
        reasoning=None if message.reasoning is None else redact_text(message.reasoning, kinds),
        tool_calls=tuple(
            replace(call, arguments=_redact_object(call.arguments, kinds)) for call in message.tool_calls
        ),
    )


def _redact_object(text: str, kinds: Sequence[str]) -> str:
    """Return the text of a JSON object redacted, which stays one, whatever crosses its strings."""
    redacted = redact_json(text, lambda part: redact(part, kinds))
    whole = redact(redacted, kinds)
    return redacted if whole == redacted else format_arguments({"redacted": whole})
