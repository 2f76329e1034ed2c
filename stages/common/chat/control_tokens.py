"""Control tokens: the tokens that give a prompt its structure, and text in which they stay text.

A tokenizer that reads `<|im_end|>` anywhere in its input returns the id that ends a turn, whoever wrote it.
Here only the chat template can. In the messages, control tokens are hidden from the template; the rendered
prompt is then tokenised by a copy of the tokenizer that knows its control tokens under random names. Those of
the template are given these names; those that a user wrote are shown again and are text like any other, in
the place where they were.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from stages.common.errors import InputError

# Between private-use characters, and random: no text that a template or a user writes holds one by chance.
_NONCE = secrets.token_hex(8)
_HIDDEN = f"\ue000{_NONCE}-"
_HIDDEN_PATTERN = re.compile(rf"{_HIDDEN}(\d+)\ue001")


class ControlTokenRefusal(InputError):
    """A text holds a control token, and this tokenizer cannot read it as text."""


@dataclass(slots=True, weakref_slot=True)
class ControlTokens:
    """The control tokens of one tokenizer.

    Attributes:
        ids: the id of each, by its text.
        backend: the tokenizer behind the tokenizer; None for one that is not a fast tokenizer.
        normalized: whether the tokenizer changes text before it looks for one of them, so that other texts
            than its own can become it.
    """

    ids: Mapping[str, int]
    backend: Any
    normalized: bool
    _pattern: re.Pattern[str] | None = field(init=False)
    _numbers: dict[str, int] = field(init=False)
    _exact: Any = None

    def __post_init__(self) -> None:
        # The longest first, as the tokenizer takes the longest of several that begin at one place.
        texts = sorted(self.ids, key=lambda text: (-len(text), text))
        self._numbers = {text: number for number, text in enumerate(texts)}
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def find(self, text: str) -> list[str]:
        """Return the control tokens that a text holds, in order."""
        return self._pattern.findall(text) if self._pattern else []

    def find_leading(self, text: str) -> list[str]:
        """Return the control tokens that a text begins with, whatever space is between them."""
        leading = text.lstrip()
        found: list[str] = []
        while self._pattern and (token := self._pattern.match(leading)):
            found.append(token[0])
            leading = leading[token.end() :].lstrip()
        return found

    def hide(self, text: str) -> str:
        """Return a text whose control tokens a chat template cannot recognise; `encode` shows them again."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: f"{_HIDDEN}{self._numbers[found[0]]}\ue001", text)

    def show(self, text: str) -> str:
        """Return a text with what `hide` has hidden."""
        texts = list(self._numbers)
        return _HIDDEN_PATTERN.sub(lambda found: texts[int(found[1])], text)

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """Return the token ids of a text: its control tokens become ids, and hidden ones stay text.

        Raises:
            ControlTokenRefusal: some are hidden, and the tokenizer is not a fast one.
        """
        if _HIDDEN not in text and not self.normalized:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        if self._exact is None:
            self._exact = self._build_exact()
        if self._pattern is not None:
            text = self._pattern.sub(lambda found: _rename(self._numbers[found[0]]), text)
        exact: list[int] = self._exact.encode(self.show(text), add_special_tokens=False).ids
        return exact

    def _build_exact(self) -> Any:
        """Return the tokenizer with every control token under a random name."""
        from tokenizers import Tokenizer

        if self.backend is None:
            raise ControlTokenRefusal(
                "a text holds a control token, and the base model's tokenizer is not a fast one "
                "(tokenizer.json), so that the token would become a control id",
                "choose a base model with a tokenizer.json (fetch_base in params.yaml)",
            )
        names = {text: _rename(number) for text, number in self._numbers.items()}
        described = json.loads(self.backend.to_str())
        described.update(post_processor=None, truncation=None, padding=None)
        for token in described["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = described["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
        else:  # unigram: pieces with their scores
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
        return Tokenizer.from_str(json.dumps(described))


def _rename(number: int) -> str:
    return f"<{_NONCE}-{number}>"


_known: WeakKeyDictionary[Any, tuple[Any, ControlTokens]] = WeakKeyDictionary()


def read_control_tokens(tokenizer: Any) -> ControlTokens:
    """Return the control tokens of a tokenizer.

    They are its special tokens, the added tokens that its chat template writes, and the added tokens that
    its model has no piece of text for: `<think>` is one in Qwen3, and `<table>` is a word in Gemma. Blanks
    are never control tokens.
    """
    state = (str(tokenizer.chat_template), len(tokenizer))
    if tokenizer in _known and _known[tokenizer][0] == state:
        return _known[tokenizer][1]
    found = _read(tokenizer)
    _known[tokenizer] = (state, found)
    return found


def _read(tokenizer: Any) -> ControlTokens:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = str(tokenizer.chat_template or "")
    if backend is None:
        special = set(tokenizer.all_special_tokens)
        ids = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip()
            and (token.content in special or token.special or token.content in template)
        }
        return ControlTokens(ids, None, False)
    described = json.loads(backend.to_str())
    vocabulary = described["model"]["vocab"]
    pieces = set(vocabulary if isinstance(vocabulary, dict) else (piece for piece, _ in vocabulary))
    tokens = [
        token
        for token in described["added_tokens"]
        if token["content"].strip()
        and (token["special"] or token["content"] not in pieces or token["content"] in template)
    ]
    changes_text = described.get("normalizer") is not None and any(token["normalized"] for token in tokens)
    return ControlTokens({token["content"]: token["id"] for token in tokens}, backend, changes_text)


def list_special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that decoding without special tokens leaves out.

    A tokenizer's `all_special_ids` are only those with a role, such as the end of sequence: Mistral's
    `[TOOL_CALLS]` has none and is special.
    """
    marked = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(marked) | frozenset(tokenizer.all_special_ids)
