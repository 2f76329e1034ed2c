import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from flows.registry import tracking
from flows.registry.tracking import mask_password, open_tracking, resolve_address
from stages.common.errors import InputError
from tests.flows.pipeline_output import SQLITE
from tests.flows.toy import ROOT


def test_a_relative_sqlite_file_belongs_to_the_checkout_and_not_to_where_one_stands(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    monkeypatch.chdir(tmp_path)
    assert resolve_address(checkout, SQLITE) == f"sqlite:///{checkout}/.perennial/mlflow.db"
    assert resolve_address(checkout, "sqlite:////srv/mlflow.db") == "sqlite:////srv/mlflow.db"
    assert resolve_address(checkout, "http://host:5000") == "http://host:5000"


@pytest.mark.timeout(60)  # MLflow's own patience is minutes
def test_a_server_that_is_not_there_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(InputError, match=url) as caught:
        open_tracking(None, url)
    assert "flows.tracking.tracking_url" in caught.value.fix


def test_a_server_that_accepts_and_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(tracking, "REACH_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match="does not answer"):
            open_tracking(None, url)


def test_what_hangs_up_at_once_is_no_mlflow(monkeypatch):
    def hang_up(server):
        server.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as rude:
        answering = threading.Thread(target=hang_up, args=(rude,))
        answering.start()
        with pytest.raises(InputError, match="does not answer"):
            open_tracking(None, f"http://127.0.0.1:{rude.getsockname()[1]}")
        answering.join()


def test_a_database_that_is_not_there_is_named_without_its_password():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"postgresql://me:secret@127.0.0.1:{unused.getsockname()[1]}/mlflow"
    with pytest.raises(InputError, match="does not answer") as caught:
        open_tracking(None, url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / ".perennial").mkdir()
    (tmp_path / ".perennial/mlflow.db").write_text("no database at all, but longer than a header " * 9)
    with pytest.raises(InputError, match=r"mlflow\.db cannot be opened") as caught:
        open_tracking(tmp_path, SQLITE)
    assert "move the file away" in caught.value.fix


def test_a_folder_where_nothing_can_be_made_is_named(tmp_path):
    (tmp_path / ".perennial").write_text("a file in the way")
    with pytest.raises(InputError, match=r"mlflow\.db cannot be opened"):
        open_tracking(tmp_path, SQLITE)


def test_without_mlflow_the_error_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        open_tracking(tmp_path, SQLITE)
    assert caught.value.fix == "pip install '.[monitor]'"


def test_a_password_is_not_shown_and_nothing_else_is_cut():
    assert mask_password("postgresql+psycopg://me:s3cret@host/db") == "postgresql+psycopg://…@host/db"
    text = "url: http://127.0.0.1:5000\nmail: me@example.org\n"
    assert mask_password(text) == text


@pytest.mark.slow
def test_a_database_of_another_program_is_refused(tmp_path):
    (tmp_path / ".perennial").mkdir()
    with sqlite3.connect(tmp_path / ".perennial/mlflow.db") as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('from the future')")
    connection.close()
    with pytest.raises(InputError, match="MLflow at sqlite") as caught:
        open_tracking(tmp_path, SQLITE)
    assert "tracking_url" in caught.value.fix


@pytest.mark.slow
def test_a_kill_while_the_tables_are_made_leaves_no_half_of_them(tmp_path):
    script = (
        f"from pathlib import Path; from flows.registry.tracking import *; open_tracking(Path(), {SQLITE!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    try:
        while not any(path.stat().st_size for path in (tmp_path / ".perennial").glob("*.db")):
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / ".perennial/mlflow.db").stat().st_size == 0
    assert open_tracking(tmp_path, SQLITE).search_registered_models() == []
