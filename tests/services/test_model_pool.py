"""Versions side by side, and changed while requests run."""

import json
import threading
import time

import pytest

from services.events import read_exchanges
from services.model_pool import is_in_treatment
from services.versions.aliases import Aliases, Challenger, write_aliases
from tests.services.serving import ask, load_tiny, serving, tiny_files
from tests.stages.common.chat_templates import MISTRAL_1


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    return tiny_files(folder / "a", "a" * 12, seed=0), tiny_files(folder / "b", "b" * 12, seed=1)


def wait_until(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def version_of(response):
    return response.json()["system_fingerprint"]


def test_a_user_stays_in_or_out_of_a_trial_and_the_share_is_kept():
    users = [f"user-{n}" for n in range(20_000)]
    chosen = {user for user in users if is_in_treatment(user, "m:2", 0.1)}
    assert abs(len(chosen) / len(users) - 0.1) < 0.01
    assert chosen == {user for user in users if is_in_treatment(user, "m:2", 0.1)}
    other = {user for user in users if is_in_treatment(user, "m:3", 0.1)}
    assert len(chosen & other) < len(chosen) / 2, "each trial draws its own users"
    assert not any(is_in_treatment(user, "m:2", 0.0) for user in users)
    assert all(is_in_treatment(user, "m:2", 1.0) for user in users)


def test_versions_change_under_load_and_back_with_no_failed_request(tmp_path, versions):
    first, second = versions
    answers, over = [], threading.Event()

    def load():
        with server.client() as client:
            while not over.is_set():
                answers.append(ask(client, max_tokens=8))

    with serving(tmp_path, first, second) as server:
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answers) > 8)
        write_aliases(server.aliases, Aliases(second.tag, history=(first.tag,)))
        wait_until(lambda: version_of(answers[-1]) == second.version)
        write_aliases(server.aliases, Aliases(first.tag))
        wait_until(lambda: version_of(answers[-1]) == first.version)
        over.set()
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in answers} == {200}
    assert {version_of(answer) for answer in answers} == {first.version, second.version}


def test_a_canary_answers_its_share_of_users_always_the_same(tmp_path, versions):
    first, second = versions
    with serving(tmp_path, first, second) as server, server.client() as client:
        write_aliases(server.aliases, Aliases(first.tag, Challenger(second.tag, 0.5, "canary")))
        wait_until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
        seen = {}
        for _ in range(3):
            for user in (f"user-{n}" for n in range(12)):
                seen.setdefault(user, set()).add(version_of(ask(client, max_tokens=1, user=user)))
        assert all(len(found) == 1 for found in seen.values())
        assert {found.pop() for found in seen.values()} == {first.version, second.version}
        # Either can be asked for by its tag, in or out of the trial.
        for files in versions:
            assert version_of(ask(client, max_tokens=1, model=files.tag)) == files.version


def test_a_shadow_is_asked_the_same_kept_and_not_shown(tmp_path, versions):
    first, second = versions
    with serving(tmp_path, first, second) as server, server.client() as client:
        write_aliases(server.aliases, Aliases(first.tag, Challenger(second.tag, 1.0, "shadow")))
        wait_until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
        shown = ask(client, "what do you say", max_tokens=4)
        assert version_of(shown) == first.version
        server.run(server.handler.settle())
        url = server.handler.settings.events.url
        kept = {
            row["role"]: row for batch in read_exchanges(url, 0, time.time() + 9) for row in batch.to_pylist()
        }
    assert kept["shadow"]["shadow_of"] == kept["champion"]["request_id"] == shown.headers["x-request-id"]
    assert kept["shadow"]["version"] == second.version
    assert json.loads(kept["shadow"]["messages"]) == json.loads(kept["champion"]["messages"])


def test_a_change_that_cannot_be_followed_leaves_the_champion(tmp_path, versions, caplog):
    first, _ = versions
    with serving(tmp_path, first) as server, server.client() as client:
        server.aliases.write_text("{")
        while "is ignored" not in caplog.text:
            time.sleep(0.01)
        assert version_of(ask(client, max_tokens=1)) == first.version
        assert server.handler.find_problem() is None


def test_an_engine_that_broke_is_told_in_readiness_and_started_anew(tmp_path, versions):
    first, _ = versions
    with serving(tmp_path, first) as server, server.client() as client:
        engine = server.handler.pool.champion.engine

        def broken(running):
            raise RuntimeError("out of luck")

        engine._advance = broken
        assert ask(client, max_tokens=2).status_code == 503
        assert engine.broken is not None
        wait_until(lambda: server.handler.find_problem() is None)
        assert ask(client, max_tokens=2).status_code == 200
        assert server.handler.pool.champion.engine is not engine


def test_a_challenger_that_broke_is_started_anew_and_the_champion_goes_on(tmp_path, versions):
    first, second = versions
    with serving(tmp_path, first, second) as server, server.client() as client:
        write_aliases(server.aliases, Aliases(first.tag, Challenger(second.tag, 0.0, "canary")))
        wait_until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
        engine = server.handler.pool.get_models()["challenger"].engine

        def broken(running):
            raise RuntimeError("out of luck")

        engine._advance = broken
        assert ask(client, max_tokens=2, model=second.tag).status_code == 503
        assert server.handler.find_problem() is None and ask(client, max_tokens=2).status_code == 200
        wait_until(lambda: server.handler.pool.get_models()["challenger"].engine is not engine)
        assert version_of(ask(client, max_tokens=2, model=second.tag)) == second.version


def test_old_versions_are_let_go_when_no_request_uses_them(tmp_path, versions):
    first, second = versions
    closed = []

    def load(files):
        served = load_tiny(files)
        close = served.engine.close
        served.engine.close = lambda: (closed.append(files.version), close())
        return served

    with serving(tmp_path, first, second, load=load, versions={"keep_loaded": 1}) as server:
        write_aliases(server.aliases, Aliases(second.tag, history=(first.tag,)))
        wait_until(lambda: closed == [first.version])
        with server.client() as client:
            assert version_of(ask(client, max_tokens=1)) == second.version


def test_a_conversation_that_the_template_refuses_is_the_error_of_its_request(tmp_path):
    """Gemma's and Mistral's templates raise on roles; the next request is answered."""
    files = tiny_files(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(MISTRAL_1)
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Hello"}
    with serving(tmp_path, files) as server, server.client() as client:
        for messages in ([system, user], [user, user]):
            refused = client.post("/v1/chat/completions", json={"messages": messages})
            assert refused.status_code == 422, refused.text
            error = refused.json()["error"]
            assert error["param"] == "messages" and "must alternate" in error["message"]
        assert ask(client).status_code == 200
