"""Checks of prompts and answers; each returns a `GuardDecision`.

Prompts: control tokens, prompt injection, toxicity. Answers: JSON schema, secrets, personal data. All checks
are linear in the length of the text; the service bounds that length before it calls them.

Limits:

- The guard does not make attacks impossible. The two text classifiers are small and linear, trained on
  sentences written for this project; docs/benchmarks.md shows what they miss, including attacks by other
  authors. If the model's answers trigger actions, enforce permissions where the actions run.
- Each message is checked by itself: an attack spread over several messages is not detected.
- Base64, hex, leetspeak, look-alike and invisible characters are decoded; ROT13, ciphers, reversed text and
  images are not. Coverage outside European languages, Chinese and Japanese is poor.
- Toxicity means abuse of people: insults, threats, hatred. Polite requests for harmful content are not
  detected.
- Secrets and personal data are matched by their format: a password in a plain sentence is not found.
- System messages come from the operator and are not checked.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from services.guard.text_classifier import TextClassifier, load_classifier
from stages.common.errors import InputError
from stages.common.messages import read_strict_json
from stages.common.privacy import personal_data
from stages.common.privacy.secrets import find_named_secrets
from stages.common.tools.validation import choose_validator, make_validator

DATA = Path(__file__).parent / "data"

# Control tokens of common chat templates. A tokenizer parses them anywhere in a prompt, so inside a message
# they forge a turn.
CONTROL_TOKENS = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|begin_of_text|end_of_text|start_header_id|end_header_id"
    r"|eot_id|eom_id|system|user|assistant|end|endofprompt|start|message|channel)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|<｜(?:User|Assistant|begin▁of▁sentence)｜>",
    re.IGNORECASE,
)

# Long enough for one short instruction; shorter runs are mostly words or ids.
BASE64 = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{20,}={0,2}")
HEX = re.compile(r"(?<![0-9A-Fa-f])(?:[0-9A-Fa-f]{2}[ :]?){12,}")
MIN_PRINTABLE = 0.95  # share of a decoded text; random bytes have about a third


@dataclass(frozen=True, slots=True)
class GuardDecision:
    """The result of a check: allow, or reject with a stable reason code."""

    allow: bool
    reason: str | None = None


ALLOW = GuardDecision(allow=True)


def check_control_tokens(texts: Sequence[str], tokens: Sequence[str]) -> GuardDecision:
    """Reject text that contains one of the model's control tokens.

    The chat template reads them as text (`stages.common.chat.control_tokens`); token ids of a raw prompt are
    not read by it, and forge a turn.
    """
    forged = any(token in text for text in texts for token in tokens)
    return GuardDecision(False, "control_tokens") if forged else ALLOW


def check_injection(messages: Sequence[Mapping[str, str]]) -> GuardDecision:
    """Reject messages that forge turns or try to override the operator's instructions."""
    for text in _untrusted_texts(messages):
        if CONTROL_TOKENS.search(text):
            return GuardDecision(False, "control_tokens")
        if score_injection(text) > load_injection_model().threshold:
            return GuardDecision(False, "prompt_injection")
    return ALLOW


def check_toxicity(messages: Sequence[Mapping[str, str]]) -> GuardDecision:
    """Reject messages that insult, threaten or express hatred."""
    model = load_toxicity_model()
    if any(model.score(text) > model.threshold for text in _untrusted_texts(messages)):
        return GuardDecision(False, "toxicity")
    return ALLOW


def check_schema(answer: str, schema: str) -> GuardDecision:
    """Reject an answer that is not JSON or does not validate against `schema` (JSON Schema, as JSON text).

    Raises:
        InputError: the schema is not valid.
    """
    try:
        value = read_strict_json(answer)
    except (ValueError, RecursionError):
        return GuardDecision(False, "not_json")
    try:
        valid = _compile_validator(schema).is_valid(value)
    except TimeoutError:
        return GuardDecision(False, "schema_too_slow")
    except Exception as error:
        if isinstance(error, RecursionError) or type(error).__name__ == "_WrappedReferencingError":
            raise InputError(
                "the JSON schema has an endless or unresolvable reference",
                "put every definition under $defs, and do not refer to other documents",
            ) from None
        raise
    return ALLOW if valid else GuardDecision(False, "schema_mismatch")


def check_secrets(answer: str) -> GuardDecision:
    """Reject an answer that contains a key, token or password; the reason names the kind."""
    kind, _ = next(find_named_secrets(answer), (None, None))
    return ALLOW if kind is None else GuardDecision(False, f"secret_{kind}")


def check_personal_data(
    answer: str, kinds: Sequence[str] = tuple(personal_data.PERSONAL_DATA)
) -> GuardDecision:
    """Reject an answer that contains personal data of one of `kinds`; the reason names the kind."""
    kind = next((kind for kind in kinds if personal_data.holds(kind, answer)), None)
    return ALLOW if kind is None else GuardDecision(False, f"personal_{kind}")


def score_injection(text: str) -> float:
    """Return the highest injection score of a text and of anything encoded in it."""
    model = load_injection_model()
    return max(model.score(candidate) for candidate in (text, *decode_hidden(text)))


def decode_hidden(text: str) -> Iterator[str]:
    """Yield the decoded base64 and hex runs of a text that decode to text."""
    for match in BASE64.finditer(text):
        run = match.group().rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
        try:
            yield from _decode_printable(
                base64.b64decode(run[: len(run) - (len(run) % 4 == 1)] + "==", validate=False)
            )
        except binascii.Error:
            continue
    for match in HEX.finditer(text):
        digits = match.group().replace(" ", "").replace(":", "")
        yield from _decode_printable(bytes.fromhex(digits))


def warm_up() -> None:
    """Load both classifiers, so that the first request does not wait for them."""
    score_injection("")
    load_toxicity_model().score("")


@cache
def load_injection_model() -> TextClassifier:
    """Return the classifier of prompt injections."""
    return load_classifier(DATA / "injection.npz")


@cache
def load_toxicity_model() -> TextClassifier:
    """Return the classifier of abuse."""
    return load_classifier(DATA / "toxicity.npz")


def _untrusted_texts(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield all texts but the operator's; assistant messages count, since a client can invent them."""
    return (message["content"] for message in messages if message["role"] not in ("system", "developer"))


def _decode_printable(data: bytes) -> Iterator[str]:
    for encoding in ("utf-8", "utf-16-le"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        printable = sum(c.isprintable() or c.isspace() for c in text)
        # Almost any two bytes are valid UTF-16, so there only ASCII counts as text.
        if text and printable >= MIN_PRINTABLE * len(text) and (encoding == "utf-8" or text.isascii()):
            yield text
            return


@lru_cache(maxsize=128)  # schemas come from requests, so the cache is bounded
def _compile_validator(schema: str) -> Any:
    """Compile a schema."""
    import jsonschema  # type: ignore[import-untyped]

    try:
        parsed = json.loads(schema)
        choose_validator(parsed).check_schema(parsed)
    except (ValueError, RecursionError, jsonschema.SchemaError) as error:
        problem = getattr(error, "message", str(error))
        raise InputError(
            f"the JSON schema is not valid: {problem}", "send a schema of draft 2020-12 or earlier"
        ) from None
    if _has_pattern_properties(parsed):
        raise InputError(
            "the JSON schema has patternProperties, which is not supported",
            "list the properties, or allow additional ones",
        )
    return make_validator(parsed)


def _has_pattern_properties(schema: object) -> bool:
    """Return whether the keyword is used: jsonschema would run its patterns without a time limit."""
    if isinstance(schema, list):
        return any(_has_pattern_properties(part) for part in schema)
    if not isinstance(schema, dict):
        return False
    return "patternProperties" in schema or any(_has_pattern_properties(part) for part in schema.values())
