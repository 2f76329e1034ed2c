"""Check the tools of a request before an answer begins, and the calls of an answer that is complete."""

from __future__ import annotations

import json

from services import errors
from services.answering.held_calls import hold_calls
from services.answering.request import GenerationRequest
from services.engines.calls.allowed import read_schema
from services.engines.protocol import QueueFull, SchemaUnsupported
from services.guard.checks import GuardDecision
from services.model_pool import LoadedModel
from services.schemas.trials import SchemaTrials
from stages.common.chat.calls import find_template_gap
from stages.common.messages import read_calls


async def check_tools(
    request: GenerationRequest, model: LoadedModel, schemas: SchemaTrials, is_constrained: bool
) -> None:
    """Reject tools that the model's chat template does not write, or whose schemas cannot be held.

    Raises:
        ApiError: invalid_value; or overloaded, if too many schemas wait to be checked.
    """
    has_calls = any(message.tool_calls or message.tool_call_id for message in request.messages)
    gap = find_template_gap(model.tokenizer) if request.tools or has_calls else None
    if gap is not None:
        param = "tools" if request.tools else request.prompt_param
        raise errors.invalid_value(param, gap.replace("base model", "served model"))
    try:
        grammar = hold_calls(request, model, is_constrained)
        if grammar is not None and grammar.schemas:
            tag, tokenizer = model.files.tag, model.tokenizer
            await schemas.check_grammar(grammar.text, grammar.schemas, grammar.probes, tag, tokenizer)
    except SchemaUnsupported as error:
        raise errors.invalid_value("tools", str(error)) from None
    except QueueFull:
        raise errors.overloaded(retry_after_s=1.0) from None


async def check_calls(request: GenerationRequest, answer: str, trials: SchemaTrials) -> GuardDecision:
    """Return whether all calls of an answer are whole, and their arguments fit the tools' schemas."""
    read = read_calls(answer)
    if read is None:
        return GuardDecision(False, "malformed_call")
    schemas = {tool.name: json.dumps(read_schema(tool)) for tool in request.tools}
    for call in read[1]:
        if call.name not in schemas:
            return GuardDecision(False, "unknown_tool")
        decision = await trials.check_answer(call.arguments, schemas[call.name])
        if not decision.allow:
            return decision
    return GuardDecision(True)
