"""Run the checks that the settings enable, on a prompt and on an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from services.guard import checks
from services.guard.checks import GuardDecision
from stages.common.params.services import Guard, Policy


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The decision of a check, and whether it is enforced or only recorded."""

    check: str
    policy: Policy
    decision: GuardDecision

    @property
    def rejects(self) -> bool:
        """Whether the text may not be used."""
        return self.policy == "enforce" and not self.decision.allow


def check_prompt(
    messages: Sequence[Mapping[str, str]], control_tokens: Sequence[str], settings: Guard
) -> Iterator[CheckResult]:
    """Yield the result of each check of a prompt as it is asked for, so that a rejection skips the rest.

    Args:
        control_tokens: the model's own.
    """
    if settings.control_tokens != "off":
        texts = [message["content"] for message in messages]
        decision = checks.check_control_tokens(texts, control_tokens)
        yield CheckResult("control_tokens", settings.control_tokens, decision)
    if settings.prompt_injection != "off":
        decision = checks.check_injection(messages)
        yield CheckResult("prompt_injection", settings.prompt_injection, decision)
    if settings.toxicity != "off":
        yield CheckResult("toxicity", settings.toxicity, checks.check_toxicity(messages))


def check_correction(
    correction: str, control_tokens: Sequence[str], settings: Guard
) -> Iterator[CheckResult]:
    """Yield the result of each check of a correction: as of a prompt, and of secrets as in an answer.

    A model may learn it as an answer, and no check of the exchange has seen it.
    """
    yield from check_prompt([{"role": "user", "content": correction}], control_tokens, settings)
    if settings.secrets != "off":
        yield CheckResult("secrets", settings.secrets, checks.check_secrets(correction))


def check_answer(
    text: str,
    schema: str | None,
    is_json: bool,
    settings: Guard,
    schema_decision: GuardDecision | None = None,
    thoughts: str = "",
) -> Iterator[CheckResult]:
    """Yield the result of each check of a complete answer as it is asked for.

    Args:
        schema: JSON schema that the answer should fit; None for any text.
        is_json: whether the answer is JSON; if not, the schema describes it as a string.
        schema_decision: whether it fits, where that was checked elsewhere: a client's schema is never
            checked on the event loop.
        thoughts: what the model wrote before the answer, which is shown too.
    """
    if schema is not None and settings.schema_ != "off":
        value = text if is_json else json.dumps(text.strip())
        decision = schema_decision or checks.check_schema(value, schema)
        yield CheckResult("schema", settings.schema_, decision)
    shown = f"{thoughts}\n{text}" if thoughts else text
    if settings.secrets != "off":
        yield CheckResult("secrets", settings.secrets, checks.check_secrets(shown))
    if settings.personal_data != "off":
        yield CheckResult("personal_data", settings.personal_data, checks.check_personal_data(shown))


def buffers_output(settings: Guard) -> bool:
    """Return whether an answer is sent only once it is complete, because a check could still reject it."""
    return "enforce" in (settings.schema_, settings.secrets, settings.personal_data)
