"""Is the model that is served the model that was trained? The same test rows, asked of both.

The trainer's answers are those that the stage evaluate kept; the server is asked by HTTP, as users ask it.
Chat templates are compared prompt by prompt, by their number of tokens and by the template's hash.

    perennial parity [--url http://127.0.0.1:3000] [--model NAME:VERSION]

Writes reports/parity/VERSION.json, which a promotion reads.
Exit code 0: they agree; 1: they do not, or could not be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, missing, read_json, reports, write_json
from stages.common.chat import encode_prompt, template_sha256
from stages.common.errors import InputError
from stages.common.logs import progress, set_quiet_environment
from stages.common.models import load_tokenizer
from stages.common.params.loading import Params, load_params
from stages.common.records import Row, read_rows
from stages.common.statistics import Difference, difference, sums_by_group
from stages.common.task.kinds import read_task
from stages.common.task.metrics import Metric, share
from stages.common.task.protocol import Task

log = logging.getLogger("parity")


@dataclass(frozen=True, slots=True)
class Served:
    """What the server said to one row."""

    text: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether trainer and server agree.

    Attributes:
        version: of the model that was asked.
        agrees: nothing below speaks against it.
        exact_match: the server's minus the trainer's, on the same rows, with its interval.
        same_answers: share of rows whose answers are equal, right or wrong.
        templates_differ: rows whose prompt has another number of tokens on the server.
        reasons: why they do not agree; empty if they do.
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


def compare(
    rows: Sequence[Row],
    trainer: Sequence[str],
    served: Sequence[Served],
    prompt_tokens: Sequence[int],
    same_template: bool,
    version: str,
    params: Params,
    task: Task,
) -> Verdict:
    """Return the verdict on two models' answers to the same rows.

    The loss that counts is the paired difference itself, not its interval: between two ways to compute one
    model it should be nothing at all, and rows that only rounding decides go both ways.
    """
    evaluate = params.evaluate
    ours, theirs = (
        _exact_match(rows, texts, task) for texts in (trainer, [answer.text for answer in served])
    )
    groups = [row.group for row in rows]
    before, after = sums_by_group(ours.columns, groups), sums_by_group(theirs.columns, groups)
    change = difference(
        before, after, ours.statistic, evaluate.confidence, evaluate.resamples, evaluate.seed, ours.scale
    )
    differ = sum(answer.prompt_tokens != count for answer, count in zip(served, prompt_tokens, strict=True))
    limit = params.services.parity.max_exact_match_loss
    reasons = []
    if not same_template:
        reasons.append("the server's chat template is not the trainer's")
    if differ:
        reasons.append(f"{differ} of {len(rows)} prompts have another number of tokens on the server")
    if change.value < -limit - 1e-12:
        reasons.append(f"exact match falls by {-change.value:.4f}, and may fall by {limit} at most")
    return Verdict(
        version=version,
        agrees=not reasons,
        rows=len(rows),
        trainer_exact_match=float(ours.by_row().mean()),
        served_exact_match=float(theirs.by_row().mean()),
        exact_match=change,
        same_answers=sum(t == s.text for t, s in zip(trainer, served, strict=True)) / len(rows),
        templates_differ=differ,
        reasons=tuple(reasons),
    )


def _exact_match(rows: Sequence[Row], texts: Sequence[str], task: Task) -> Metric:
    return share([task.is_right(text, row.answer) for row, text in zip(rows, texts, strict=True)])


async def ask_all(
    url: str, model: str | None, rows: Sequence[Row], max_tokens: int, concurrency: int, key: str | None
) -> list[Served]:
    """Ask a server every row, some at a time, greedily.

    Raises:
        InputError: it cannot be reached, or refuses a row.
    """
    import httpx

    places, done = asyncio.Semaphore(concurrency), 0
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300.0) as client:

        async def ask(row: Row) -> Served:
            nonlocal done
            messages = [{"role": message.role, "content": message.content} for message in row.prompt]
            body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, "user": row.id}
            async with places:
                answer = await client.post(
                    "/v1/chat/completions", json=body | ({"model": model} if model else {})
                )
            if answer.status_code != 200:
                raise InputError(
                    f"{url} answers row {row.id} with {answer.status_code}: {answer.text[:300]}", _READY
                )
            value, done = answer.json(), done + 1
            progress(log, done, len(rows))
            return Served(value["choices"][0]["message"]["content"], value["usage"]["prompt_tokens"])

        try:
            return await asyncio.gather(*(ask(row) for row in rows))
        except httpx.HTTPError as error:
            raise InputError(f"{url} cannot be asked: {error!r}", _READY) from None


async def served_model(url: str, model: str | None, key: str | None) -> dict[str, Any]:
    """Return what the server says of a model; of the champion where none is named."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30.0) as client:
        try:
            answer = await client.get(f"/v1/models/{model or 'champion'}")
        except httpx.HTTPError as error:
            raise InputError(f"{url} cannot be asked: {error!r}", _READY) from None
    if answer.status_code != 200:
        raise InputError(f"{url} answers with {answer.status_code}: {answer.text[:300]}", _READY)
    about: dict[str, Any] = answer.json()["perennial"]
    return about


_READY = (
    "start it (make serve), wait for /readyz, and give its address with --url, its key in PERENNIAL_API_KEY"
)


def check(url: str, model: str | None, params: Params, root: Path = Path()) -> Verdict:
    """Compare the server with the trainer's kept answers.

    Raises:
        InputError: the pipeline has not been evaluated, the server serves another model than the one
            evaluated, or it cannot be asked.
    """
    import pyarrow.parquet as pq

    kept = root / artifacts("evaluate") / "predictions.parquet"
    if not kept.exists():
        raise missing(artifacts("evaluate") / "predictions.parquet")
    table = pq.read_table(kept, columns=["id", "tuned"]).to_pydict()
    trainer = dict(zip(table["id"], table["tuned"], strict=True))
    rows = [row for row in read_rows(root / artifacts("split") / "test.parquet") if row.id in trainer]
    rows = rows[: params.services.parity.max_rows]
    key = os.environ.get("PERENNIAL_API_KEY")
    about = asyncio.run(served_model(url, model, key))
    expected = read_json(root / artifacts("export") / "serving.json")["version"]
    if about["version"] != expected:
        raise InputError(
            f"{url} serves version {about['version']}, and the trainer's answers are of {expected}",
            f"name that version: --model NAME:{expected}",
        )
    tokenizer = load_tokenizer(root / artifacts("fetch_base"))
    limit = read_json(root / reports("evaluate") / "metrics.json")["answer_limit_tokens"]
    served = asyncio.run(ask_all(url, model, rows, limit, params.services.parity.concurrency, key))
    return compare(
        rows,
        [trainer[row.id] for row in rows],
        served,
        [len(encode_prompt(tokenizer, row.prompt)) for row in rows],
        about["template_sha256"] == template_sha256(tokenizer),
        expected,
        params,
        read_task(root),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, write the verdict and say it; return the exit code."""
    set_quiet_environment()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="perennial parity", description="Compare trainer and server.")
    parser.add_argument("--url", help="of the service; services.host and services.port in params.yaml")
    parser.add_argument("--model", help="NAME:VERSION; the champion where none is given")
    options = parser.parse_args(arguments)
    try:
        params = load_params()
        url = options.url or f"http://{params.services.host}:{params.services.port}"
        verdict = check(url, options.model, params)
        write_json(reports("parity") / f"{verdict.version}.json", asdict(verdict))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    change = verdict.exact_match
    log.info(
        "exact match: trainer %.4f, server %.4f; change %+.4f (%+.4f to %+.4f) on %d rows; %.1f %% alike",
        verdict.trainer_exact_match,
        verdict.served_exact_match,
        change.value,
        change.low,
        change.high,
        verdict.rows,
        100 * verdict.same_answers,
    )
    for reason in verdict.reasons:
        log.error("refused: %s", reason)
    return 0 if verdict.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
