"""How an answer is held and read: by the tools of the request, its form, and the model's task."""

from __future__ import annotations

from typing import Any

from services.answering.request import GenerationRequest
from services.engines.calls.grammar import CallGrammar, write_grammar
from services.engines.calls.notation import read_marks, read_thoughts
from services.engines.calls.reading import AnswerReader
from services.engines.protocol import Sampling
from services.model_pool import LoadedModel
from stages.common.chat.calls import read_call_format


def hold_calls(request: GenerationRequest, model: LoadedModel, is_constrained: bool) -> CallGrammar | None:
    """Return the grammar of an answer that has tools; None where none is needed.

    Args:
        is_constrained: whether answers have the form of the model's task.

    Raises:
        SchemaUnsupported: the calls cannot be held.
    """
    allowed = request.allowed
    if allowed is None:
        return None
    schema, choices = restrict_text(request.sampling.json_schema, model, is_constrained)
    if allowed.mode == "none" and (schema is not None or choices):
        return None  # such an answer is no call
    return write_grammar(read_marks(model.tokenizer), allowed, schema, choices)


def restrict_text(
    requested: str | None, model: LoadedModel, is_constrained: bool
) -> tuple[str | None, tuple[str, ...]]:
    """Return the JSON schema and the choices of an answer that is no call."""
    if requested is not None or not is_constrained:
        return requested, ()
    if model.task.answers_are_json:
        return model.answer_schema, ()
    return None, model.task.closed_set or ()


def make_reader(request: GenerationRequest, sampling: Sampling, tokenizer: Any) -> AnswerReader:
    """Return what splits the answer to a request."""
    has_calls = request.allowed is not None and bool(request.allowed.callable_tools)
    thinks = request.raw is None and (sampling.grammar is not None or not sampling.is_constrained)
    return AnswerReader(
        read_call_format(tokenizer) if has_calls else None,
        read_thoughts(tokenizer) if thinks else None,
        request.stops if has_calls else (),
    )
