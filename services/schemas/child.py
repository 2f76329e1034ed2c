"""The process in which schemas of requests are tried: `python -m services.schemas.child`.

`trials` starts it. Each line of the input is a job as JSON, and each line of the output its result. The
kernel ends the process once a job has used its CPU seconds, and refuses it memory beyond its bound: both hold
in the middle of a compiler that Python cannot interrupt.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from typing import Any

import psutil
from llguidance import LLTokenizer

from services.engines.calls.learned import explain_turn
from services.engines.calls.trial import try_probes
from services.engines.grammar import Grammar, compile_grammar, compile_schema
from services.engines.protocol import SchemaUnsupported
from services.guard.checks import check_schema
from stages.common.errors import InputError
from stages.common.machine.parent import end_with_parent
from stages.common.messages import Message, Tool, ToolCall

NICENESS = 5  # answers come before the trial of a schema
MAX_MIB = 512  # memory that one job may take


def run_job(job: dict[str, Any], tokens: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a job.

    Args:
        tokens: vocabularies by the name under which they were sent.
    """
    if job["do"] == "learn":
        tokens[job["name"]] = LLTokenizer(job["tokenizer"], eos_token=job["end_id"])
        return {}
    try:
        if job["do"] == "compile_grammar":
            return try_grammar(job, tokens[job["name"]])
        if job["do"] == "check_turn":
            return {"wrong": find_wrong_turn(job)}
        decision = check_schema(job.get("answer", "null"), job["schema"])
        if job["do"] == "compile":
            vocabulary = tokens[job["name"]]
            # The first mask builds most of the states.
            Grammar(compile_schema(job["schema"], vocabulary), vocabulary.vocab_size).allowed()
    except SchemaUnsupported as error:
        return {"problem": str(error)}
    except InputError as error:
        return {"problem": error.what}
    except MemoryError:
        return {"problem": f"the JSON schema takes more than {MAX_MIB} MiB to check"}
    except BaseException as error:  # a panic of the compiler is no Exception
        return {"problem": f"the JSON schema cannot be checked: {type(error).__name__}"}
    return {"allow": decision.allow, "reason": decision.reason}


def try_grammar(job: dict[str, Any], vocabulary: Any) -> dict[str, Any]:
    """Compile the grammar of calls, and find the next tokens where the arguments of each tool begin.

    Raises:
        SchemaUnsupported: it outgrows its limits.
        InputError: a schema is not valid.
    """
    for schema in job["schemas"]:
        check_schema("null", schema)
    try_probes(compile_grammar(job["grammar"], vocabulary), job["probes"], vocabulary)
    return {}


def find_wrong_turn(job: dict[str, Any]) -> str | None:
    """Return what is wrong with a turn that is to be learned, and what to do; None if nothing is."""
    tools = {tool.name: tool for tool in map(Tool, job["tools"])}
    turn = Message("assistant", job["content"], tuple(ToolCall(*call) for call in job["calls"]))
    return explain_turn(turn, tools, job["changes"])


@contextlib.contextmanager
def limit(cpu_s: float) -> Any:
    """End the process if the block takes more CPU seconds; refuse it more than MAX_MIB of memory."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        size = psutil.Process().memory_info().vms + MAX_MIB * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def main() -> None:
    """Do jobs until the input ends, which it does with the service."""
    end_with_parent()  # in the middle of a job, too, when the input's end would not be seen
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service decides when this ends
    os.nice(NICENESS)
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no result
    tokens: dict[str, Any] = {}
    for line in sys.stdin:
        job = json.loads(line)
        with limit(job["cpu_s"]):
            result = run_job(job, tokens)
        output.write(json.dumps(result) + "\n")
        output.flush()


if __name__ == "__main__":
    main()
