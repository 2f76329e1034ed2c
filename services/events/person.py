"""Export or forget what one person wrote: the exchanges of a user or a session, and the feedback on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import ColumnElement, Engine, select

from services.events.opening import open_database
from services.events.pruning import Pruned, delete_selected, release_pages
from services.events.reading import export_selected
from services.events.schema import exchanges
from stages.common.artifacts import STATE, artifacts, reports
from stages.common.logs import get_logger
from stages.common.privacy.redaction import hash_name

logger = get_logger("events")

# Artifacts that have rows, those that learned from them, and reports that quote some.
_WITH_ROWS = ("collect", "curate", "split", "preflight", "ask_base", "evaluate")
_LEARNED = ("finetune", "export", "compress", "initial_adapter")
_THAT_QUOTE = ("validate", "preflight", "evaluate", "model_card")

# Where else it may be, with what removes it there.
NOT_REACHED = (
    (
        f"{Path('data') / 'feedback' / 'rows.jsonl'} and {STATE / 'holdout' / 'rows.jsonl'}",
        "rows made of feedback; the next retraining writes them from the events that are left",
    ),
    (
        f"{', '.join(str(artifacts(stage)) for stage in _WITH_ROWS)}, {Path('checkpoints') / 'teacher'} and"
        f" {STATE / 'sweep'}",
        "rows, rejected rows, long rows and answers; the next training or sweep writes them again",
    ),
    (
        f"{STATE / 'tests'}/*.parquet and {STATE / 'gate'}/*/answers.json",
        "test rows of each version and the answers to them; search them for the person's texts, and delete"
        " the files that have one: a champion without its file is judged on the candidate's test rows",
    ),
    (
        f"{', '.join(str(artifacts(stage)) for stage in _LEARNED)},"
        f" {Path('checkpoints') / 'finetune'}, and the versions in BentoML's model store and in MLflow",
        "weights that learned from the rows, and draft_corpus.npz with rows themselves; train again, then"
        " delete the older versions and checkpoints",
    ),
    (".dvc/cache and DVC's remotes", "older rows and models; dvc gc --workspace, with --cloud for a remote"),
    (
        ", ".join(str(reports(stage)) for stage in _THAT_QUOTE),
        "pages and tables that quote rows; the next training writes them again",
    ),
    (
        f"{reports('watch').parent}, {STATE / 'evidently'}, {STATE / 'mlflow-artifacts'} and MLflow's runs",
        "reports that may quote words of questions and answers; delete those of the time",
    ),
    (
        f"{STATE / 'logs'}, exported files, logs of proxies, copies and backups of the event store",
        "search them for the person's texts, and delete them there",
    ),
)


@dataclass(frozen=True, slots=True)
class Person:
    """Whose events: the `user` or the `session` that requests named, as it was sent."""

    field: Literal["user", "session"]
    name: str

    def matches(self) -> ColumnElement[bool]:
        """Return the condition on exchanges; a name that is personal data is stored as its hash."""
        return exchanges.c[self.field].in_((self.name, hash_name(self.name)))


def forget(url: str, person: Person) -> Pruned:
    """Delete the exchanges of a person, shadows included, and all feedback on them; return the counts.

    What is deleted is overwritten in SQLite's file, and its log is emptied; PostgreSQL's tables are vacuumed.
    Deletes in short transactions, so that the service can write in between. A request that is still being
    answered is stored afterwards.

    Raises:
        InputError: as `read_exchanges`.
    """
    wanted = select(exchanges.c.request_id).where(person.matches())
    with open_database(url) as engine:
        exchanges_gone, feedback_gone = delete_selected(engine, wanted)
        release_pages(engine)
        _overwrite(engine)
    return Pruned(exchanges_gone, feedback_gone)


def export_person(url: str, person: Person, path: Path) -> int:
    """Write the exchanges of a person with all feedback on them to a Parquet file; return their number.

    Raises:
        InputError: as `read_exchanges`.
    """
    return export_selected(url, person.matches(), path)


def _overwrite(engine: Engine) -> None:
    """Remove deleted rows from what the database keeps next to its tables."""
    with engine.connect() as connection:
        if engine.dialect.name != "sqlite":
            alone = connection.execution_options(isolation_level="AUTOCOMMIT")
            alone.exec_driver_sql("VACUUM exchanges, feedback")
            return
        driver: Any = connection.connection.driver_connection
        busy, *_ = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            logger.warning(
                "the log of the database is in use and may hold what was deleted; fix: run it again later"
            )
