"""Compare the served model with the trained one, on the same test rows.

The trained model's answers come from the stage evaluate, the served model's from the HTTP API. Chat templates
are compared by hash, and prompt by prompt by number of tokens.

    perennial parity [--url http://127.0.0.1:3000] [--model NAME:VERSION]

Writes reports/parity/VERSION.json, which a promotion reads.
Exit code: 0 if they agree, 1 if they differ or could not be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, missing, read_json, reports, write_json
from stages.common.chat.plain import NOTHING_HIDDEN, write_conversation, write_tools
from stages.common.chat.template import encode_prompt, hash_template
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment, show_progress
from stages.common.messages import Message, ToolCall, format_arguments, format_malformed
from stages.common.model.exported import SERVING, find_exported, find_tokenizer
from stages.common.model.loading import load_tokenizer
from stages.common.params.loading import Params, load_params
from stages.common.records import Row, read_rows
from stages.common.statistics.intervals import Difference, estimate_difference, sum_by_group
from stages.common.task.kinds import read_task
from stages.common.task.metrics import Metric, compute_share
from stages.common.task.protocol import Task

logger = logging.getLogger("services.parity")

ABOUT_ROW = (400, 413, 422)  # what a server answers to a request that it will never take
SHOWN = 5  # refused rows in a message


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """The server's answer to one row.

    Attributes:
        refusal: why the server takes the row for a wrong request; None if it answered.
    """

    text: str
    prompt_tokens: int
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Whether trainer and server agree.

    Attributes:
        version: of the served model.
        exact_match: the server's minus the trainer's, on the same rows, with its interval.
        same_answers: share of rows with equal answers, right or wrong.
        templates_differ: rows whose prompt has a different number of tokens on the server.
        reasons: why they do not agree; empty if they do.
        refused: rows that the server does not take; their answers count as wrong.
    """

    version: str
    agrees: bool
    rows: int
    trainer_exact_match: float
    served_exact_match: float
    exact_match: Difference
    same_answers: float
    templates_differ: int
    reasons: tuple[str, ...]
    refused: int = 0


@dataclass(frozen=True, slots=True)
class TrainerSide:
    """The trainer's side of the comparison: test rows, and for each the answer and the prompt's tokens."""

    rows: tuple[Row, ...]
    answers: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    template_sha256: str
    task: Task


@dataclass(frozen=True, slots=True)
class ServerSide:
    """The server's side: its version, its chat template, and its answers to the same rows."""

    version: str
    template_sha256: str
    answers: tuple[ServedAnswer, ...]


def read_trainer_side(root: Path, max_rows: int | None) -> TrainerSide:
    """Return what the stage evaluate stored, of at most `max_rows` test rows.

    Raises:
        InputError: the pipeline has not been evaluated.
    """
    import pyarrow.parquet as pq

    kept = artifacts("evaluate") / "predictions.parquet"
    if not (root / kept).exists():
        raise missing(kept)
    table = pq.read_table(root / kept, columns=["id", "tuned"]).to_pydict()
    answers = dict(zip(table["id"], table["tuned"], strict=True))
    rows = [row for row in read_rows(root / artifacts("split") / "test.parquet") if row.id in answers]
    rows = rows[:max_rows]
    tokenizer = load_tokenizer(find_tokenizer(root))
    return TrainerSide(
        tuple(rows),
        tuple(answers[row.id] for row in rows),
        tuple(len(encode_prompt(tokenizer, row.prompt, row.tools)) for row in rows),
        hash_template(tokenizer),
        read_task(root),
    )


def compare(trainer: TrainerSide, server: ServerSide, params: Params) -> ParityReport:
    """Compare two models' answers to the same rows.

    The limit applies to the paired difference itself, not to its interval: two ways to compute one model
    should not differ at all, and rows that rounding decides go in both directions.
    """
    evaluate, rows = params.evaluate, trainer.rows
    ours, theirs = (
        _exact_match(rows, texts, trainer.task)
        for texts in (trainer.answers, [answer.text for answer in server.answers])
    )
    groups = [row.group for row in rows]
    before, after = sum_by_group(ours.columns, groups), sum_by_group(theirs.columns, groups)
    change = estimate_difference(
        before, after, ours.statistic, evaluate.confidence, evaluate.resamples, evaluate.seed, ours.scale
    )
    pairs = list(zip(trainer.answers, trainer.prompt_tokens, server.answers, strict=True))
    differ = sum(answer.prompt_tokens != count for _, count, answer in pairs if answer.refusal is None)
    refused = [
        (row, answer.refusal) for row, answer in zip(rows, server.answers, strict=True) if answer.refusal
    ]
    limit = params.services.parity.max_exact_match_loss
    reasons = []
    if server.template_sha256 != trainer.template_sha256:
        reasons.append("the server's chat template is not the trainer's")
    if refused:
        reasons.append(_describe_refused(refused, len(rows)))
    if differ:
        reasons.append(f"{differ} of {len(rows)} prompts have a different number of tokens on the server")
    if change.value < -limit - 1e-12:
        reasons.append(f"exact match falls by {-change.value:.4f}, and the limit is {limit}")
    return ParityReport(
        version=server.version,
        agrees=not reasons,
        rows=len(rows),
        trainer_exact_match=float(ours.by_row().mean()),
        served_exact_match=float(theirs.by_row().mean()),
        exact_match=change,
        same_answers=sum(text == answer.text for text, _, answer in pairs) / len(rows),
        templates_differ=differ,
        reasons=tuple(reasons),
        refused=len(refused),
    )


def _describe_refused(refused: Sequence[tuple[Row, str]], rows: int) -> str:
    """Return how many rows the server refuses, the first of them with the field, and what to do."""
    lines = [f"  row {row.id} from {row.source}: {why}" for row, why in refused[:SHOWN]]
    more = [f"  and {len(refused) - SHOWN} more"] if len(refused) > SHOWN else []
    fix = "correct the field that is named in the source of these rows, and run the pipeline again"
    return "\n".join([f"the server refuses {len(refused)} of {rows} rows; fix: {fix}", *lines, *more])


def _exact_match(rows: Sequence[Row], texts: Sequence[str], task: Task) -> Metric:
    return compute_share([task.is_right(text, row.answer) for row, text in zip(rows, texts, strict=True)])


async def ask_all(
    url: str, model: str | None, rows: Sequence[Row], max_tokens: int, concurrency: int, key: str | None
) -> list[ServedAnswer]:
    """Send every row to a server, `concurrency` at a time, with greedy decoding.

    Raises:
        InputError: it cannot be reached, or answers with a status that is about no row.
    """
    import httpx

    places, done = asyncio.Semaphore(concurrency), 0
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300.0) as client:

        async def ask(row: Row) -> ServedAnswer:
            nonlocal done
            body = {**write_body(row), "temperature": 0, "max_tokens": max_tokens, "user": row.id}
            async with places:
                answer = await client.post(
                    "/v1/chat/completions", json=body | ({"model": model} if model else {})
                )
            if answer.status_code in ABOUT_ROW:
                done += 1
                return ServedAnswer("", 0, _describe_refusal(answer))
            if answer.status_code != 200:
                raise InputError(
                    f"{url} answers row {row.id} with {answer.status_code}: {answer.text[:300]}", _READY
                )
            value, done = answer.json(), done + 1
            show_progress(logger, done, len(rows))
            text = read_served(value["choices"][0]["message"])
            return ServedAnswer(text, value["usage"]["prompt_tokens"])

        try:
            return await asyncio.gather(*(ask(row) for row in rows))
        except httpx.HTTPError as error:
            raise InputError(f"{url} cannot be reached: {error!r}", _READY) from None


def _describe_refusal(answer: Any) -> str:
    """Return the status and the message of an error of OpenAI's API; it begins with the field."""
    try:
        return f"{answer.status_code}: {answer.json()['error']['message'][:300]}"
    except (ValueError, LookupError, TypeError):  # of a server in between
        return f"{answer.status_code}: {answer.text[:300]}"


def write_body(row: Row) -> dict[str, Any]:
    """Return a row's conversation and tools as a client of OpenAI's API sends them."""
    messages = write_conversation(NOTHING_HIDDEN, row.prompt)
    for message in messages:
        message.pop("name", None)  # of a result: the id of its call tells the tool
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = format_arguments(call["function"]["arguments"])
    tools = write_tools(NOTHING_HIDDEN, row.tools)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def read_served(message: Mapping[str, Any]) -> str:
    """Return an answer of OpenAI's API as the text that is judged (`Message.answer`).

    A call of which the answer was cut is one that is malformed.
    """
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    try:
        # The server gives the arguments as the model wrote them, with its blanks.
        written = [(call["name"], format_arguments(json.loads(call["arguments"]))) for call in calls]
    except ValueError:
        return format_malformed(json.dumps(calls, ensure_ascii=False))
    made = tuple(ToolCall(name, arguments) for name, arguments in written)
    return Message("assistant", message["content"] or "", made).answer


async def fetch_model(url: str, model: str | None, key: str | None) -> dict[str, Any]:
    """Return the server's description of a model, by default of the champion."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30.0) as client:
        try:
            answer = await client.get(f"/v1/models/{model or 'champion'}")
        except httpx.HTTPError as error:
            raise InputError(f"{url} cannot be reached: {error!r}", _READY) from None
    if answer.status_code != 200:
        raise InputError(f"{url} answers with {answer.status_code}: {answer.text[:300]}", _READY)
    about: dict[str, Any] = answer.json()["perennial"]
    return about


_READY = (
    "start it (make serve), wait for /readyz, and give its address with --url, its key in PERENNIAL_API_KEY"
)


def compare_with_server(url: str, model: str | None, params: Params, root: Path = Path()) -> ParityReport:
    """Compare the server's answers with those that the stage evaluate stored.

    Raises:
        InputError: scipy is missing, the pipeline has not been evaluated, the server serves another model
            than the one evaluated, or it cannot be reached.
    """
    _check_scipy()
    trainer = read_trainer_side(root, params.services.parity.max_rows)
    key = os.environ.get("PERENNIAL_API_KEY")
    about = asyncio.run(fetch_model(url, model, key))
    expected = read_json(find_exported(root) / SERVING)["version"]
    if about["version"] != expected:
        raise InputError(
            f"{url} serves version {about['version']}, and the evaluated version is {expected}",
            f"select that version: --model NAME:{expected}",
        )
    limit = read_json(root / reports("evaluate") / "metrics.json")["answer_limit_tokens"]
    concurrency = params.services.parity.concurrency
    answers = asyncio.run(ask_all(url, model, trainer.rows, limit, concurrency, key))
    return compare(trainer, ServerSide(expected, about["template_sha256"], tuple(answers)), params)


def _check_scipy() -> None:
    """Raise InputError if the intervals cannot be computed, before all rows are asked for nothing."""
    if find_spec("scipy") is None:
        raise InputError(
            "services.parity needs scipy, which comes with training and not with serving",
            "run it in the environment of training, and give the service's address with --url",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, write and log the report; return the exit code."""
    set_quiet_environment()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(
        prog="perennial parity",
        description="Compare the served model with the trained one, on the test rows.",
    )
    parser.add_argument("--url", help="address of the service (default: services.host and services.port)")
    parser.add_argument("--model", help="NAME:VERSION (default: the champion)")
    options = parser.parse_args(arguments)
    try:
        params = load_params()
        url = options.url or f"http://{params.services.host}:{params.services.port}"
        report = compare_with_server(url, options.model, params)
        write_json(reports("parity") / f"{report.version}.json", asdict(report))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    change = report.exact_match
    logger.info(
        "exact match: trainer %.4f, server %.4f; change %+.4f (%+.4f to %+.4f) on %d rows; %.1f %% equal",
        report.trainer_exact_match,
        report.served_exact_match,
        change.value,
        change.low,
        change.high,
        report.rows,
        100 * report.same_answers,
    )
    for reason in report.reasons:
        logger.error("rejected: %s", reason)
    return 0 if report.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
