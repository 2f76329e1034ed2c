"""Make the task from settings, or from what a stage has written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, missing, read_json
from stages.common.errors import InputError
from stages.common.task.json_task import JsonTask
from stages.common.task.label_task import LabelTask
from stages.common.task.protocol import Task
from stages.common.task.settings import TaskSettings
from stages.common.task.text_task import ChatTask, TextTask
from stages.common.task.tools_task import ToolsTask

TASK_FILE = artifacts("curate") / "task.json"
# A set of labels is closed if rows share them: with more labels than this to a row, most occur once.
MAX_LABELS_PER_ROW = 0.5


def resolve_task(settings: TaskSettings, answers: Iterable[str]) -> Task:
    """Return the task that the settings describe; a null `labels` is the set of these answers.

    Raises:
        InputError: the answers are not a closed set of labels.
    """
    if settings.kind != "label" or settings.labels is not None:
        return make_task(settings.model_dump())
    rows = Counter(map(str.strip, answers))
    labels = sorted(label for label in rows if len(label.splitlines()) == 1)
    if len(labels) > MAX_LABELS_PER_ROW * rows.total():
        raise InputError(
            f"task.kind is label, but {rows.total()} rows have {len(labels)} different answers, "
            f"such as {labels[0][:60]!r}",
            "set task.kind: text if answers are free text, or list the labels in task.labels",
        )
    return LabelTask(tuple(labels))


def make_task(values: Mapping[str, Any]) -> Task:
    """Return the task of values such as `Task.describe` gives."""
    if values["kind"] == "json":
        return JsonTask(values["label_key"])
    if values["kind"] == "label":
        return LabelTask(tuple(sorted(values["labels"])))
    if values["kind"] == "text":
        return TextTask(values.get("primary_metric") or "chrf")
    if values["kind"] == "chat":
        return ChatTask(values.get("primary_metric") or "chrf")
    if values["kind"] == "tools":
        return ToolsTask()
    raise ValueError(f"no kind of task is called {values['kind']!r}")


def read_task(root: Path = Path()) -> Task:
    """Return the task that the stage `curate` resolved in a checkout.

    Raises:
        InputError: curate has not run.
    """
    if not (root / TASK_FILE).exists():
        raise missing(TASK_FILE)
    return make_task(read_json(root / TASK_FILE))
