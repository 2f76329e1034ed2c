"""The bytes of a single token: a character may be divided among several, so a token need not be text."""

from __future__ import annotations

import json
from typing import Any


class TokenBytes:
    """Returns the bytes of tokens, and a text for each that no other bytes have.

    Args:
        tokenizer: the fast tokenizer of transformers.
    """

    __slots__ = ("_added", "_is_byte_level", "_known", "_tokenizer")

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._added: dict[int, str] | None = None
        self._is_byte_level = False

    def get_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; of a control token, those of its name."""
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def get_text(self, token_id: int) -> str:
        """Return the text of a token; `bytes:` and escapes, as OpenAI does, where its bytes are no text."""
        content = self.get_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _read(self, token_id: int) -> bytes:
        if self._added is None:
            self._load()
        assert self._added is not None
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # logits may outnumber tokens
            return b""
        if self._is_byte_level:
            return b"".join(_BYTES.get(char) or char.encode() for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("▁", " ").encode()  # SentencePiece's blank

    def _load(self) -> None:
        self._added = {
            number: str(token.content) for number, token in self._tokenizer.added_tokens_decoder.items()
        }
        decoder = json.loads(self._tokenizer._tokenizer.to_str())["decoder"] or {}
        parts = decoder.get("decoders", [decoder])
        self._is_byte_level = any(part.get("type") == "ByteLevel" for part in parts)


def _map_bytes() -> dict[str, bytes]:
    """Return the characters that byte-level tokenizers write for bytes.

    Printable bytes of Latin-1 are themselves; the others follow in order from U+0100 (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    shown |= {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return {char: bytes([byte]) for char, byte in shown.items()}


_BYTES = _map_bytes()
