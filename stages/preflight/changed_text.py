"""What the rows hold that the model does not read as it is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

from stages.common.chat.control_tokens import read_control_tokens
from stages.common.chat.fitting import Fitting
from stages.common.chat.template import Encoded, render_prompt
from stages.common.messages import Message, Tool
from stages.common.privacy.row_texts import list_private_texts
from stages.common.records import Row

SHOWN_IDS = 10
SHOWN_CHANGED = 3
SHOWN_CHARS = 60


def describe_text(tokenizer: Any, fitting: Mapping[str, Fitting]) -> dict[str, Any]:
    """Return what the rows hold that is not read as it is written, with the first rows of each kind."""
    control = read_control_tokens(tokenizer)
    held: dict[str, set[str]] = {}
    left_out: dict[str, str] = {}
    looked_at = ""  # the row before: it follows itself where it has several sequences
    changed = 0
    first_changed: list[tuple[Row, Encoded]] = []
    for row, example in chain.from_iterable(fitting.values()):
        if tokens := control.find("\n".join(text for _, text in list_private_texts(row))):
            held[row.id] = set(tokens)
        is_new, looked_at = row.id != looked_at, row.id
        if is_new and (message := find_left_out(tokenizer, row.prompt, row.tools)):
            left_out[row.id] = f"{message.role}: {message.content[:SHOWN_CHARS]}"
        if example.is_changed:
            changed += 1
            if len(first_changed) < SHOWN_CHANGED:
                first_changed.append((row, example))
    return {
        "rows_with_control_tokens_as_text": len(held),
        "control_tokens_as_text": dict(sorted(Counter(chain.from_iterable(held.values())).items())),
        "first_rows_with_control_tokens": sorted(held)[:SHOWN_IDS],
        "prompts_cut_by_the_template": len(left_out),
        "first_prompts_cut": [
            {"id": row_id, "left_out": text} for row_id, text in islice(left_out.items(), SHOWN_CHANGED)
        ],
        "answers_changed_by_the_template": changed,
        "first_answers_changed": [
            {
                "id": row.id,
                "written": row.answer,
                "learned": tokenizer.decode(
                    example.input_ids[example.prompt_length :], clean_up_tokenization_spaces=False
                ),
            }
            for row, example in first_changed
        ],
    }


def find_left_out(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]) -> Message | None:
    """Return the first message whose text is not in the prompt that the template writes; None if all are.

    Blanks around a text may be cut, and a result may be written as JSON.
    """
    prompt = render_prompt(tokenizer, messages, tools)
    control = read_control_tokens(tokenizer)
    for message in messages:
        text = control.hide(message.content).strip()
        quoted = (json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
        if text not in prompt and (message.role != "tool" or not any(form in prompt for form in quoted)):
            return message
    return None
