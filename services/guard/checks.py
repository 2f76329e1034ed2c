"""Checks of what comes in and of what goes out; each returns a `Verdict` and changes nothing.

In: number of turns, bytes, tokens; prompt injection; toxicity. Out: the answer's JSON schema, secrets,
personal data. All work is linear in the text, whose size `check_size` bounds first.

What this does not do:

- It does not make an attack impossible. The two text models are small and linear, trained on sentences
  written for this project; docs/benchmarks.md has what they miss, on attacks that others wrote too. A model
  whose answers can open doors needs its limits where the doors are.
- It judges each message by itself: an attack spread over several, or built up slowly, is not seen.
- Rot13, ciphers, text set backwards and pictures are not decoded; base64, hex, leetspeak, look-alike and
  invisible characters are. Languages other than the European ones, Chinese and Japanese are hardly known.
- Toxicity means abuse of people: insults, threats, hatred. Whether a polite request is harmful is not judged.
- Secrets and personal data are known by their shape: a password in a plain sentence is not.
- System messages are the operator's own, and are not judged.
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

from services.guard.text_classifier import TextModel, load
from stages.common import personal_data
from stages.common.errors import InputError

DATA = Path(__file__).parent / "data"

# Marks by which chat templates tell turns apart. A tokenizer reads them as such wherever they stand: in a
# message they forge a turn.
CONTROL_TOKENS = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|begin_of_text|end_of_text|start_header_id|end_header_id"
    r"|eot_id|eom_id|system|user|assistant|end|endofprompt|start|message|channel)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|<｜(?:User|Assistant|begin▁of▁sentence)｜>",
    re.IGNORECASE,
)

# Long enough for one short order; what is shorter is mostly a word or an id.
BASE64 = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{20,}={0,2}")
HEX = re.compile(r"(?<![0-9A-Fa-f])(?:[0-9A-Fa-f]{2}[ :]?){12,}")
MAX_PATTERN_S = 0.1  # for one regular expression of a request's schema
MIN_PRINTABLE = 0.95  # of decoded text; random bytes have a third

# Shapes of secrets that their makers gave a fixed beginning, as secret scanners know them (gitleaks,
# detect-secrets). Every repetition is bounded or possessive: no pattern looks at a character often.
SECRETS: dict[str, re.Pattern[str]] = {
    "private_key": re.compile(
        r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-[23]:"
    ),
    "aws_access_key": re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Z0-9])"),
    "google_api_key": re.compile(r"(?<![\w-])AIza[\w-]{35}(?![\w-])"),
    "google_oauth": re.compile(r"(?<![\w-])(?:GOCSPX-[\w-]{28}|ya29\.[\w-]{20,512})"),
    "github_token": re.compile(r"(?<![\w-])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{60,255})"),
    "gitlab_token": re.compile(r"(?<![\w-])gl(?:pat|ptt|dt|rt|cbt|oas|soat)-[\w-]{20,64}"),
    "slack_token": re.compile(
        r"(?<![\w-])xox[abeoprs]-[\w-]{10,250}|hooks\.slack\.com/(?:services|workflows)/[\w/+-]{40,80}"
    ),
    "stripe_key": re.compile(
        r"(?<![\w-])(?:(?:sk|rk)_(?:live|test|prod)_[A-Za-z0-9]{10,99}|whsec_[\w+/=-]{24,99})"
    ),
    "openai_key": re.compile(r"(?<![\w-])sk-(?:proj-|svcacct-|admin-|or-v1-)?[\w-]{32,200}"),
    "anthropic_key": re.compile(r"(?<![\w-])sk-ant-[\w-]{20,200}"),
    "huggingface_token": re.compile(r"(?<![\w-])(?:hf|api_org)_[A-Za-z]{34}(?![A-Za-z])"),
    "pypi_token": re.compile(r"(?<![\w-])pypi-AgE[\w-]{50,1000}"),
    "npm_token": re.compile(r"(?<![\w-])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    "sendgrid_key": re.compile(r"(?<![\w-])SG\.[\w-]{16,32}\.[\w-]{16,64}"),
    "telegram_token": re.compile(r"(?<!\d)\d{8,10}:AA[\w-]{32,33}(?![\w-])"),
    "discord_token": re.compile(r"(?<![\w-])[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}(?![\w-])"),
    "azure_key": re.compile(r"AccountKey=[A-Za-z0-9+/]{86}=="),
    "digitalocean_token": re.compile(r"(?<![\w-])do[opr]_v1_[a-f0-9]{64}"),
    "vault_token": re.compile(r"(?<![\w-])hv[sb]\.[\w-]{24,300}"),
    "age_key": re.compile(r"AGE-SECRET-KEY-1[A-Z0-9]{58}"),
    "perennial_key": re.compile(r"(?<![\w-])perennial-[\w-]{43}(?![\w-])"),
    "json_web_token": re.compile(r"(?<![\w-])eyJ[\w-]{10,4096}\.eyJ[\w-]{10,4096}\.[\w-]{10,4096}"),
    "password_in_url": re.compile(
        r"(?<![a-z0-9])[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{0,128}:[^\s/:@\"'<>]{3,128}@[\w.\[-]", re.I
    ),
    "assigned_secret": re.compile(
        r"(?:api[_-]?key|secret(?:[_-]?(?:key|access[_-]?key))?|(?:access|auth)[_-]?token|passw(?:or)?d"
        r"|client[_-]?secret)"
        r"[\"']?\s{0,8}[:=]\s{0,8}[\"'](?=[^\"'\s]{0,128}\d)[^\"'\s]{12,128}[\"']",
        re.I,
    ),
}
EXAMPLE = re.compile(r"x{6}|\*{4}|\.\.\.|example|placeholder|your[_-]|changeme|<[a-z_-]+>", re.I)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a text may pass, and the stable code of the reason where it may not."""

    allow: bool
    reason: str | None = None


PASS = Verdict(allow=True)


def check_turns(messages: Sequence[Mapping[str, str]], max_turns: int) -> Verdict:
    """Refuse a conversation of more messages (system messages not counted) than `max_turns`."""
    turns = sum(message["role"] != "system" for message in messages)
    return PASS if turns <= max_turns else Verdict(False, "too_many_turns")


def check_size(messages: Sequence[Mapping[str, str]], max_bytes: int) -> Verdict:
    """Refuse a conversation in which one message has more than `max_bytes` of UTF-8."""
    sizes = (len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
    return PASS if all(size <= max_bytes for size in sizes) else Verdict(False, "message_too_large")


def check_tokens(tokens: int, max_tokens: int) -> Verdict:
    """Refuse a prompt of more than `max_tokens`."""
    return PASS if tokens <= max_tokens else Verdict(False, "too_many_tokens")


def check_control_tokens(texts: Sequence[str], tokens: Sequence[str]) -> Verdict:
    """Refuse text in which a token stands that steers the model: whoever writes one can forge a turn."""
    forged = any(token in text for text in texts for token in tokens)
    return Verdict(False, "control_tokens") if forged else PASS


def check_injection(messages: Sequence[Mapping[str, str]]) -> Verdict:
    """Refuse a conversation in which a message forges turns, or tries to replace the operator's orders."""
    for text in _judged(messages):
        if CONTROL_TOKENS.search(text):
            return Verdict(False, "control_tokens")
        if injection_score(text) > injection_model().threshold:
            return Verdict(False, "prompt_injection")
    return PASS


def check_toxicity(messages: Sequence[Mapping[str, str]]) -> Verdict:
    """Refuse a conversation in which a message insults, threatens or shows hatred."""
    model = toxicity_model()
    if any(model.score(text) > model.threshold for text in _judged(messages)):
        return Verdict(False, "toxicity")
    return PASS


def check_schema(answer: str, schema: str) -> Verdict:
    """Refuse an answer that is not JSON, or does not fit `schema` (JSON Schema, as JSON text).

    Raises:
        InputError: the schema is none.
    """
    try:
        value = json.loads(answer, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return Verdict(False, "not_json")
    try:
        fits = _validator(schema).is_valid(value)
    except TimeoutError:
        return Verdict(False, "schema_too_slow")
    except Exception as error:
        if isinstance(error, RecursionError) or type(error).__name__ == "_WrappedReferencingError":
            raise InputError(
                "the JSON schema refers to itself without end, or to what is not in it",
                "put every definition under $defs, and send no references to other documents",
            ) from None
        raise
    return PASS if fits else Verdict(False, "schema_mismatch")


def check_secrets(answer: str) -> Verdict:
    """Refuse an answer with something of the shape of a key, token or password; the reason says which."""
    kind = next(secret_kinds(answer), None)
    return PASS if kind is None else Verdict(False, f"secret_{kind}")


def check_personal_data(answer: str, kinds: Sequence[str] = tuple(personal_data.PERSONAL_DATA)) -> Verdict:
    """Refuse an answer in which one of `kinds` of personal data stands; the reason says which."""
    kind = next((kind for kind in kinds if personal_data.holds(kind, answer)), None)
    return PASS if kind is None else Verdict(False, f"personal_{kind}")


def injection_score(text: str) -> float:
    """Return the injection model's score of a text, and of what is encoded in it, whichever is higher."""
    model = injection_model()
    return max(model.score(candidate) for candidate in (text, *decoded(text)))


def secret_kinds(text: str) -> Iterator[str]:
    """Yield the kinds of secrets that stand in a text; what documentation shows in their place is none."""
    for kind, pattern in SECRETS.items():
        if any(not EXAMPLE.search(match.group()) for match in pattern.finditer(text)):
            yield kind


def decoded(text: str) -> Iterator[str]:
    """Yield what is written in base64 or hex in a text, where that is text again."""
    for match in BASE64.finditer(text):
        run = match.group().rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
        try:
            yield from _readable(
                base64.b64decode(run[: len(run) - (len(run) % 4 == 1)] + "==", validate=False)
            )
        except binascii.Error:
            continue
    for match in HEX.finditer(text):
        digits = match.group().replace(" ", "").replace(":", "")
        yield from _readable(bytes.fromhex(digits))


def warm() -> None:
    """Load what the checks need, so that the first request does not wait for it."""
    injection_score("")
    toxicity_model().score("")


@cache
def injection_model() -> TextModel:
    """Return the model that knows prompt injections."""
    return load(DATA / "injection.npz")


@cache
def toxicity_model() -> TextModel:
    """Return the model that knows abuse."""
    return load(DATA / "toxicity.npz")


def _judged(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield the texts that are not the operator's: also answers, which a client can make up."""
    return (message["content"] for message in messages if message["role"] not in ("system", "developer"))


def _readable(data: bytes) -> Iterator[str]:
    for encoding in ("utf-8", "utf-16-le"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        printable = sum(c.isprintable() or c.isspace() for c in text)
        # UTF-16 finds a sign in any two bytes: there, only ASCII counts as text.
        if text and printable >= MIN_PRINTABLE * len(text) and (encoding == "utf-8" or text.isascii()):
            yield text
            return


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@lru_cache(maxsize=128)  # schemas come from requests: a bound keeps their number from filling the memory
def _validator(schema: str) -> Any:
    """Return the compiled validator of a schema.

    References to other documents are not followed: a request must not make the server fetch anything.
    """
    import jsonschema  # type: ignore[import-untyped]
    import referencing

    try:
        parsed = json.loads(schema)
        kind = jsonschema.validators.validator_for(parsed, jsonschema.Draft202012Validator)
        kind.check_schema(parsed)
    except (ValueError, RecursionError, jsonschema.SchemaError) as error:
        problem = getattr(error, "message", str(error))
        raise InputError(
            f"the JSON schema is none: {problem}", "send one of draft 2020-12 or earlier"
        ) from None
    if _has_pattern_properties(parsed):
        raise InputError("the JSON schema has patternProperties", "name the properties, or allow any of them")
    bounded = jsonschema.validators.extend(kind, {"pattern": _pattern})
    return bounded(parsed, registry=referencing.Registry())


def _pattern(_validator: Any, pattern: str, instance: object, _schema: object) -> Iterator[Any]:
    """Check the keyword `pattern` in bounded time: requests bring it, and `re` can take years over one."""
    import jsonschema
    import regex  # type: ignore[import-untyped]

    if isinstance(instance, str):
        try:
            found = regex.search(pattern, instance, timeout=MAX_PATTERN_S)
        except regex.error:
            found = None
        if not found:
            yield jsonschema.ValidationError("does not match the pattern")


def _has_pattern_properties(schema: object) -> bool:
    """Return whether the keyword is used: its expressions would run without a bound on their time."""
    if isinstance(schema, list):
        return any(_has_pattern_properties(part) for part in schema)
    if not isinstance(schema, dict):
        return False
    return "patternProperties" in schema or any(_has_pattern_properties(part) for part in schema.values())
