"""The class of a row: by it rows are divided, and groups of people are compared."""

from __future__ import annotations

from stages.common.records import Row
from stages.common.task.protocol import Task


def read_row_class(row: Row, task: Task) -> str | None:
    """Return the class of a row: that of its first learned turn with a call, else that of its answer.

    The last turn of most conversations with tools is a text about the results.
    """
    calling = (m.answer for m in row.messages if m.tool_calls and m.is_learned is not False)
    return task.read_class(next(calling, row.answer))
