import asyncio
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from sqlalchemy import text

from flows.gate.evaluation import GATE, TESTS
from flows.sweep.baseline import FOLDER as SWEEP
from monitoring.feedback.rows import HELD_OUT, ROWS
from monitoring.workspace import WORKSPACE
from services.events import (
    NOT_REACHED,
    BadEvent,
    ClockInDoubt,
    Feedback,
    Person,
    Pruned,
    StoreUnavailable,
    count_exchanges,
    export_person,
    export_window,
    forget,
    open_store,
    prune,
    pruning,
    read_exchanges,
    read_feedback,
    read_joined,
    read_times,
    reading,
    writing,
)
from services.events.__main__ import main
from services.events.database import check_url, make_engine
from services.events.schema import metadata
from services.startup import prune_daily
from stages.common.artifacts import STATE
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.privacy.redaction import pseudonymise
from tests.services.events.recorded import EXCHANGE, exchange

ROOT = Path(__file__).parents[3]

FEEDBACK = Feedback("f0", "r0", 1001.5, None, -1, '{"intent":"Off"}', "no")


@contextmanager
def opened(url, queue_size=1000, group_rows=64, group_wait_s=0.001, **more):
    store = open_store(url, queue_size=queue_size, group_rows=group_rows, group_wait_s=group_wait_s, **more)
    try:
        yield store
    finally:
        store.close()


def record(store, *recorded):
    """Record side by side; return None, or the error, of each."""

    async def all_of_them():
        return await asyncio.gather(*(store.record(event) for event in recorded), return_exceptions=True)

    return asyncio.run(all_of_them())


def rows_of(batches):
    return [row for batch in batches for row in batch.to_pylist()]


def ids(url, start=0.0, end=1e12):
    return [row["request_id"] for row in rows_of(read_exchanges(url, start, end))]


def until_healthy(store, seconds=120):
    deadline = time.monotonic() + seconds
    while store.find_problem() is not None:
        assert time.monotonic() < deadline, store.find_problem()
        time.sleep(0.05)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request, tmp_path):
    """An empty place for a store, in each kind of database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/deep/events.db"
        return
    yield request.getfixturevalue("postgresql_url")


@pytest.fixture
def postgresql_url(postgresql):
    yield postgresql.url
    engine = make_engine(check_url(postgresql.url))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


@pytest.fixture
def sqlite_url(tmp_path):
    return f"sqlite:///{tmp_path}/events.db"


def test_what_was_recorded_is_read_back_as_it_was(url):
    bare = exchange(1, key_id=None, answer=None, valid_output=None, mean_logprob=None, first_token_s=None)
    with opened(url) as store:
        assert record(store, EXCHANGE, bare, FEEDBACK) == [None] * 3
        assert rows_of(read_exchanges(url, 0, 2000)) == [asdict(EXCHANGE), asdict(bare)]
        assert rows_of(read_feedback(url, 0, 2000)) == [asdict(FEEDBACK)]
        assert store.find_problem() is None


def test_the_tables_of_the_code_are_those_of_the_migrations(url):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    opened(url).__enter__().close()
    engine = make_engine(check_url(url))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_store_of_the_first_version_keeps_its_events_under_the_names_of_this_one(url):
    with opened(url) as store:
        assert record(store, EXCHANGE, FEEDBACK) == [None] * 2
    engine = make_engine(check_url(url))
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(text("ALTER TABLE exchanges RENAME COLUMN decisions TO verdicts"))
        connection.execute(text("DROP TABLE prunings"))
        connection.execute(text("ALTER TABLE exchanges DROP COLUMN reasoning"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    engine.dispose()
    with pytest.raises(InputError, match="version 0001, and this code needs 0004"):
        list(read_exchanges(url, 0, 2000))
    opened(url).__enter__().close()
    assert rows_of(read_exchanges(url, 0, 2000)) == [asdict(EXCHANGE)]
    assert rows_of(read_feedback(url, 0, 2000)) == [asdict(FEEDBACK)]


def test_a_second_event_with_an_id_is_refused_and_its_group_is_stored(url):
    with opened(url, group_wait_s=0.2) as store:
        assert record(store, exchange(1)) == [None]
        outcomes = record(store, exchange(2), exchange(1), exchange(3), exchange(3), FEEDBACK)
        assert [type(outcome) for outcome in outcomes] == [
            type(None),
            BadEvent,
            type(None),
            BadEvent,
            type(None),
        ]
        assert "r1" in str(outcomes[1])
        assert store.find_problem() is None
    assert ids(url) == ["r1", "r2", "r3"]


@pytest.mark.parametrize(
    "bad",
    [
        replace(FEEDBACK, feedback_id="bad", thumb=5),
        replace(FEEDBACK, feedback_id="bad", thumb=object()),
        replace(FEEDBACK, feedback_id="bad", comment=5),
        replace(FEEDBACK, feedback_id="bad", given_at=None),
        replace(FEEDBACK, feedback_id="bad", thumb=2**70),
        replace(FEEDBACK, feedback_id=None),
        replace(FEEDBACK, feedback_id=object()),
        "no event at all",
    ],
    # Names that are the same in every process: an object's own holds its address.
    ids=[
        "a thumb of 5",
        "a thing as thumb",
        "a number as comment",
        "no time",
        "a number beyond 64 bits",
        "no id",
        "a thing as id",
        "no event",
    ],
)
def test_an_event_that_fits_no_table_harms_no_other(url, bad):
    with opened(url, group_wait_s=0.05) as store:
        outcomes = record(store, EXCHANGE, bad, FEEDBACK)
        assert [type(outcome) for outcome in outcomes] == [type(None), BadEvent, type(None)]
        assert store.find_problem() is None
        assert record(store, exchange(1)) == [None]


def test_characters_that_no_database_holds_are_replaced(url):
    with opened(url) as store:
        odd = exchange(
            1, answer="a\0b\ud800c é 👩‍🚀", messages='["\\u0000 \\ud800 1"]', mean_logprob=float("nan")
        )
        assert record(store, odd) == [None]
    (row,) = rows_of(read_exchanges(url, 0, 2000))
    assert row["answer"] == "a\ufffdb?c é 👩‍🚀"
    assert json.loads(row["messages"]) == ["\0 \ud800 1"]
    assert row["mean_logprob"] is None


def test_personal_data_is_not_stored(url):
    messages = json.dumps([{"role": "user", "content": "I am ann@example.org"}])
    parameters = json.dumps({"stop": ["ann@example.org"], "json_schema": '{"const": "ann@example.org"}'})
    asked = exchange(1, messages=messages, parameters=parameters, answer="hello ann@example.org")
    asked = replace(asked, reasoning='It is {"to": "ann@example.org"}.')
    with opened(url) as store:
        told = replace(FEEDBACK, correction='{"to": "ann@example.org"}', comment="ring +4930123456")
        assert record(store, asked, told) == [None, None]
    (row,), (feedback,) = rows_of(read_exchanges(url, 0, 2000)), rows_of(read_feedback(url, 0, 2000))
    assert json.loads(row["messages"])[0]["content"] == "I am [email]"
    assert json.loads(row["parameters"]) == {"stop": ["[email]"], "json_schema": '{"const": "[email]"}'}
    assert row["answer"] == "hello [email]"
    assert row["reasoning"] == 'It is {"to": "[email]"}.'
    assert (feedback["correction"], feedback["comment"]) == ('{"to": "[email]"}', "ring [phone]")


def test_an_event_that_cannot_be_redacted_is_not_stored(url):
    def redact(text):
        if "secret" in text:
            raise RuntimeError("no")
        return text

    with opened(url, redact=redact, group_wait_s=0.2) as store:
        outcomes = record(store, exchange(1, answer="secret"), exchange(2))
        assert [type(outcome) for outcome in outcomes] == [BadEvent, type(None)]
    assert ids(url) == ["r2"]


def test_a_window_holds_its_start_and_not_its_end_and_is_in_order(url, monkeypatch):
    monkeypatch.setattr(reading, "PAGE_ROWS", 4)
    with opened(url) as store:
        numbers = [7, 3, 9, 1, 0, 2, 8, 4, 6, 5]
        assert not any(record(store, *(exchange(number) for number in numbers)))
        same_time = [replace(exchange(5), request_id=f"same{n}") for n in range(9)]
        assert not any(record(store, *same_time))
    found = rows_of(read_exchanges(url, 1001.0, 1009.0))
    assert [row["received_at"] for row in found] == sorted(row["received_at"] for row in found)
    assert sorted(row["request_id"] for row in found) == sorted(
        [f"r{n}" for n in range(1, 9)] + [e.request_id for e in same_time]
    )
    assert all(batch.num_rows <= 4 for batch in read_exchanges(url, 0, 1e12))
    assert rows_of(read_exchanges(url, 1001.0, 1001.0)) == []


def test_a_page_of_long_texts_ends_early(url, monkeypatch):
    monkeypatch.setattr(reading, "PAGE_CHARS", 5000)
    with opened(url) as store:
        assert not any(record(store, *(exchange(n, answer="x" * 2000) for n in range(10))))
    assert max(batch.num_rows for batch in read_exchanges(url, 0, 1e12)) == 3
    assert ids(url) == [f"r{n}" for n in range(10)]


def test_feedback_comes_with_its_exchange(url, tmp_path):
    with opened(url) as store:
        later = replace(FEEDBACK, feedback_id="f1", given_at=5000.0, thumb=1, correction=None, comment=None)
        assert not any(record(store, EXCHANGE, exchange(1), later, FEEDBACK))
    first, second = rows_of(read_joined(url, 0, 2000))
    assert [told["feedback_id"] for told in first["feedback"]] == ["f0", "f1"]
    assert second["feedback"] == []
    assert export_window(url, 0, 2000, tmp_path / "window.parquet") == 2
    assert pq.read_table(tmp_path / "window.parquet").to_pylist() == [first, second]
    assert export_window(url, 3000, 4000, tmp_path / "window.parquet") == 0
    assert pq.read_table(tmp_path / "window.parquet").to_pylist() == []


def test_a_group_ends_before_its_texts_take_long_to_redact(sqlite_url, monkeypatch):
    rows, write = [], writing._Writer.write
    monkeypatch.setattr(
        writing._Writer, "write", lambda *called: (rows.append(len(called[1])), write(*called))[1]
    )
    with opened(sqlite_url) as store:
        long = "x" * (writing.GROUP_CHARS // 2 + 1)
        assert not any(record(store, *(exchange(n, answer=long) for n in range(6))))
    assert sum(rows) == 6 and max(rows) <= 2


def test_route_and_parameters_of_an_answer_are_found_once_it_is_stored(url):
    with opened(url) as store:
        assert not any(record(store, EXCHANGE, exchange(1, answer=None, status=422)))
        found = [store.find_request(name) for name in ("r0", "r1", "r2")]
    assert found == [("/v1/chat/completions", '{"max_tokens": 9}'), None, None]


def test_old_exchanges_go_with_their_feedback_and_the_rest_stays(url, monkeypatch):
    monkeypatch.setattr(pruning, "PAGE_ROWS", 7)
    with opened(url) as store:
        assert not any(record(store, *(exchange(n) for n in range(30))))
        told = [replace(FEEDBACK, feedback_id=f"f{n}", request_id=f"r{n}", given_at=9e9) for n in range(30)]
        orphans = [
            replace(FEEDBACK, feedback_id=f"o{n}", request_id="gone", given_at=500.0 + n * 1000)
            for n in (0, 1)
        ]
        assert not any(record(store, *told, *orphans))
        pruned = prune(url, 0.0, now=1020.0)
        assert (pruned.exchanges, pruned.feedback) == (20, 21)
        assert ids(url) == [f"r{n}" for n in range(20, 30)]
        left = [row["feedback_id"] for row in rows_of(read_feedback(url, 0, 1e12))]
        assert left == ["o1", *sorted(f"f{n}" for n in range(20, 30))]
        assert record(store, exchange(31)) == [None]
        assert prune(url, 0.0, now=1020.0) == Pruned(0, 0)


def test_pruning_gives_the_space_back(sqlite_url, tmp_path):
    with opened(sqlite_url) as store:
        assert not any(record(store, *(exchange(n, answer="x" * 20_000) for n in range(100))))
    before = (tmp_path / "events.db").stat().st_size
    prune(sqlite_url, 0.0, clock_is_right=True)
    assert (tmp_path / "events.db").stat().st_size < before / 5


DAY = 86_400.0


def test_a_clock_that_jumps_ahead_deletes_nothing(url):
    """Nor where requests have come since: what counts is when the events were pruned last."""
    now = 1000 * DAY
    with opened(url) as store:
        assert prune(url, 90 * DAY, now=now) == Pruned(0, 0)
        days = [replace(exchange(n), received_at=now - n * 0.5 * DAY) for n in range(150)]
        jumped = replace(exchange(150), received_at=now + 365 * DAY)
        assert not any(record(store, *days, jumped))
        with pytest.raises(ClockInDoubt, match=r"150 of 151 .*last pruning was at 1972-09-27 00:00 UTC"):
            prune(url, 90 * DAY, now=now + 366 * DAY)
        assert len(ids(url)) == 151
        # Back at the right time, a day later: what has become old goes, and no more.
        assert prune(url, 74 * DAY, now=now + DAY) == Pruned(3, 0)


def test_without_a_pruning_before_the_newest_exchange_tells_the_time(url):
    with opened(url) as store:
        assert not any(record(store, *(exchange(n) for n in range(101))))
    with pytest.raises(ClockInDoubt, match=r"101 of 101 .*before then was at 1970-01-01 00:18 UTC"):
        prune(url, 90 * DAY, now=100 * DAY)
    assert prune(url, 90 * DAY, now=100 * DAY, clock_is_right=True) == Pruned(101, 0)


def test_all_of_a_few_exchanges_go_at_once_only_if_the_clock_is_right(url):
    with opened(url) as store:
        assert not any(record(store, *(exchange(n) for n in range(3))))
    with pytest.raises(ClockInDoubt, match="3 of 3 exchanges"):
        prune(url, 90 * DAY, now=100 * DAY)
    assert prune(url, 90 * DAY, now=100 * DAY, clock_is_right=True) == Pruned(3, 0)


def test_without_a_pruning_before_a_gap_between_the_exchanges_tells_that_the_clock_has_jumped(url):
    """Those that came since have the wrong time too; without a gap, it is only the first pruning."""
    now = 1000 * DAY
    with opened(url) as store:
        days = [replace(exchange(n), received_at=now - n * 0.5 * DAY) for n in range(150)]
        jumped = [replace(exchange(n), received_at=now + (365 + n) * DAY) for n in range(150, 153)]
        assert not any(record(store, *days, *jumped))
    with pytest.raises(ClockInDoubt, match=r"150 of 153 .*the newest exchange before then was at 1972-09-27"):
        prune(url, 90 * DAY, now=now + 519 * DAY)
    assert prune(url, 20 * DAY, now=now) == Pruned(109, 0)


def test_what_has_become_old_since_yesterday_goes_however_much_it_is(url):
    """A day of many requests, then none: its ninetieth day ends like any other."""
    with opened(url) as store:
        assert not any(record(store, *(exchange(n) for n in range(101))))
    for day in range(1, 91):
        assert prune(url, 90 * DAY, now=day * DAY, clock_is_right=day == 1) == Pruned(0, 0)
    assert prune(url, 90 * DAY, now=91 * DAY) == Pruned(101, 0)


def test_the_service_logs_that_it_deletes_nothing_and_goes_on(sqlite_url, caplog):
    with opened(sqlite_url) as store:
        assert not any(record(store, *(exchange(n) for n in range(101))))
    settings = load_params(ROOT / "params.yaml").services.events.model_copy(update={"url": sqlite_url})

    async def prune_until_logged():
        daily = asyncio.create_task(prune_daily(settings))
        while not caplog.records and not daily.done():
            await asyncio.sleep(0.01)
        assert not daily.done()  # it waits for the next day
        daily.cancel()

    asyncio.run(prune_until_logged())
    assert "no old events were deleted" in caplog.text and "it may have jumped" in caplog.text
    assert len(ids(sqlite_url)) == 101


def test_one_person_is_forgotten_with_all_feedback_and_no_one_else(url, monkeypatch):
    monkeypatch.setattr(pruning, "PAGE_ROWS", 3)
    with opened(url) as store:
        hers = [exchange(n, user="ann", session=f"s{n}") for n in range(7)]
        shadow = exchange(7, user="ann", role="shadow", shadow_of="r0")
        others = [exchange(8, user="bob"), exchange(9, user=None), exchange(10, user="Ann")]
        told = [replace(FEEDBACK, feedback_id=f"f{n}", request_id=f"r{n}") for n in range(11)]
        assert not any(record(store, *hers, shadow, *others, *told))
        assert forget(url, Person("user", "ann")) == Pruned(8, 8)
        assert ids(url) == ["r8", "r9", "r10"]
        assert [row["feedback_id"] for row in rows_of(read_feedback(url, 0, 1e12))] == ["f10", "f8", "f9"]
        assert forget(url, Person("user", "ann")) == Pruned(0, 0)
        assert forget(url, Person("session", "s1")) == Pruned(3, 3)
        assert ids(url) == [] and store.find_problem() is None


def test_a_person_named_by_an_address_is_found_under_the_hash(url, tmp_path):
    name = "ann@perennial-mail.net"
    with opened(url) as store:
        assert not any(record(store, exchange(1, user=pseudonymise(name)), exchange(2, user="bob")))
    assert export_person(url, Person("user", name), tmp_path / "ann.parquet") == 1
    assert forget(url, Person("user", name)) == Pruned(1, 0)
    assert ids(url) == ["r2"]


def test_everything_of_one_person_is_exported_with_the_feedback_on_it(url, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PAGE_ROWS", 2)
    with opened(url) as store:
        asked = [exchange(n, user="ann" if n % 2 else "bob") for n in range(9)]
        assert not any(record(store, *asked, replace(FEEDBACK, request_id="r1")))
    path = tmp_path / "ann.parquet"
    assert export_person(url, Person("user", "ann"), path) == 4
    rows = pq.read_table(path).to_pylist()
    assert [row["request_id"] for row in rows] == ["r1", "r3", "r5", "r7"]
    assert [row["feedback"] for row in rows[1:]] == [[]] * 3
    assert rows[0]["feedback"][0]["comment"] == "no"


def test_nothing_of_a_forgotten_person_is_left_in_the_files(sqlite_url, tmp_path):
    with opened(sqlite_url) as store:
        assert not any(record(store, exchange(1, user="ann", answer="zanzibar " * 900), exchange(2)))
        forget(sqlite_url, Person("user", "ann"))
        files = [path.read_bytes() for path in tmp_path.glob("events.db*")]
    assert files and not any(b"zanzibar" in file for file in files)


# What stages and runs write without a text of a user.
WITHOUT_TEXTS = {"artifacts/fetch_base", "reports/curate/rows.svg", "reports/check_bias/groups.svg"}
WITHOUT_TEXTS |= {"reports/compress/comparison"}
WITHOUT_TEXTS |= {f"reports/finetune/{name}" for name in ("loss.svg", "loss.csv", "validation.csv")}
STATE_WITHOUT_TEXTS = {
    "aliases.json",
    "api_keys.json",
    "mlflow-run.lock",
    "poisoned.json",
    "prefect",
    "up.json",
}
STATE_WITHOUT_TEXTS |= {"release.lock", "releases.jsonl", "retrain.json", "retrain.lock", "retrainings.jsonl"}
STATE_WITHOUT_TEXTS |= {"server.json", "server.log", "demo"}  # the demo's checkout has no texts of users


def test_every_place_that_stages_and_runs_write_is_reached_or_named():
    places = " ".join(place for place, _ in NOT_REACHED)
    root = Path(__file__).parents[3]
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    outs = [next(iter(out)) if isinstance(out, dict) else out for stage in stages for out in stage["outs"]]
    code = [
        path.read_text()
        for top in ("flows", "monitoring", "services", "stages")
        for path in root.glob(f"{top}/**/*.py")
    ]
    names = {name for text in code for name in re.findall(r'STATE\)? / "([^"]+)"', text)}
    assert len(outs) > 15 and len(names) > 15
    named = {out for out in outs if "/".join(out.split("/")[:2]) in places}
    assert set(outs) - named == WITHOUT_TEXTS & set(outs)
    assert {name for name in names if str(STATE / name) not in places} == STATE_WITHOUT_TEXTS
    for place in (
        ROWS,
        HELD_OUT,
        WORKSPACE,
        TESTS,
        GATE,
        "checkpoints/finetune",
        SWEEP,
        "BentoML's model store",
    ):
        assert str(place) in places


@pytest.mark.parametrize("folder", [".perennial", "own"])
@pytest.mark.parametrize("is_wide", [False, True])
def test_no_other_user_reads_the_files_of_the_store(tmp_path, folder, is_wide):
    path = tmp_path / folder / "events.db"
    if is_wide:  # as an earlier version made them
        path.parent.mkdir(mode=0o755)
        path.touch(0o644)
    with opened(f"sqlite:///{path}") as store:
        record(store, exchange(1))
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert {"events.db", "events.db-wal"} <= modes.keys() and set(modes.values()) == {0o600}
    if folder == ".perennial":
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_sqlite_waits_for_the_disk(sqlite_url):
    with opened(sqlite_url) as store, store._engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}


@pytest.mark.slow
def test_postgresql_waits_for_the_disk_whatever_the_server_says(postgresql, postgresql_url):
    engine = make_engine(check_url(postgresql.url))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ALTER DATABASE postgres SET synchronous_commit = off"))
    engine.dispose()
    with opened(postgresql.url) as store, store._engine.connect() as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"


@pytest.mark.slow
def test_a_database_that_cannot_hold_every_text_is_refused(postgresql):
    engine = make_engine(check_url(postgresql.url))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(
            text("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        )
    engine.dispose()
    with pytest.raises(InputError, match="LATIN1"):
        opened(postgresql.url.replace("/postgres", "/latin")).__enter__()


def test_another_process_reads_while_this_one_writes(url):
    read = (
        "import sys; from services.events import read_exchanges;"
        "print(sum(batch.num_rows for batch in read_exchanges(sys.argv[1], 0, 1e12)))"
    )
    with opened(url) as store:
        assert not any(record(store, *(exchange(n) for n in range(10))))
        done = subprocess.run([sys.executable, "-c", read, url], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == "10", done.stderr
        assert record(store, exchange(11)) == [None]


def test_processes_that_open_at_once_find_one_schema(url):
    opening = (
        "import sys, alembic.command; from services.events import open_store; print('ready', flush=True);"
        "sys.stdin.readline();"
        "store = open_store(sys.argv[1], queue_size=9, group_rows=9, group_wait_s=0);"
        "assert store.find_problem() is None; store.close()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    several = [subprocess.Popen([sys.executable, "-c", opening, url], cwd=ROOT, **pipes) for _ in range(4)]
    for process in several:
        assert process.stdout.readline() == "ready\n"
    for process in several:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in several:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_a_database_newer_than_the_code_is_refused(url):
    opened(url).__enter__().close()
    engine = make_engine(check_url(url))
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for use in (lambda: opened(url).__enter__(), lambda: ids(url), lambda: prune(url, 0)):
        with pytest.raises(InputError, match=r"version 9999, which is newer than this code"):
            use()
    engine.dispose()


@pytest.mark.parametrize(
    "wrong",
    ["", "events.db", "mysql://a:hidden@b/c", "postgresql://a:hidden@b/c", "sqlite://", "sqlite:///:memory:"],
)
def test_a_url_of_no_store_is_refused_without_its_password(wrong):
    with pytest.raises(InputError, match=r"sqlite:///path") as caught:
        open_store(wrong, queue_size=1, group_rows=1, group_wait_s=0)
    assert "hidden" not in str(caught.value)


def test_reading_what_is_not_there_says_what_to_do_and_makes_nothing(sqlite_url, tmp_path):
    with pytest.raises(InputError, match=r"there is no event store at .*\n.*migrate"):
        ids(sqlite_url)
    assert list(tmp_path.iterdir()) == []


def test_a_database_out_of_reach_is_named_at_once():
    with pytest.raises(StoreUnavailable, match="refused"):
        open_store("postgresql+psycopg://a:hidden@127.0.0.1:1/c", queue_size=1, group_rows=1, group_wait_s=0)


def test_a_full_queue_refuses_and_the_waiting_events_are_stored(sqlite_url):
    with opened(sqlite_url, queue_size=5, group_rows=5, group_wait_s=0.3) as store:
        outcomes = record(store, *(exchange(n) for n in range(20)))
    refused = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, StoreUnavailable)]
    assert refused
    assert "5 events are waiting" in str(outcomes[refused[0]])
    assert set(ids(sqlite_url)) == {f"r{n}" for n in range(20) if n not in refused}


def test_closing_writes_what_waits_and_refuses_what_comes_after(sqlite_url):
    async def close_while_recording(store):
        tasks = [asyncio.create_task(store.record(exchange(n))) for n in range(50)]
        await asyncio.sleep(0)
        store.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.record(exchange(99))
        return outcomes

    with opened(sqlite_url, group_rows=7) as store:
        assert asyncio.run(close_while_recording(store)) == [None] * 50
        assert store.find_problem() == "the event store is closed"
    assert len(ids(sqlite_url)) == 50


def test_a_caller_that_goes_away_harms_no_other(sqlite_url):
    async def cancel_one(store):
        tasks = [asyncio.create_task(store.record(exchange(n))) for n in range(10)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with opened(sqlite_url, group_wait_s=0.1) as store:
        outcomes = asyncio.run(cancel_one(store))
        assert [n for n, outcome in enumerate(outcomes) if outcome is not None] == [3]
        assert record(store, exchange(11)) == [None]  # another loop


def test_a_deleted_file_is_noticed_and_its_return_too(sqlite_url, tmp_path):
    """SQLite goes on writing to a deleted file and calls it committed."""
    file, aside = tmp_path / "events.db", tmp_path / "aside.db"
    with opened(sqlite_url, retry_s=0.2) as store:
        assert record(store, exchange(1)) == [None]
        os.rename(file, aside)
        (outcome,) = record(store, exchange(2))
        assert isinstance(outcome, StoreUnavailable)
        assert store.find_problem() is not None
        assert not file.exists()
        os.rename(aside, file)
        until_healthy(store)
        assert record(store, exchange(3)) == [None]
        assert {"r1", "r3"} <= set(ids(sqlite_url))


def test_a_deleted_log_loses_nothing(sqlite_url, tmp_path):
    with opened(sqlite_url) as store:
        assert record(store, exchange(1)) == [None]
        (tmp_path / "events.db-wal").unlink()
        assert record(store, exchange(2), exchange(3)) == [None, None]
    assert ids(sqlite_url) == ["r1", "r2", "r3"]


def test_a_corrupt_file_is_no_store(sqlite_url, tmp_path):
    (tmp_path / "events.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreUnavailable, match="not a database"):
        open_store(sqlite_url, queue_size=1, group_rows=1, group_wait_s=0)
    with pytest.raises(InputError, match="not a database"):
        ids(sqlite_url)


def test_a_file_replaced_by_a_broken_one_is_reported(sqlite_url, tmp_path):
    with opened(sqlite_url, retry_s=0.2) as store:
        assert record(store, exchange(1)) == [None]
        (tmp_path / "other").write_bytes(b"no database" * 1000)
        os.replace(tmp_path / "other", tmp_path / "events.db")
        (outcome,) = record(store, exchange(2))
        assert isinstance(outcome, StoreUnavailable)
        assert store.find_problem() is not None


def test_a_lock_held_for_long_is_reported_and_gone_when_it_is(sqlite_url, tmp_path, monkeypatch):
    monkeypatch.setattr("services.events.database.BUSY_S", 0.1)
    with opened(sqlite_url, retry_s=0.3) as store:
        other = sqlite3.connect(tmp_path / "events.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        (outcome,) = record(store, exchange(1))
        assert isinstance(outcome, StoreUnavailable)
        assert "locked" in store.find_problem()
        other.execute("ROLLBACK")
        other.close()
        until_healthy(store)
        assert record(store, exchange(1)) == [None]


def test_a_short_lock_loses_no_event(sqlite_url, tmp_path, monkeypatch):
    monkeypatch.setattr("services.events.database.BUSY_S", 0.05)
    with opened(sqlite_url, retry_s=20) as store:
        other = sqlite3.connect(tmp_path / "events.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        refused = []
        write = store._writer.write

        def note(*arguments):
            try:
                return write(*arguments)
            except Exception:
                refused.append(arguments)
                raise

        monkeypatch.setattr(store._writer, "write", note)

        async def release_later():
            recorded = asyncio.create_task(store.record(exchange(1)))
            while len(refused) < 2:
                await asyncio.sleep(0.01)
            other.execute("ROLLBACK")
            await recorded

        asyncio.run(release_later())
        other.close()
        assert store.find_problem() is None


WRITE = """
import asyncio, sys
from services.events import StoreUnavailable, open_store
from tests.services.events.recorded import exchange

async def recorder(store, number):
    for event in range(number, 10**9, 16):
        try:
            await store.record(exchange(event))
        except StoreUnavailable:
            await asyncio.sleep(0.02)
            continue
        sys.stdout.write(f"r{event}\\n")
        sys.stdout.flush()

async def main():
    store = open_store(sys.argv[1], queue_size=1000, group_rows=64, group_wait_s=0.002)
    await asyncio.gather(*(recorder(store, number) for number in range(16)))

asyncio.run(main())
"""


def acknowledged(lines):
    return [line.strip() for line in lines if line.endswith("\n")]


def test_what_was_acknowledged_survives_a_killed_process(url):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    lines = [process.stdout.readline() for _ in range(400)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    assert len(acknowledged(lines)) >= 400
    assert set(acknowledged(lines)) <= set(ids(url))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_what_was_acknowledged_survives_a_database_that_ends_and_comes_back(postgresql, postgresql_url, end):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, postgresql.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    lines = [process.stdout.readline() for _ in range(400)]
    getattr(postgresql, end)()
    time.sleep(3)  # longer than the store tries a group again
    postgresql.start()
    # Lines of before the end wait in the pipe; the time of a new one is after the start.
    lines += [process.stdout.readline() for _ in range(5000)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    assert len(acknowledged(lines)) >= 5400
    assert set(acknowledged(lines)) <= set(ids(postgresql_url))


@pytest.mark.slow
def test_a_database_that_is_restarted_quickly_loses_no_event(postgresql, postgresql_url):
    async def restart_meanwhile(store):
        await store.record(exchange(0))
        await asyncio.to_thread(postgresql.stop)
        recorded = [asyncio.create_task(store.record(exchange(n))) for n in range(1, 50)]
        await asyncio.to_thread(postgresql.start)
        return await asyncio.gather(*recorded, return_exceptions=True)

    with opened(postgresql.url, retry_s=20) as store:
        assert asyncio.run(restart_meanwhile(store)) == [None] * 49
        assert store.find_problem() is None
        assert len(ids(postgresql.url)) >= 50


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can halt another user's process")
def test_a_database_that_hangs_is_reported_and_blocks_no_caller(postgresql, postgresql_url, monkeypatch):
    monkeypatch.setattr(writing, "COMMIT_WITHIN_S", 1.0)
    monkeypatch.setattr(writing, "STALLED_S", 0.5)
    with opened(postgresql_url) as store:
        assert record(store, exchange(1)) == [None]
        engine = make_engine(check_url(postgresql_url))
        with engine.connect() as connection:
            ours = "SELECT pid FROM pg_stat_activity WHERE application_name = 'perennial'"
            others = f"{ours} AND pid <> pg_backend_pid()"
            halted = list(connection.execute(text(others)).scalars())
        engine.dispose()
        for pid in halted:
            os.kill(pid, signal.SIGSTOP)
        try:
            (outcome,) = record(store, exchange(2))
            assert isinstance(outcome, StoreUnavailable)
            assert "within 1 s" in str(outcome)
            assert "not responded" in store.find_problem()
        finally:
            for pid in halted:
                os.kill(pid, signal.SIGCONT)
        until_healthy(store)
        assert record(store, exchange(3)) == [None]
    assert {"r1", "r3"} <= set(ids(postgresql_url))


FILL = """
import asyncio, resource, signal, sys, time
from services.events import StoreUnavailable, open_store, read_exchanges
from tests.services.events.recorded import exchange

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
url, kind, store = sys.argv[1], sys.argv[2], None

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    store = open_store(url, queue_size=100, group_rows=8, group_wait_s=0.001, retry_s=0.2)
    stored = []
    if kind == "limit":
        limit(1_500_000)
    else:
        filler = open(sys.argv[3], "wb", buffering=0)
    for number in range(2000):
        try:
            await store.record(exchange(number, answer="x" * 5000))
            stored.append(f"r{number}")
        except StoreUnavailable as error:
            reason = str(error)
            break
        if kind == "tmpfs" and number == 50:  # another process takes what is left
            try:
                while filler.write(b"x" * 65536):
                    pass
            except OSError:
                pass
    else:
        raise SystemExit("never full")
    assert store.find_problem(), "healthy though full"
    assert len(stored) >= 50
    if kind == "limit":
        limit(resource.RLIM_INFINITY)
    else:
        filler.truncate(0)
    until = time.monotonic() + 300
    while store.find_problem():
        assert time.monotonic() < until, store.find_problem()
        await asyncio.sleep(0.05)
    for number in range(3000, 3050):
        await store.record(exchange(number, answer="x" * 5000))
        stored.append(f"r{number}")
    found = {name for batch in read_exchanges(url, 0, 1e12) for name in batch["request_id"].to_pylist()}
    assert set(stored) <= found, set(stored) - found
    store.close()
    print(reason)

asyncio.run(main())
"""


def test_a_full_disk_is_reported_and_over_when_there_is_space(sqlite_url):
    done = subprocess.run(
        [sys.executable, "-c", FILL, sqlite_url, "limit"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "disk" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_small_disk_that_is_full_is_reported_and_over_when_there_is_space(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    try:
        done = subprocess.run(
            [sys.executable, "-c", FILL, f"sqlite:///{disk}/events.db", "tmpfs", disk / "filler"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.returncode == 0, done.stderr
    assert "database or disk is full" in done.stdout


def command(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "services.events", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def told(caplog):
    """A function that runs the command in this process and returns what it logs."""

    def run(*words):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            main([*map(str, words)])
        return caplog.text

    return run


def test_the_command_migrates_exports_and_prunes(sqlite_url, tmp_path, told):
    assert "has been upgraded" in told("migrate", "--url", sqlite_url)
    with opened(sqlite_url) as store:
        assert not any(record(store, EXCHANGE, exchange(5000)))
    out = tmp_path / "out.parquet"
    window = ("--from", "1970-01-01T00:00", "--to", "1970-01-01T01:00+00:00")
    assert "wrote 1 exchanges" in told("export", *window, "--out", out, "--url", sqlite_url)
    assert pq.read_table(out)["request_id"].to_pylist() == ["r0"]
    old = ("prune", "--older-than-days", "90", "--url", sqlite_url)
    assert "deleted 2 exchanges, 0 feedback" in told(*old, "--clock-is-right")
    with opened(sqlite_url) as store:
        assert not any(record(store, *(exchange(n) for n in range(101))))
    with make_engine(check_url(sqlite_url)).begin() as connection:
        connection.execute(text("UPDATE prunings SET pruned_at = 0"))
    with pytest.raises(InputError, match="the clock of this machine; if it is right"):
        told(*old)
    assert "deleted 101 exchanges, 0 feedback" in told(*old, "--clock-is-right")


def test_the_command_exports_and_forgets_a_person_and_says_what_it_does_not_reach(sqlite_url, tmp_path, told):
    with opened(sqlite_url) as store:
        assert not any(record(store, exchange(1, user="ann"), exchange(2, user="bob")))
    out = tmp_path / "ann.parquet"
    told("export", "--user", "ann", "--out", out, "--url", sqlite_url)
    assert pq.read_table(out)["request_id"].to_pylist() == ["r1"]
    printed = told("forget", "--user", "ann", "--url", sqlite_url)
    assert "deleted 1 exchanges, 0 feedback" in printed
    assert all(place in printed and fix in printed for place, fix in NOT_REACHED)
    assert ids(sqlite_url) == ["r2"]


def test_the_command_finds_the_store_in_params_yaml(tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    done = command("migrate", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".perennial" / "events.db").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "export | prune | forget | migrate"),
        (("import",), "import"),
        (("export", "--out", "x"), "--user"),
        (("export", "--user", "ann", "--from", "2026-01-01", "--out", "x"), "without --from"),
        (("forget",), "--user"),
        (("forget", "--user", "ann", "--session", "s"), "not allowed with"),
        (("export", "--from", "monday", "--to", "2026-01-01", "--out", "x"), "'monday'"),
        (("export", "--from", "2026-01-02", "--to", "2026-01-01", "--out", "x"), "--from is not before --to"),
        (("prune",), "--older-than-days"),
        (("prune", "--older-than-days", "-1"), "'-1'"),
        (("prune", "--older-than-days", "nan"), "'nan'"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_command_says_what_is_wrong_with_a_store(sqlite_url):
    done = command("prune", "--older-than-days", "90", "--url", sqlite_url)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no event store at")


def test_times_are_those_of_one_version_in_one_role(url, monkeypatch):
    monkeypatch.setattr(reading, "PAGE_TIMES", 2)  # several pages, and a time that two of them share
    with opened(url) as store:
        answered = [exchange(number) for number in range(5)]
        same_time = replace(exchange(9), received_at=1001.0)
        others = exchange(6, version="another"), exchange(7, role="shadow")
        assert record(store, *answered, same_time, *others) == [None] * 8
        times = list(read_times(url, 1000.0, 1004.0, EXCHANGE.version, "champion"))
        assert times == [1000.0, 1001.0, 1001.0, 1002.0, 1003.0]
        assert count_exchanges(url, 1000.0, 1004.0, EXCHANGE.version, "champion") == 5
        assert count_exchanges(url, 1000.0, 1004.0, "nobody's", "champion") == 0
