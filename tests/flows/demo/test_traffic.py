"""The demo's traffic: on the real templates, and against real HTTP."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest

from flows.demo.replay import Habits, is_right, make_visits, replay
from flows.demo.traffic import (
    KINDS,
    Request,
    TrafficModel,
    load_wing_lexicon,
    read_traffic_model,
    select_templates,
    write_traffic,
)
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.params.loading import load_params
from stages.common.records import make_row, write_rows
from stages.common.sources.home_intents.grammar import load_grammar, select_reserved_groups
from stages.common.sources.home_intents.lexicon import read_lexicon

VERSION = load_params().collect.sources[0].version
WORLD = TrafficModel(VERSION, 7, 0.15)


@cache
def some(kind, seed=1):
    """Twenty requests of one kind, from five templates."""
    return write_traffic(WORLD, {kind: 1.0}, 20, seed, templates=5)


@cache
def reserved():
    return select_reserved_groups(load_grammar("en"), 0.15, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_a_kind_recur_in_a_few_phrasings_with_one_label_each(kind):
    requests = some(kind)
    assert len(requests) == 20
    assert {request.kind for request in requests} == {kind}
    groups = Counter(request.group for request in requests)
    assert len(groups) <= 5
    assert max(groups.values()) >= 5
    labels = {(request.text, request.label) for request in requests}
    assert len(labels) == len({text for text, _ in labels})
    for request in requests:
        assert json.loads(request.label)["intent"] == request.intent


def test_new_phrasings_are_of_reserved_templates_and_known_ones_are_not():
    assert {request.group for request in some("phrasing")} <= reserved()
    assert not {request.group for request in some("known")} & reserved()


def test_known_requests_are_of_the_templates_that_were_trained_on():
    taught = frozenset(sorted({t.group for t in select_templates(WORLD, "known")})[::9])
    world = TrafficModel(VERSION, 7, 0.15, taught)
    assert {t.group for t in select_templates(world, "known")} == taught
    assert {t.group for t in select_templates(world, "wing")} < taught


def test_every_request_of_the_new_wing_names_something_that_training_never_saw():
    wing, old = load_wing_lexicon(), read_lexicon("en")
    names = {*wing.areas, *(device.name for device in wing.devices)}
    assert not names & {*old.areas, *old.floors, *(device.name for device in old.devices)}
    for request in some("wing"):
        label = json.loads(request.label)
        assert {label.get("area"), label.get("name")} & names, request


def test_no_name_of_the_wing_holds_a_room_of_the_old_house():
    places = {*read_lexicon("en").areas, *read_lexicon("en").floors}
    wing = load_wing_lexicon()
    for name in (*wing.areas, *(device.name for device in wing.devices)):
        assert not any(f" {place} " in f" {name} " for place in places), name


def test_another_seed_gives_other_sentences_of_the_same_phrasings():
    first, again, other = (
        some("known"),
        write_traffic(WORLD, {"known": 3}, 20, 1, templates=5),
        some("known", 2),
    )
    assert first == again
    groups = Counter(request.group for request in (*first, *other))
    assert len(groups) <= 5
    assert len({r.text for r in first} & {r.text for r in other}) < 10


def test_the_kinds_come_in_the_proportions_of_the_mix_and_mixed():
    requests = write_traffic(WORLD, {"known": 3.0, "phrasing": 1.0}, 60, 5, templates=3)
    counts = Counter(request.kind for request in requests)
    assert counts.total() == 60
    assert 6 <= counts["phrasing"] <= 26
    assert sum(a.kind != b.kind for a, b in pairwise(requests)) > 10


def test_requests_that_cannot_be_sent_are_an_error_with_its_fix():
    with pytest.raises(InputError, match="phrasing") as error:
        write_traffic(TrafficModel(VERSION, 7, 0.0), {"phrasing": 1.0}, 5, 1)
    assert "reserved_share" in error.value.fix
    with pytest.raises(InputError, match="no share above 0"):
        write_traffic(WORLD, {}, 5, 1)
    with pytest.raises(InputError, match=r"version 2020\.1\.1"):
        write_traffic(TrafficModel("2020.1.1", 7, 0.0), {"known": 1.0}, 5, 1)


def test_a_home_is_read_with_what_it_trained_on(tmp_path):
    text = Path("params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    assert read_traffic_model(tmp_path) == TrafficModel(VERSION, 7, 0.0, None)
    rows = [make_row([Message("user", "a"), Message("assistant", "b")], "toy", "cc0-1.0", group="HassX/y/z")]
    write_rows(tmp_path / "artifacts" / "split" / "train.parquet", rows)
    assert read_traffic_model(tmp_path).trained_groups == {"HassX/y/z"}
    (tmp_path / "params.yaml").write_text(text.replace("language: en ", "language: de ", 1))
    with pytest.raises(InputError, match="no home_intents source in English"):
        read_traffic_model(tmp_path)


def toy(count, kind="known"):
    return [
        Request(f"{kind} {n}", json.dumps({"n": n}), kind, f"Intent{n % 5}/default/{n % 7}")
        for n in range(count)
    ]


def test_every_request_is_in_one_visit_and_its_visit_is_of_one_kind():
    requests = [*toy(150), *toy(50, "german")]
    dealt = make_visits(requests, users=20, seed=3)
    assert Counter(r for visit in dealt for r in visit.requests) == Counter(requests)
    assert all(len({r.kind for r in visit.requests}) == 1 for visit in dealt)
    assert all(visit.user.startswith("de-") == (visit.requests[0].kind == "german") for visit in dealt)
    assert len({visit.session for visit in dealt}) == len(dealt)
    sizes = Counter(len(visit.requests) for visit in dealt[:-10])
    assert min(sizes) >= 1
    assert max(sizes) <= 8
    assert 4 <= 200 / len(dealt) <= 7
    assert dealt == make_visits(requests, users=20, seed=3)


def test_requests_of_a_visit_are_alike_and_people_keep_their_habits():
    requests = [request for n in range(60) for request in toy(5)]
    dealt = make_visits(requests, users=30, seed=3)
    alike = sum(a.intent == b.intent for visit in dealt for a, b in pairwise(visit.requests))
    pairs = sum(len(visit.requests) - 1 for visit in dealt)
    assert alike / pairs > 0.6  # 0.2 if they were dealt by chance
    firsts = {}
    for visit in dealt:
        firsts.setdefault(visit.user, set()).add(visit.requests[0].intent)
    assert mean(len(intents) for intents in firsts.values()) < 2.5  # of five


def test_a_change_of_the_traffic_keeps_its_place_in_time():
    dealt = make_visits([*toy(100), *toy(100, "german")], users=20, seed=3)
    kinds = [visit.requests[0].kind for visit in dealt]
    assert kinds == sorted(kinds, key=["known", "german"].index)


@contextmanager
def answering(answer):
    """Serve `answer(path, body) -> (status, value)` on a free port; yield the address and what came in."""
    seen, at_once = [], [0, 0]
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                at_once[0] += 1
                at_once[1] = max(at_once)
                seen.append((self.path, body, self.headers.get("Authorization")))
            status, value = answer(self.path, body)
            with lock:
                at_once[0] -= 1
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen, at_once
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat(text, name="home", version="a" * 12):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {"id": f"id of {text}", "model": name, "system_fingerprint": version, "choices": [choice]}


def mostly_right(path, body):
    """Right about `known 5`, wrong about German, broken for the number 3, and two versions of it."""
    if path == "/v1/feedback":
        return 200, {"feedback_id": "fb"}
    kind, n = body["messages"][-1]["content"].split()
    if n == "3":
        return 503, {"error": {"code": "store_unavailable"}}
    text = f'{{ "n" : {n} }}' if kind == "known" else "ja"
    return chat(text, version=("a" if int(n) % 2 else "b") * 12)


def test_a_replay_counts_right_wrong_failed_and_who_answered():
    requests = [*toy(20), *toy(10, "german")]
    progress = []
    with answering(mostly_right) as (url, seen, _):
        result = replay(
            url,
            requests,
            habits=Habits(corrected=1.0, thumbs_up=1.0),
            key="k",
            on_progress=lambda done, total: progress.append((done, total)),
        )
    assert (result.asked, result.failed) == (30, 2)
    assert result.failures == {"/v1/chat/completions 503": 2}
    assert result.accuracy() == 19 / 28
    assert result.accuracy(["known"]) == 1.0
    assert result.accuracy(["german"]) == 0.0
    assert result.accuracy(["wing"]) is None
    assert result.accuracy(version="home:" + "b" * 12) == 10 / 15
    assert result.versions == {"home:aaaaaaaaaaaa": 13, "home:bbbbbbbbbbbb": 15}
    assert (result.corrections, result.thumbs_up) == (9, 19)
    assert [done for done, _ in progress] == list(range(1, 31))
    assert {authorization for _, _, authorization in seen} == {"Bearer k"}


def test_feedback_names_the_answer_and_corrects_it_with_the_label():
    with answering(mostly_right) as (url, seen, _):
        replay(url, toy(2, "german"), habits=Habits(corrected=1.0))
        replay(url, toy(1), habits=Habits(thumbs_up=1.0))
    given = [body for path, body, _ in seen if path == "/v1/feedback"]
    assert {"request_id": "id of ja", "thumb": "down", "correction": '{"n": 0}'} in given
    assert given[-1] == {"request_id": 'id of { "n" : 0 }', "thumb": "up"}


def test_people_who_give_no_feedback_give_none():
    with answering(mostly_right) as (url, seen, _):
        result = replay(url, [*toy(8), *toy(8, "wing")], habits=Habits(corrected=0.0, thumbs_up=0.0))
    assert {path for path, _, _ in seen} == {"/v1/chat/completions"}
    assert (result.corrections, result.thumbs_up) == (0, 0)


def test_each_person_waits_for_the_answer_and_so_many_ask_at_once():
    def slow(path, body):
        time.sleep(0.01)
        return mostly_right(path, body)

    with answering(slow) as (url, seen, at_once):
        replay(url, toy(30), concurrency=3, habits=Habits(thumbs_up=0.0))
    assert at_once[1] == 3
    asked = [(body["user"], body["session"]) for _, body, _ in seen]
    assert len(set(asked)) == len({session for _, session in asked})
    in_order = [body["messages"][0]["content"] for _, body, _ in seen]
    for visit in make_visits(toy(30), Habits().users, 7):
        places = [in_order.index(request.text) for request in visit.requests]
        assert places == sorted(places)


def test_a_replay_that_is_told_to_stop_lets_the_visits_end():
    with answering(mostly_right) as (url, seen, _):
        result = replay(url, toy(80), concurrency=1, should_stop=lambda: len(seen) > 10)
    assert 10 < result.asked <= 30


def test_a_service_that_is_not_there_fails_every_request_and_ends():
    with answering(mostly_right) as (url, _, _):
        pass
    result = replay(url, toy(6))
    assert (result.asked, result.failed, result.accuracy()) == (6, 6, None)
    assert result.failures == {"/v1/chat/completions ConnectError": 6}


def test_an_answer_is_right_if_it_is_the_same_json():
    assert is_right('{"b": 1.0, "a": "x"}', '{"a":"x","b":1}')
    assert not is_right('{"a":"y","b":1}', '{"a":"x","b":1}')
    assert not is_right("no json", '{"a":"x"}')
    assert is_right("plain", "plain")


@pytest.mark.slow
def test_a_replay_reaches_a_real_service_with_its_feedback_in_the_store(tmp_path):
    from services.events import read_exchanges, read_feedback
    from tests.services.serving import ask, serving, tiny_files

    with serving(tmp_path, tiny_files(tmp_path / "model")) as server:
        url = server.handler.settings.events.url
        with server.client() as client:
            answer = ask(client, "known 0", max_tokens=8).json()["choices"][0]["message"]["content"]
        requests = [Request("known 0", answer, "known", "A/b/c"), *toy(9, "wing")]
        result = replay(
            server.url, requests, habits=Habits(corrected=1.0, thumbs_up=1.0), max_tokens=8, concurrency=2
        )

        def stored(read):
            return [row for batch in read(url, 0.0, time.time() + 60) for row in batch.to_pylist()]

        exchanges, feedback = stored(read_exchanges), stored(read_feedback)
    assert (result.asked, result.failed, result.failures) == (10, 0, {})
    assert result.accuracy(["known"]) == 1.0
    assert result.accuracy(["wing"]) == 0.0
    assert len(exchanges) == 11
    assert len({row["session"] for row in exchanges if row["session"]}) == len(
        make_visits(requests, Habits().users, 7)
    )
    assert Counter(row["thumb"] for row in feedback) == {-1: 9, 1: 1}
    assert {row["correction"] for row in feedback if row["thumb"] == -1} == {
        request.label for request in requests[1:]
    }
