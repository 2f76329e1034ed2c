"""What the gate judges by: candidate and champion asked the same rows, parity, and the card.

Two tests. The *new* one is what users said was right: labelled rows of the new traffic that were held out
of every training (`.perennial/holdout/rows.jsonl`). The *old* one is the champion's own test split, kept
when its pipeline made it, without what the candidate has trained on since.

Both models are asked by HTTP, greedily, with the same limits, by a service of the gate's own. Everything
that was asked and answered lies in `.perennial/gate/VERSION/`, and a gate that was killed after the asking
does not ask again.
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
from monitoring.feedback.labels import normalised
from monitoring.feedback.rows import HELD_OUT, read_labelled
from services import parity
from services.versions.__main__ import ALIASES, add_pipeline_output, read_aliases, stored
from stages.common.artifacts import STATE, artifacts, atomic_write, missing, read_json, reports, write_json
from stages.common.dvc_lock import dvc_hash
from stages.common.errors import InputError
from stages.common.params.loading import Params
from stages.common.records import Row, canonical_json, read_rows
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Task

GATE = STATE / "gate"
TESTS = STATE / "tests"
CARD = reports("model_card") / "README.md"
# The card's parts that come from evidence; each must be there and say something.
CARD_SECTIONS = ("Use", "Results", "Limits", "Data", "Bias", "Training", "Lineage")

logger = logging.getLogger("flows.gate.evaluation")


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows, and what both models answered to each."""

    rows: tuple[Row, ...]
    candidate: tuple[str, ...]
    champion: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the gate looks at.

    Attributes:
        champion: who is to be replaced; None for the first model of all.
        task: what the candidate's answers are.
        new, old: both tests; None without a champion.
        parity: candidate against its trainer.
        card: what speaks against its model card; empty if nothing does.
        evaluation: the candidate's reports/evaluate/metrics.json.
        left_out: rows that were not asked, by reason.
        files: SHA-256 of each file of the evidence, by its path from the checkout's root.
    """

    tag: str
    champion: str | None
    task: Task
    new: Asked | None
    old: Asked | None
    parity: parity.Verdict
    card: tuple[str, ...]
    evaluation: Mapping[str, Any]
    left_out: Mapping[str, int]
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Questions:
    """Rows to ask, after how many tokens an answer is cut, and what was left out, by reason."""

    rows: tuple[Row, ...]
    max_tokens: int
    left_out: Mapping[str, int]


def keep_test_rows(root: Path, production: Path | None = None) -> str | None:
    """Keep the test split under the version that the pipeline made with it; return the version.

    Call it before the pipeline runs again and writes another one. None: there is no model yet.

    Args:
        production: the checkout that keeps it; `root` where none is given.
    """
    serving, test = root / artifacts("export") / "serving.json", root / artifacts("split") / "test.parquet"
    if not serving.exists() or not test.exists():
        return None
    version = str(read_json(serving)["version"])
    kept = (production or root) / TESTS / f"{version}.parquet"
    if not kept.exists():
        with atomic_write(kept) as beside:
            shutil.copyfile(test, beside)
    return version


def gather(root: Path, params: Params, tag: str, production: Path | None = None) -> Evidence:
    """Ask candidate and champion, compare the candidate with its trainer, and look at its card.

    Args:
        root: the checkout whose pipeline made the candidate.
        tag: the candidate: what the pipeline made last.
        production: the checkout whose champion is to be replaced, and where what is found is written;
            `root` where none is given.

    Writes reports/parity/VERSION.json and `.perennial/gate/VERSION/`. The aliases do not move.

    Raises:
        InputError: the pipeline's output is another version, or incomplete; the candidate is the champion;
            the champion is not in the store; or one of the two does not answer.
    """
    _check_candidate(root, tag)
    production = production or root
    champion = read_aliases(production / ALIASES).champion
    if champion == tag:
        raise InputError(f"{tag} is the champion already", "there is nothing to judge")
    keep_test_rows(root, production)
    if champion is not None:
        stored(champion)
    folder = production / GATE / tag.rpartition(":")[2]
    trainer = _Trainer.read(root, params)
    new = new_test(root, params, production) if champion else None
    old = old_test(root, params, champion, production) if champion else None
    asked = {"parity": Questions(trainer.rows, _answer_limit(root), {})}
    asked |= {name: test for name, test in (("new", new), ("old", old)) if test}
    answers = _answers(production, params, tag, champion, asked, folder / "answers.json")
    verdict = trainer.compare(answers, params, tag)
    write_json(production / reports("parity") / f"{verdict.version}.json", asdict(verdict))
    write_json(folder / "parity.json", asdict(verdict))
    card = card_problems(root)
    if (root / CARD).exists():
        with atomic_write(folder / "model_card.md") as beside:
            shutil.copyfile(root / CARD, beside)
    return Evidence(
        tag=tag,
        champion=champion,
        task=read_task(root),
        new=_asked(new, answers["new"]) if new else None,
        old=_asked(old, answers["old"]) if old else None,
        parity=verdict,
        card=tuple(card),
        evaluation=read_json(root / reports("evaluate") / "metrics.json"),
        left_out={
            f"{name}: {reason}": count
            for name, test in (("new", new), ("old", old))
            if test
            for reason, count in test.left_out.items()
        },
        files=file_hashes(production, sorted(folder.iterdir())),
    )


def new_test(root: Path, params: Params, production: Path | None = None) -> Questions:
    """Return the held-out labelled rows of the new traffic that no training row asks.

    They may be written as long an answer as users get.
    """
    trained = {normalised(row.question) for row in _training_rows(root)}
    rows, left_out = _usable(read_labelled((production or root) / HELD_OUT), read_task(root))
    kept = [row for row in rows if normalised(row.question) not in trained]
    _count(left_out, "the candidate was trained on the question", len(rows) - len(kept))
    return _drawn(kept, params, params.services.answers.default_max_tokens, left_out)


def old_test(root: Path, params: Params, champion: str, production: Path | None = None) -> Questions:
    """Return the champion's test rows, without those whose group or question the candidate trained on."""
    kept_rows = (production or root) / TESTS / f"{champion.rpartition(':')[2]}.parquet"
    if not kept_rows.exists():
        logger.warning("the test rows of %s were not kept: it is asked those of the candidate", champion)
        kept_rows = root / artifacts("split") / "test.parquet"
    training = _training_rows(root)
    groups, questions = {row.group for row in training}, {normalised(row.question) for row in training}
    rows, left_out = _usable(read_rows(kept_rows), read_task(root))
    kept = [row for row in rows if row.group not in groups and normalised(row.question) not in questions]
    _count(left_out, "the candidate was trained on the group or question", len(rows) - len(kept))
    return _drawn(kept, params, _answer_limit(root), left_out)


def card_problems(root: Path) -> list[str]:
    """Return what speaks against the model card: that it is not there, another adapter's, or incomplete."""
    path = root / CARD
    if not path.exists():
        return [f"{CARD} is not there"]
    text = path.read_text(encoding="utf-8")
    adapter = root / artifacts("finetune")
    problems = []
    if dvc_hash(adapter) not in text:
        problems.append(f"{CARD} does not name the hash of {artifacts('finetune')}: it is another adapter's")
    weights = adapter / "adapter_model.safetensors"
    exported = read_json(root / artifacts("export") / "serving.json").get("adapter_sha256")
    if not weights.exists() or _sha256(weights) != exported:
        problems.append(f"{artifacts('export')} was not made from the adapter in {artifacts('finetune')}")
    parts = _sections(text)
    problems += [f"{CARD} has no section {name}" for name in CARD_SECTIONS if name not in parts]
    problems += [f"section {name} of {CARD} is empty" for name in CARD_SECTIONS if parts.get(name) == ""]
    return problems


def file_hashes(root: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its path from the root."""
    return {path.relative_to(root).as_posix(): _sha256(path) for path in paths if path.is_file()}


@dataclass(frozen=True, slots=True)
class _Trainer:
    """The trainer's side of the comparison with the server: its rows, answers and prompts."""

    rows: tuple[Row, ...]
    answers: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    template: str
    task: Task

    @classmethod
    def read(cls, root: Path, params: Params) -> _Trainer:
        import pyarrow.parquet as pq

        from stages.common.chat import encode_prompt, template_sha256
        from stages.common.models import load_tokenizer

        kept = artifacts("evaluate") / "predictions.parquet"
        if not (root / kept).exists():
            raise missing(kept)
        table = pq.read_table(root / kept, columns=["id", "tuned"]).to_pydict()
        answers = dict(zip(table["id"], table["tuned"], strict=True))
        rows = [row for row in read_rows(root / artifacts("split") / "test.parquet") if row.id in answers]
        rows = rows[: params.services.parity.max_rows]
        tokenizer = load_tokenizer(root / artifacts("fetch_base"))
        return cls(
            tuple(rows),
            tuple(answers[row.id] for row in rows),
            tuple(len(encode_prompt(tokenizer, row.prompt)) for row in rows),
            template_sha256(tokenizer),
            read_task(root),
        )

    def compare(self, answers: Mapping[str, Any], params: Params, tag: str) -> parity.Verdict:
        served = [
            parity.Served(answer["candidate"], answer["prompt_tokens"])
            for answer in (answers["parity"][row.id] for row in self.rows)
        ]
        return parity.compare(
            self.rows,
            self.answers,
            served,
            self.prompt_tokens,
            answers["template_sha256"] == self.template,
            tag.rpartition(":")[2],
            params,
            self.task,
        )


def _check_candidate(root: Path, tag: str) -> None:
    made = add_pipeline_output(root)
    if made != tag:
        raise InputError(
            f"the pipeline's output is {made}, not {tag}",
            "judge what it made last, or bring the other's parameters and data back and run it again",
        )


def _training_rows(root: Path) -> list[Row]:
    return read_rows(root / artifacts("split") / "train.parquet")


def _answer_limit(root: Path) -> int:
    limit: int = read_json(root / reports("evaluate") / "metrics.json")["answer_limit_tokens"]
    return limit


def _usable(rows: Sequence[Row], task: Task) -> tuple[list[Row], dict[str, int]]:
    """Return the rows that can be judged; each question of each conversation once."""
    left_out: dict[str, int] = {}
    kept = list({row.id: row for row in rows}.values())
    _count(left_out, "given twice", len(rows) - len(kept))
    judged = [row for row in kept if task.find_problem(row.answer) is None]
    _count(left_out, "the label is not an answer of the task", len(kept) - len(judged))
    return judged, left_out


def _count(left_out: dict[str, int], reason: str, rows: int) -> None:
    if rows:
        left_out[reason] = rows


def _drawn(rows: Sequence[Row], params: Params, max_tokens: int, left_out: dict[str, int]) -> Questions:
    gate = params.flows.retrain.gate
    if gate.max_rows is not None and len(rows) > gate.max_rows:
        _count(left_out, "more than flows.retrain.gate.max_rows", len(rows) - gate.max_rows)
        chosen = sorted(random.Random(gate.seed).sample(range(len(rows)), gate.max_rows))
        rows = [rows[index] for index in chosen]
    return Questions(tuple(rows), max_tokens, left_out)


def _answers(
    production: Path,
    params: Params,
    tag: str,
    champion: str | None,
    asked: Mapping[str, Questions],
    path: Path,
) -> dict[str, Any]:
    """Return all answers: those that lie there, if they are to the same questions, else asked now."""
    key = _key(tag, champion, asked)
    if path.exists():
        known: dict[str, Any] = read_json(path)
        if known.get("key") == key:
            logger.info("both were asked before: their answers are in %s", path)
            return known
    with private_server.serving(production, params, tag, champion) as service:
        found = asyncio.run(_ask(service.url, params, tag, champion, asked))
    write_json(path, {"key": key, "tag": tag, "champion": champion, **found})
    return dict(read_json(path))


def _key(tag: str, champion: str | None, asked: Mapping[str, Questions]) -> str:
    """Return what tells one asking from another: who is asked what, and when an answer is cut."""
    said = [tag, champion]
    questions = {
        name: [test.max_tokens, [[row.id, row.answer] for row in test.rows]] for name, test in asked.items()
    }
    return hashlib.sha256(canonical_json([said, questions]).encode()).hexdigest()


async def _ask(
    url: str, params: Params, tag: str, champion: str | None, asked: Mapping[str, Questions]
) -> dict[str, Any]:
    """Ask the candidate every row of every test, and the champion those of its own tests."""
    engine = params.services.engine
    at_once = min(params.flows.retrain.gate.concurrency, engine.max_running + engine.max_waiting)
    about = await parity.served_model(url, tag, None)
    candidate = await _ask_one(url, tag, list(asked.values()), at_once)
    tests = {name: test for name, test in asked.items() if name != "parity"}
    former = await _ask_one(url, champion, list(tests.values()), at_once) if champion else {}
    found: dict[str, Any] = {"template_sha256": about["template_sha256"]}
    for name, test in asked.items():
        found[name] = {}
        for row in test.rows:
            answer = candidate[row.id, test.max_tokens]
            said = {"question": row.question, "reference": row.answer, **_said("candidate", answer)}
            if name != "parity":
                said |= _said("champion", former[row.id, test.max_tokens])
            found[name][row.id] = said
    return found


def _said(who: str, answer: parity.Served) -> dict[str, Any]:
    tokens = {"prompt_tokens": answer.prompt_tokens} if who == "candidate" else {}
    return {who: answer.text, **tokens}


async def _ask_one(
    url: str, tag: str, tests: Sequence[Questions], at_once: int
) -> dict[tuple[str, int], parity.Served]:
    """Ask one model the rows of several tests, those that several have only once."""
    answers: dict[tuple[str, int], parity.Served] = {}
    for limit in sorted({test.max_tokens for test in tests}):
        rows = list({row.id: row for test in tests if test.max_tokens == limit for row in test.rows}.values())
        logger.info("asking %s %d questions", tag, len(rows))
        served = await parity.ask_all(url, tag, rows, limit, at_once, None)
        answers |= {(row.id, limit): answer for row, answer in zip(rows, served, strict=True)}
    return answers


def _asked(test: Questions, answers: Mapping[str, Any]) -> Asked:
    return Asked(
        test.rows,
        tuple(answers[row.id]["candidate"] for row in test.rows),
        tuple(answers[row.id]["champion"] for row in test.rows),
    )


def _sections(text: str) -> dict[str, str]:
    """Return what stands under each heading of the second rank."""
    parts = [part.partition("\n") for part in f"\n{text}".split("\n## ")[1:]]
    return {heading.strip(): body.strip() for heading, _, body in parts}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
