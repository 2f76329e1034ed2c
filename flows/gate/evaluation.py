"""Evaluate a candidate for the gate: paired answers of candidate and champion, parity, and the model card.

Two tests. *new*: labelled rows of the new traffic that were held out of every training
(`.perennial/holdout/rows.jsonl`). *old*: the champion's own test split, kept when its pipeline made it,
without rows that the candidate has trained on since.

Both models answer greedily over HTTP, with the same limits, from the gate's private server. All prompts and
answers are kept in `.perennial/gate/VERSION/`; a gate that was killed after that step reads them from there.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.gate import private_server
from flows.gate.card import CARD, find_card_problems
from flows.gate.verdict import hash_files
from monitoring.feedback.labels import normalise_text
from monitoring.feedback.rows import HELD_OUT, read_labelled
from services import parity
from services.versions.aliases import ALIASES, read_aliases
from services.versions.store import add_pipeline_output, get_version
from stages.common.artifacts import (
    STATE,
    artifacts,
    atomic_write,
    read_json,
    reports,
    write_json,
)
from stages.common.chat.conversations import list_prompts
from stages.common.errors import InputError
from stages.common.model.exported import SERVING, find_exported
from stages.common.params.loading import Params
from stages.common.params.loop import GateSettings
from stages.common.records import Row, format_canonical_json, read_rows
from stages.common.tag import Tag
from stages.common.task.protocol import Task

GATE = STATE / "gate"
TESTS = STATE / "tests"

logger = logging.getLogger("flows.gate.evaluation")


@dataclass(frozen=True, slots=True)
class PairedAnswers:
    """The rows of a test, with the answers of both models."""

    rows: tuple[Row, ...]
    candidate: tuple[str, ...]
    champion: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything the gate judges a candidate by.

    Attributes:
        champion: the version to be replaced; None for the first model.
        task: what the candidate's answers are.
        new, old: both tests; None without a champion.
        parity: the candidate's server against its trainer.
        card: problems of its model card.
        evaluation: the candidate's reports/evaluate/metrics.json.
        excluded: test rows that were not used, by reason.
        files: SHA-256 of each file of the evidence, by path from the checkout's root.
    """

    tag: str
    champion: str | None
    task: Task
    new: PairedAnswers | None
    old: PairedAnswers | None
    parity: parity.ParityReport
    card: tuple[str, ...]
    evaluation: Mapping[str, Any]
    excluded: Mapping[str, int]
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Rows to answer, the limit of an answer in tokens, and the number of rows excluded, by reason."""

    rows: tuple[Row, ...]
    max_tokens: int
    excluded: Mapping[str, int]


def keep_test_rows(root: Path, production: Path | None = None) -> str | None:
    """Keep the test split of the pipeline's newest model; return the version, or None without a model.

    Call it before the next pipeline run, which overwrites the split.

    Args:
        production: the checkout that keeps it; by default `root`.
    """
    serving, test = find_exported(root) / SERVING, root / artifacts("split") / "test.parquet"
    if not serving.exists() or not test.exists():
        return None
    version = str(read_json(serving)["version"])
    kept = (production or root) / TESTS / f"{version}.parquet"
    if not kept.exists():
        with atomic_write(kept) as temporary:
            shutil.copyfile(test, temporary)
    return version


def evaluate_candidate(root: Path, params: Params, tag: str, production: Path | None = None) -> Evidence:
    """Have candidate and champion answer both tests, compare the candidate with its trainer, check its card.

    Writes reports/parity/VERSION.json and `.perennial/gate/VERSION/`. The aliases do not move.

    Args:
        root: the checkout whose pipeline made the candidate.
        params: also those of the private server, which gets all of them.
        tag: the candidate: the pipeline's newest model.
        production: the checkout whose champion is to be replaced, and where the evidence is written; by
            default `root`.

    Raises:
        InputError: the pipeline's output is another version, or incomplete; the candidate is the champion;
            the champion is not in the store; or one of the two does not answer.
    """
    _check_candidate(root, tag)
    production = production or root
    champion = read_aliases(production / ALIASES).champion
    if champion == tag:
        raise InputError(f"{tag} is the champion already", "judge another version")
    keep_test_rows(root, production)
    if champion is not None:
        get_version(champion)
    folder = production / GATE / Tag.parse(tag).version
    trainer = parity.read_trainer_side(root, params.services.parity.max_rows)
    gate, task = params.flows.retrain.gate, trainer.task
    longest = params.services.answers.default_max_tokens
    new = read_new_test(root, production, task, gate, longest) if champion else None
    old = read_old_test(root, production, champion, task, gate) if champion else None
    tests = {"parity": EvalSet(trainer.rows, _read_answer_limit(root), {})}
    tests |= {name: test for name, test in (("new", new), ("old", old)) if test}
    answers = _answers(production, params, tag, champion, tests, folder / "answers.json")
    verdict = parity.compare(trainer, _read_server_side(trainer, answers, tag), params)
    write_json(production / reports("parity") / f"{verdict.version}.json", asdict(verdict))
    write_json(folder / "parity.json", asdict(verdict))
    card = find_card_problems(root)
    if (root / CARD).exists():
        with atomic_write(folder / "model_card.md") as temporary:
            shutil.copyfile(root / CARD, temporary)
    return Evidence(
        tag=tag,
        champion=champion,
        task=task,
        new=_pair(new, answers["new"]) if new else None,
        old=_pair(old, answers["old"]) if old else None,
        parity=verdict,
        card=tuple(card),
        evaluation=read_json(root / reports("evaluate") / "metrics.json"),
        excluded={
            f"{name}: {reason}": count
            for name, test in (("new", new), ("old", old))
            if test
            for reason, count in test.excluded.items()
        },
        files=hash_files(production, sorted(folder.iterdir())),
    )


def read_new_test(
    root: Path, production: Path, task: Task, settings: GateSettings, max_tokens: int
) -> EvalSet:
    """Return the held-out labelled rows of the new traffic, without questions the candidate trained on.

    Args:
        max_tokens: of an answer: as many as users get.
    """
    trained = _list_trained(_training_rows(root))
    rows, excluded = _select_usable(read_labelled(production / HELD_OUT), task)
    kept = [row for row in rows if _asked(row) not in trained]
    _count(excluded, "the candidate was trained on the question", len(rows) - len(kept))
    return _sample(kept, settings, max_tokens, excluded)


def read_old_test(root: Path, production: Path, champion: str, task: Task, settings: GateSettings) -> EvalSet:
    """Return the champion's test rows, without those whose group or question the candidate trained on."""
    kept_rows = production / TESTS / f"{Tag.parse(champion).version}.parquet"
    if not kept_rows.exists():
        logger.warning("the test rows of %s were not kept: those of the candidate are used", champion)
        kept_rows = root / artifacts("split") / "test.parquet"
    training = _training_rows(root)
    groups, questions = {row.group for row in training}, _list_trained(training)
    rows, excluded = _select_usable(read_rows(kept_rows), task)
    kept = [row for row in rows if row.group not in groups and _asked(row) not in questions]
    _count(excluded, "the candidate was trained on the group or question", len(rows) - len(kept))
    return _sample(kept, settings, _read_answer_limit(root), excluded)


def _asked(row: Row) -> str:
    """Return what a row asks, with the questions before it: "and the bedroom too" alone is no question."""
    return normalise_text(list_prompts(row)[-1])


def _list_trained(training: Sequence[Row]) -> set[str]:
    return {normalise_text(prompt) for row in training for prompt in list_prompts(row)}


def _read_server_side(trainer: parity.TrainerSide, answers: Mapping[str, Any], tag: str) -> parity.ServerSide:
    kept = (answers["parity"][row.id] for row in trainer.rows)
    served = tuple(parity.ServedAnswer(one["candidate"], one["prompt_tokens"]) for one in kept)
    return parity.ServerSide(Tag.parse(tag).version, answers["template_sha256"], served)


def _check_candidate(root: Path, tag: str) -> None:
    made = add_pipeline_output(root)
    if made != tag:
        raise InputError(
            f"the pipeline's newest model is {made}, not {tag}",
            "judge that version, or restore the other one's parameters and data and run the pipeline again",
        )


def _training_rows(root: Path) -> Sequence[Row]:
    return read_rows(root / artifacts("split") / "train.parquet")


def _read_answer_limit(root: Path) -> int:
    limit: int = read_json(root / reports("evaluate") / "metrics.json")["answer_limit_tokens"]
    return limit


def _select_usable(rows: Sequence[Row], task: Task) -> tuple[list[Row], dict[str, int]]:
    """Return the rows that can be scored, without duplicates, and the number excluded, by reason."""
    excluded: dict[str, int] = {}
    kept = list({row.id: row for row in rows}.values())
    _count(excluded, "duplicate", len(rows) - len(kept))
    judged = [row for row in kept if task.find_problem(row.answer) is None]
    _count(excluded, "the label is not an answer of the task", len(kept) - len(judged))
    return judged, excluded


def _count(excluded: dict[str, int], reason: str, rows: int) -> None:
    if rows:
        excluded[reason] = rows


def _sample(
    rows: Sequence[Row], settings: GateSettings, max_tokens: int, excluded: dict[str, int]
) -> EvalSet:
    limit = settings.max_rows
    if limit is not None and len(rows) > limit:
        _count(excluded, "more than flows.retrain.gate.max_rows", len(rows) - limit)
        chosen = sorted(random.Random(settings.seed).sample(range(len(rows)), limit))
        rows = [rows[index] for index in chosen]
    return EvalSet(tuple(rows), max_tokens, excluded)


def _answers(
    production: Path,
    params: Params,
    tag: str,
    champion: str | None,
    tests: Mapping[str, EvalSet],
    path: Path,
) -> dict[str, Any]:
    """Return all answers: from `path` if it holds those of the same models and tests, else generated now."""
    key = _key(tag, champion, tests)
    if path.exists():
        known: dict[str, Any] = read_json(path)
        if known.get("key") == key:
            logger.info("the answers of both models are read from %s", path)
            return known
    engine = params.services.engine
    at_once = min(params.flows.retrain.gate.concurrency, engine.max_running + engine.max_waiting)
    with private_server.serve(production, params, tag, champion) as service:
        found = asyncio.run(_ask(service.url, at_once, tag, champion, tests))
    write_json(path, {"key": key, "tag": tag, "champion": champion, **found})
    return dict(read_json(path))


def _key(tag: str, champion: str | None, tests: Mapping[str, EvalSet]) -> str:
    """Return a hash of the models, the rows and the limits of the answers."""
    rows = {
        name: [test.max_tokens, [[row.id, row.answer] for row in test.rows]] for name, test in tests.items()
    }
    return hashlib.sha256(format_canonical_json([[tag, champion], rows]).encode()).hexdigest()


async def _ask(
    url: str, at_once: int, tag: str, champion: str | None, tests: Mapping[str, EvalSet]
) -> dict[str, Any]:
    """Have the candidate answer every row of every test, and the champion all but those of parity."""
    about = await parity.fetch_model(url, tag, None)
    candidate = await _ask_one(url, tag, list(tests.values()), at_once)
    shared = [test for name, test in tests.items() if name != "parity"]
    former = await _ask_one(url, champion, shared, at_once) if champion else {}
    found: dict[str, Any] = {"template_sha256": about["template_sha256"]}
    for name, test in tests.items():
        found[name] = {}
        for row in test.rows:
            answer = candidate[row.id, test.max_tokens]
            kept = {"question": row.question, "reference": row.answer, **_kept("candidate", answer)}
            if name != "parity":
                kept |= _kept("champion", former[row.id, test.max_tokens])
            found[name][row.id] = kept
    return found


def _kept(who: str, answer: parity.ServedAnswer) -> dict[str, Any]:
    tokens = {"prompt_tokens": answer.prompt_tokens} if who == "candidate" else {}
    return {who: answer.text, **tokens}


async def _ask_one(
    url: str, tag: str, tests: Sequence[EvalSet], at_once: int
) -> dict[tuple[str, int], parity.ServedAnswer]:
    """Have one model answer the rows of several tests; a row in several of them is answered once."""
    answers: dict[tuple[str, int], parity.ServedAnswer] = {}
    for limit in sorted({test.max_tokens for test in tests}):
        rows = list({row.id: row for test in tests if test.max_tokens == limit for row in test.rows}.values())
        logger.info("%s answers %d rows", tag, len(rows))
        served = await parity.ask_all(url, tag, rows, limit, at_once, None)
        answers |= {(row.id, limit): answer for row, answer in zip(rows, served, strict=True)}
    return answers


def _pair(test: EvalSet, answers: Mapping[str, Any]) -> PairedAnswers:
    return PairedAnswers(
        test.rows,
        tuple(answers[row.id]["candidate"] for row in test.rows),
        tuple(answers[row.id]["champion"] for row in test.rows),
    )
