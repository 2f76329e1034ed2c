import json
import math
import uuid
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.traffic.windows import (
    QuarantinedEvent,
    Window,
    count_late_rows,
    find_closed_windows,
    find_reference_window,
    quarantine_to,
    read_window,
)
from stages.common.errors import InputError
from stages.common.params.loop import Reference, WindowSettings
from tests.exchanges import VERSION
from tests.monitoring.store import add, exchange, feedback, stored

ALL = Window(0.0, 1e12, 0, "all")
TAG = f"toy:{VERSION}"
NOW = 4e9


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/events.db"


def by_count(rows, settle_s=0.0):
    # as params.yaml gives it, but for the least number of rows, which would make the toys long
    return WindowSettings.model_construct(kind="count", rows=rows, hours=1.0, min_rows=1, settle_s=settle_s)


def by_time(hours, settle_s=0.0):
    return WindowSettings.model_construct(kind="time", rows=1, hours=hours, min_rows=1, settle_s=settle_s)


def reference(rows):
    return Reference.model_construct(rows=rows)


def cut(url, settings, after=0.0, now=NOW, limit=100):
    return find_closed_windows(url, after, TAG, settings, now, limit)


def rows_of(url, window):
    return [row for page in read_window(url, window, TAG) for row in page.batch.to_pylist()]


def ids(url, window):
    return [row["request_id"] for row in rows_of(url, window)]


def test_a_window_by_count_closes_when_it_is_full(url):
    stored(url, *(exchange(number) for number in range(7)))
    windows = cut(url, by_count(3))
    assert [window.rows for window in windows] == [3, 3]
    assert [ids(url, window) for window in windows] == [
        ["r00000", "r00001", "r00002"],
        ["r00003", "r00004", "r00005"],
    ]


def test_a_window_is_named_by_its_first_exchange_and_its_rows(url):
    stored(url, *(exchange(number, at=1_795_256_100.25 + number) for number in range(4)))
    assert [window.name for window in cut(url, by_count(2))] == [
        "20261121T101500.250-2",
        "20261121T101502.250-2",
    ]


def test_a_cut_never_parts_exchanges_of_the_same_time(url):
    times = (1.0, 2.0, 2.0, 2.0, 3.0, 4.0)
    stored(url, *(exchange(number, at=at) for number, at in enumerate(times)))
    windows = cut(url, by_count(2))
    assert [window.rows for window in windows] == [4, 2]
    assert ids(url, windows[0]) == ["r00000", "r00001", "r00002", "r00003"]


def test_a_window_stays_open_while_answers_may_still_be_written(url):
    stored(url, *(exchange(number) for number in range(4)))
    assert len(cut(url, by_count(2, settle_s=30), now=1002.0 + 30)) == 1
    assert len(cut(url, by_count(2, settle_s=30), now=1003.0 + 30)) == 2


def test_windows_go_on_where_the_last_ended(url):
    stored(url, *(exchange(number) for number in range(10)))
    whole = cut(url, by_count(3))
    first = cut(url, by_count(3), limit=1)
    rest = cut(url, by_count(3), after=first[-1].end)
    assert first + rest == whole


@pytest.fixture(scope="module")
def shared_url(tmp_path_factory):
    return stored(f"sqlite:///{tmp_path_factory.mktemp('store')}/events.db")


@settings(max_examples=15, deadline=None)
@given(
    times=st.lists(st.integers(0, 12), min_size=1, max_size=25).map(sorted),
    length=st.integers(1, 5),
    by=st.sampled_from(["count", "time"]),
)
def test_every_exchange_of_closed_windows_is_in_exactly_one(shared_url, times, length, by):
    version = uuid.uuid4().hex  # each example has its own, in one store
    events = [
        exchange(number, at=1e9 + 0.1 * at, version=version, request_id=f"{version}-{number:02d}")
        for number, at in enumerate(times)
    ]
    add(shared_url, *events)
    cutting = by_count(length) if by == "count" else by_time(0.1 * length / 3600)
    windows = find_closed_windows(shared_url, 0.0, version, cutting, 2e9, 100)
    inside = [[window.start <= event.received_at < window.end for window in windows] for event in events]
    found = [sum(in_it) for in_it in inside]
    assert found == [1] * sum(found) + [0] * (len(events) - sum(found))
    assert [sum(in_it) for in_it in zip(*inside, strict=True)] == [window.rows for window in windows]
    assert all(one.end <= other.start for one, other in pairwise(windows))
    left = len(events) - sum(found)
    assert left < length if by == "count" else left == 0


def test_windows_by_time_begin_where_the_reference_ended_and_silence_makes_none(url):
    hour = 3600.0
    stored(url, *(exchange(n, at=at) for n, at in enumerate((100.0, 200.0, 3 * hour, 4.9 * hour))))
    windows = cut(url, by_time(1), after=50.0, now=10 * hour)
    assert [(window.start, window.end, window.rows) for window in windows] == [
        (50.0, 50.0 + hour, 2),
        (50.0 + 2 * hour, 50.0 + 3 * hour, 1),
        (50.0 + 4 * hour, 50.0 + 5 * hour, 1),
    ]


def test_a_window_by_time_closes_after_its_end(url):
    stored(url, exchange(0, at=100.0), exchange(1, at=200.0))
    assert cut(url, by_time(1, settle_s=30), after=50.0, now=3650.0 + 29) == []
    assert len(cut(url, by_time(1, settle_s=30), after=50.0, now=3650.0 + 30)) == 1


def test_the_reference_is_what_the_version_answered_first_as_champion(url):
    stored(
        url,
        *(exchange(number, version="another") for number in range(3)),
        *(exchange(number, role="challenger") for number in range(3, 6)),
        *(exchange(number) for number in range(6, 16)),
    )
    window = find_reference_window(url, TAG, reference(rows=4), NOW)
    assert (window.rows, window.start) == (4, 1006.0)
    assert ids(url, window) == ["r00006", "r00007", "r00008", "r00009"]
    assert cut(url, by_count(4), after=window.end)[0].start == window.end


def test_there_is_no_reference_while_there_are_too_few_rows(url):
    stored(url, *(exchange(number) for number in range(5)))
    assert find_reference_window(url, TAG, reference(rows=6), NOW) is None
    assert find_reference_window(url, TAG, reference(rows=5), NOW).rows == 5


def test_only_what_the_champion_answered_is_watched_with_its_errors_and_refusals(url):
    stored(
        url,
        exchange(0),
        exchange(1, role="shadow", shadow_of="r00000"),
        exchange(2, role="challenger"),
        exchange(3, version="another"),
        exchange(4, status=400, answer=None, finish_reason=None, first_token_s=None, mean_logprob=None),
        exchange(5, status=500, answer=None, finish_reason=None),
    )
    assert ids(url, ALL) == ["r00000", "r00004", "r00005"]
    assert cut(url, by_count(3))[0].rows == 3
    (page,) = read_window(url, ALL, TAG, role="challenger")
    assert page.batch["request_id"].to_pylist() == ["r00002"]


def test_exchanges_come_with_the_feedback_on_them(url):
    stored(url, exchange(0), exchange(1), feedback(0, thumb=1), feedback(0, at=2001.0, thumb=-1))
    assert [[given["thumb"] for given in row["feedback"]] for row in rows_of(url, ALL)] == [[1, -1], []]


def test_a_window_longer_than_a_page_is_read_whole_and_in_order(url):
    stored(url, *(exchange(number, at=1000.0 + number // 3) for number in range(2500)))
    pages = list(read_window(url, ALL, TAG))
    assert max(page.batch.num_rows for page in pages) <= 1000
    assert [name for page in pages for name in page.batch["request_id"].to_pylist()] == [
        f"r{number:05d}" for number in range(2500)
    ]


BROKEN = [
    ({"messages": "turn on"}, "messages are no list of roles and contents"),
    ({"messages": '{"role": "user"}'}, "messages are no list of roles and contents"),
    ({"messages": '[{"role": "user", "content": 7}]'}, "messages are no list of roles and contents"),
    ({"messages": '[{"role": "user", "content": [1]}]'}, "messages are no list of roles and contents"),
    ({"messages": '["turn on"]'}, "messages are no list of roles and contents"),
    ({"messages": "[" * 100_000}, "messages are no list of roles and contents"),
    ({"messages": "[]"}, "no user message"),
    ({"messages": '[{"role": "system", "content": "x"}]'}, "no user message"),
    ({"parameters": "none"}, "parameters are no JSON object"),
    ({"decisions": "[]"}, "decisions are no JSON object of [allow, reason]"),
    ({"decisions": '{"toxicity": true}'}, "decisions are no JSON object of [allow, reason]"),
    ({"total_s": -0.5}, "a negative or impossible time"),
    ({"queue_s": math.inf}, "a negative or impossible time"),
    ({"completion_tokens": -1}, "a negative number of tokens"),
    ({"status": 0}, "a status that is none of HTTP"),
    ({"mean_logprob": 2.0}, "an impossible log-probability"),
]


def test_corrupt_events_are_set_aside_with_their_reason_and_the_others_read(url):
    stored(
        url, exchange(0), *(exchange(n + 1, **changes) for n, (changes, _) in enumerate(BROKEN)), exchange(90)
    )
    pages = list(read_window(url, ALL, TAG))
    change = {event.request_id: event.reason for page in pages for event in page.quarantined}
    assert change == {f"r{number + 1:05d}": reason for number, (_, reason) in enumerate(BROKEN)}
    assert [name for page in pages for name in page.batch["request_id"].to_pylist()] == ["r00000", "r00090"]


def test_an_event_stored_twice_under_two_ids_counts_once(url):
    same = {"at": 5.0, "session": "s"}
    stored(
        url, exchange(0, **same), exchange(1, **same), exchange(2, at=5.0), exchange(3, at=6.0, session="s")
    )
    (page,) = read_window(url, ALL, TAG)
    assert page.batch["request_id"].to_pylist() == ["r00000", "r00002", "r00003"]
    assert [(event.request_id, event.reason) for event in page.quarantined] == [("r00001", "stored twice")]


def test_what_was_set_aside_is_counted_and_written(url, tmp_path):
    stored(url, exchange(0), exchange(1, messages="x"), exchange(2, messages="y"), exchange(3, total_s=-1))
    counts = Counter()
    path = tmp_path / "watch" / "w" / "quarantined.jsonl"
    batches = list(quarantine_to(path, read_window(url, ALL, TAG), counts))
    assert [batch["request_id"].to_pylist() for batch in batches] == [["r00000"]]
    assert counts == {"messages are no list of roles and contents": 2, "a negative or impossible time": 1}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["r00001", "r00002", "r00003"]


def test_what_the_reader_sets_aside_is_counted_and_written_too(url, tmp_path):
    stored(url, exchange(0), exchange(1), exchange(2, messages="y"))
    counts, later = Counter(), []
    path = tmp_path / "quarantined.jsonl"
    for _ in quarantine_to(path, read_window(url, ALL, TAG), counts, later):
        later.append(QuarantinedEvent("r00001", 1001.0, "unreadable"))
    assert counts == {"messages are no list of roles and contents": 1, "unreadable": 1}
    assert [json.loads(line)["request_id"] for line in path.read_text().splitlines()] == ["r00002", "r00001"]


def test_the_reference_has_nothing_from_the_future_of_a_clock_that_was_wrong(url):
    stored(url, *(exchange(number) for number in range(3)), *(exchange(10 + n, at=5e9 + n) for n in range(3)))
    assert find_reference_window(url, TAG, reference(rows=4), NOW) is None
    add(url, exchange(20))
    assert find_reference_window(url, TAG, reference(rows=4), NOW).end < NOW


def test_a_time_beyond_any_calendar_has_a_window_too(url):
    stored(url, *(exchange(number, at=1e15 + number) for number in range(60)))
    window = find_reference_window(url, TAG, Reference(rows=50), 2e15)
    assert window is not None and window.name.startswith("99991231T235959")


def test_nothing_set_aside_leaves_no_file(url, tmp_path):
    stored(url, exchange(0))
    path = tmp_path / "quarantined.jsonl"
    path.write_text("of a run before")
    assert len(list(quarantine_to(path, read_window(url, ALL, TAG), Counter()))) == 1
    assert list(tmp_path.glob("*quarantined*")) == []


def test_events_that_come_after_the_window_was_cut_are_late(url):
    stored(url, *(exchange(number) for number in range(3)))
    (window,) = cut(url, by_count(3))
    assert count_late_rows(url, window, TAG) == 0
    add(url, exchange(7, at=1001.5), exchange(8, at=1001.6, role="shadow"), exchange(9, at=1500.0))
    assert count_late_rows(url, window, TAG) == 1
    assert count_late_rows(url, window, TAG, counted=4) == 0


def test_a_store_that_is_not_there_is_an_error_of_the_user(url):
    with pytest.raises(InputError, match="no event store"):
        find_reference_window(url, TAG, reference(rows=4), NOW)
    with pytest.raises(InputError, match="no event store"):
        cut(url, by_count(3))
