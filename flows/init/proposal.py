"""The values of `params.yaml` that follow from the data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.init.estimate import TEMPLATE_TOKENS
from flows.init.reading import DataFile
from stages.common.errors import InputError
from stages.common.licenses import to_spdx
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.params.services import MAX_MESSAGES
from stages.common.sources.detection.survey import Spread, Survey
from stages.common.sources.detection.task_kind import TaskKind
from stages.common.sources.detection.tool_use import ToolUse
from stages.common.sources.files.entries import count
from stages.common.task.settings import CONVERSATIONS

USUAL_LICENSES = (
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "odbl-1.0",
    "odc-by-1.0", "pddl-1.0", "gpl-3.0-only", "LicenseRef-Proprietary",
)  # fmt: skip
# What these allow includes another licence for the adapter; others are passed on to it.
PERMISSIVE = re.compile(
    r"(apache|mit|bsd|isc|cc0|cc-by-[\d.]+$|odc-by|pddl|unlicense|cdla-permissive)", re.IGNORECASE
)
SYSTEM_PROMPTS = {
    "json": "Answer with one JSON object.",
    "label": "Answer with one label.",
}  # of other kinds: none
BIAS_GROUPS = ("person_gender", "person_origin", "source")  # of any rows; others are tags of the default ones
PERSON_SLICES = ("person_gender", "person_origin")
MEASURED_ONLY = {"min_representation_ratio": None, "max_cramers_v": None}
MAX_ANSWER_TOKENS = 512  # asked for in the evaluation
ROOM = 1.25  # a limit has a quarter more than the 95th percentile, so that few rows are over it
# The default task's loss is near its end after a third of its 5,800 rows (docs/benchmarks.md).
ENOUGH_ROWS = 2000
MAX_EPOCHS = 10
# The two recipes measured there. Few rows need many small steps; many rows train faster in larger batches.
FEW_ROWS = 4000
SMALL_STEPS: Mapping[str, Any] = {"batch_size": 4, "learning_rate": 0.003}
LARGE_STEPS: Mapping[str, Any] = {"batch_size": 16, "learning_rate": 0.001}
MIN_LANGUAGE_SHARE = 0.05
SHOWN_LABELS = 8
SHARE_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found in the data.

    Attributes:
        languages: rows by language; None: not detected.
        tool_use: of conversations; None for single questions without tools.
    """

    files: Sequence[DataFile]
    task: TaskKind
    survey: Survey
    languages: Mapping[str, int] | None
    tool_use: ToolUse | None = None


def check_license(license: str) -> str:
    """Return a licence as it is written in `params.yaml`.

    Raises:
        InputError: it is not an SPDX expression.
    """
    spdx = to_spdx(license) if license.strip() else None
    if spdx is None:
        raise InputError(
            f"the licence {license!r} is not an SPDX expression"
            f"{suggest_nearest(license.lower(), USUAL_LICENSES)}",
            "give the id of the licence of your data (https://spdx.org/licenses), such as cc-by-4.0, or "
            "LicenseRef-Proprietary for data of your own",
        )
    return spdx if spdx.startswith("LicenseRef-") or " " in spdx else spdx.lower()


def propose(
    found: Findings, license: str, origin: str, system_prompt: str | None, params: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the new values by section and key; the raw parameters give the ones that they change."""
    tags = list(dict.fromkeys(tag for file in found.files for tag in file.columns.tags))
    max_length = propose_max_length(found.survey.row_tokens, params)
    return {
        "task": _propose_task(found, tags, system_prompt),
        "collect": {"sources": [file.as_entry(license, origin) for file in found.files]},
        "curate": _propose_curate(found.survey, params["curate"]),
        "validate": _propose_validate(found, license, params["validate"]),
        "check_bias": {"groups": _propose_groups(tags, params["check_bias"]["groups"])},
        # The limit of a group is for the templates of home_intents, and a limit of all for former data.
        "split": {"max_train_rows_per_group": None, "max_train_rows": None},
        "ask_base": {
            "max_new_tokens": _propose_new_tokens(found.survey, params["ask_base"]["max_new_tokens"])
        },
        "finetune": {
            "max_length": max_length,
            **_propose_finetune(found.survey, params["split"]),
        },
        "services": {"guard": _propose_guard(found.survey, max_length, params["services"]["guard"])},
        "model_card": _propose_card(found, license, params),
    }


def _propose_task(found: Findings, tags: Sequence[str], system_prompt: str | None) -> dict[str, Any]:
    task = found.task
    have_own = found.survey.own_system > found.survey.rows / 2
    has_classes = task.kind in ("label", "tools") or task.label_key is not None
    return {
        "kind": task.kind,
        "label_key": task.label_key,
        "labels": None,
        "system_prompt": _choose_system_prompt(
            system_prompt, None if have_own else SYSTEM_PROMPTS.get(task.kind)
        ),
        "stratify_by": "label" if has_classes else None,
        "slices": [*PERSON_SLICES, *tags],
    }


def _choose_system_prompt(given: str | None, usual: str | None) -> str | None:
    """Return what the user gave, of which '' is none, else the usual one of the kind."""
    return usual if given is None else given or None


def _propose_validate(found: Findings, license: str, validate: Mapping[str, Any]) -> dict[str, Any]:
    survey = found.survey
    allowed = list(validate["allowed_licenses"])
    if license.lower() not in [name.lower() for name in allowed]:
        allowed.append(license)
    values: dict[str, Any] = {
        "allowed_licenses": allowed,
        "max_prompt_chars": max(validate["max_prompt_chars"], 2 * _raise_limit(1, survey.question_chars)),
        "max_answer_chars": _raise_limit(validate["max_answer_chars"], survey.answer_chars),
    }
    if found.task.kind in CONVERSATIONS:  # of which the tools and all earlier turns are in the prompt
        longest = math.ceil(ROOM * survey.largest_prompt_chars / 100) * 100
        values["max_prompt_chars"] = max(values["max_prompt_chars"], longest)
    if found.task.kind == "tools":  # one tool can be learned: when to call it, and with what
        values["min_labels"] = min(validate["min_labels"], len(survey.classes))
    if survey.classes and "max_label_share" in validate:
        largest = max(survey.classes.values()) / sum(survey.classes.values())
        if largest > validate["max_label_share"]:
            values["max_label_share"] = min(1.0, round(largest + SHARE_MARGIN, 2))
    return values


def _propose_groups(tags: Sequence[str], groups: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: limits for name, limits in groups.items() if name in BIAS_GROUPS or name in tags}
    return kept | {tag: dict(MEASURED_ONLY) for tag in tags if tag not in kept}


def _propose_new_tokens(survey: Survey, current: int) -> int:
    return max(current, min(MAX_ANSWER_TOKENS, math.ceil(ROOM * survey.answer_tokens.p95)))


def propose_max_length(row_tokens: Spread, params: Mapping[str, Any]) -> int:
    """Return a length for training that long rows such as passages pass, up to what the service reads."""
    current: int = params["finetune"]["max_length"]
    readable: int = params["services"]["engine"]["context_tokens"]
    wanted = math.ceil(ROOM * (row_tokens.p95 + TEMPLATE_TOKENS) / 64) * 64
    return max(current, min(readable, wanted))


def _propose_guard(survey: Survey, max_length: int, guard: Mapping[str, Any]) -> dict[str, Any]:
    """Return the guard with limits that a prompt passes which was learned."""
    return {
        **guard,
        "max_prompt_tokens": max(guard["max_prompt_tokens"], max_length),
        "max_messages": max(guard["max_messages"], min(MAX_MESSAGES, survey.most_messages)),
    }


def _propose_curate(survey: Survey, curate: Mapping[str, Any]) -> dict[str, Any]:
    """Return limits that most questions and answers pass, such as passages with a question."""
    return {
        "max_question_chars": _raise_limit(curate["max_question_chars"], survey.question_chars),
        "max_answer_chars": _raise_limit(curate["max_answer_chars"], survey.answer_chars),
    }


def _raise_limit(current: int, chars: Spread) -> int:
    return max(current, math.ceil(ROOM * chars.p95 / 100) * 100)


def _propose_finetune(survey: Survey, split: Mapping[str, Any]) -> dict[str, Any]:
    """Return the passes that show enough rows, one for a large data set, and the size of the steps."""
    share: float = 1.0 - split["test_fraction"] - split["validation_fraction"]
    train_rows = max(1.0, share * (survey.rows - survey.duplicates - survey.long_rows))
    epochs = min(MAX_EPOCHS, math.ceil(ENOUGH_ROWS / train_rows))
    return {"epochs": epochs, **(SMALL_STEPS if epochs * train_rows <= FEW_ROWS else LARGE_STEPS)}


def _propose_card(found: Findings, license: str, params: Mapping[str, Any]) -> dict[str, Any]:
    names = ", ".join(file.path.name for file in found.files)
    languages = pick_languages(found.languages)
    card: dict[str, Any] = {
        "name": f"{_slug(_data_name(found.files))}-{_slug(_base_name(params['fetch_base']))}",
        "license": params["fetch_base"]["license"] or license,
        "intended_use": f"{_describe_use(found)} It was trained on {names}.",
        "out_of_scope": (
            "Requests unlike those in its training data"
            + (f", languages other than {', '.join(languages)}" if languages else "")
            + ", and decisions about people that no person reviews."
        ),
    }
    if not PERMISSIVE.match(license):
        card["license"] = license
    card["language"] = languages or None  # null: not stated
    return card


def pick_languages(languages: Mapping[str, int] | None) -> list[str]:
    """Return the languages of a share worth naming, the commonest first."""
    total = sum((languages or {}).values())
    return [code for code, rows in (languages or {}).items() if rows >= MIN_LANGUAGE_SHARE * total]


def _describe_use(found: Findings) -> str:
    if found.task.kind == "label":
        labels = list(found.survey.classes)
        more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
        return f"Give a text one of {len(labels)} labels: {', '.join(labels[:SHOWN_LABELS])}{more}."
    if found.task.kind == "json":
        key = found.task.label_key
        return f"Turn a request into one JSON object{f', whose {key} names its class' if key else ''}."
    if found.task.kind == "tools" and found.tool_use is not None:
        return f"Call {count(found.tool_use.tools, 'tool')}, and answer with what they return."
    return "Answer requests like those of its training data."


def _data_name(files: Sequence[DataFile]) -> str:
    """Return the name of the one file, or of the folder of several."""
    if len(files) == 1:
        return files[0].path.name.split(".")[0]
    folders = {file.path.parent.name for file in files}
    return folders.pop() if len(folders) == 1 and folders != {"data"} else "own-data"


def _base_name(fetch_base: Mapping[str, Any]) -> str:
    name = (
        Path(fetch_base["file"]).name.split(".")[0]
        if fetch_base.get("file")
        else Path(fetch_base["name"]).name
    )
    return re.sub(r"-(instruct|chat|it)$", "", name, flags=re.IGNORECASE)


def _slug(name: str) -> str:
    """Return a name of letters, digits and dashes, as the name of a model must be."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "model"
