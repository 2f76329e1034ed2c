"""The draft corpus: training prompts and answers as token ids, for an engine's speculative decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.artifacts import atomic_write
from stages.common.chat.template import encode_example, read_answer_frame
from stages.common.records import Row

Example = tuple[list[int], list[int]]
CORPUS = "draft_corpus.npz"  # the file in a model's folder
# The last tokens of a prompt: those before them predict little of the answer, and training data that is not
# needed should not be exported.
PROMPT_TOKENS = 64


def encode_corpus(tokenizer: Any, rows: Sequence[Row], limit: int) -> list[Example]:
    """Return the token ids of prompts and answers; of more than `limit` rows, every nth."""
    step = max(1, -(-len(rows) // limit)) if limit else len(rows) + 1
    chosen = rows[::step] if limit else []
    return [_encode(tokenizer, row) for row in chosen]


def _encode(tokenizer: Any, row: Row) -> Example:
    """Return the last answer of a row as the model writes it, without its end of turn."""
    example = encode_example(tokenizer, row.messages, row.tools)
    answer = example.input_ids[example.prompt_length :]
    end = read_answer_frame(tokenizer).end_id
    length = len(answer) - answer[::-1].index(end) - 1
    return example.input_ids[: example.prompt_length][-PROMPT_TOKENS:], answer[:length]


def write_corpus(path: Path, examples: Sequence[Example]) -> None:
    """Write the corpus as one array of ids and the lengths of its pieces."""
    pieces = [piece for example in examples for piece in example]
    ids = np.array([token for piece in pieces for token in piece], np.int32)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, ids=ids, lengths=np.array([len(piece) for piece in pieces], np.int32))


def read_corpus(path: Path) -> list[Example]:
    """Read what `write_corpus` wrote; a missing file is an empty corpus."""
    if not path.exists():
        return []
    with np.load(path) as arrays:
        ids, ends = arrays["ids"].tolist(), np.cumsum(arrays["lengths"]).tolist()
    pieces = [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    return list(zip(pieces[::2], pieces[1::2], strict=True))
