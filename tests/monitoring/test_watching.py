"""A look at production, over a real event store: windows, verdicts, reports, late and corrupt events."""

import json
import random

import pytest

from monitoring.verdicts import NOT_DECIDED, get_window_folder, read_verdicts
from monitoring.watching import judge_new_windows, read_reference
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from tests.monitoring.store import VERSION, add, exchange, stored

TAG = f"toy:{VERSION}"
USUAL = (
    "turn on the {} light",
    "is the {} door locked",
    "what is the temperature in the {}",
    "close the {} blind",
)
ROOMS = ("kitchen", "hall", "attic", "bath", "office")
GERMAN = ("schalte bitte das Licht im Zimmer {} ein", "ist die Haustür neben dem Zimmer {} verschlossen")


def some(first, rows, phrases=USUAL, seed=7):
    """Exchanges in sessions of five, each about one room."""
    rng = random.Random(f"{seed}/{first}")
    made = []
    for number in range(first, first + rows):
        if number % 5 == 0 or not made:
            room = rng.choice(ROOMS)
        words = [{"role": "user", "content": rng.choice(phrases).format(room)}]
        answer = json.dumps({"intent": "On" if rng.random() < 0.5 else "Off", "area": room})
        made.append(exchange(number, session=f"s{number // 5}", messages=json.dumps(words), answer=answer))
    return made


@pytest.fixture
def settings():
    shipped = load_params("params.yaml").monitoring
    return shipped.model_copy(
        update={
            "reference": shipped.reference.model_copy(update={"rows": 600}),
            "window": shipped.window.model_copy(update={"rows": 200, "settle_s": 10.0}),
            "drift": shipped.drift.model_copy(update={"permutations": 1000}),
        }
    )


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/events.db"


def look_once(root, url, usual, settings, now=1e6, limit=50):
    return list(judge_new_windows(root, url, usual, settings, lambda _: NOT_DECIDED, now=now, limit=limit))


def test_while_the_champion_has_answered_too_little_there_is_no_usual_traffic(url, settings):
    stored(url, *some(0, 599))
    assert read_reference(url, TAG, settings) is None


def test_without_a_store_the_look_fails_loudly(url, settings):
    with pytest.raises(InputError, match=r"events\.db"):
        read_reference(url, TAG, settings)


@pytest.mark.slow
def test_each_window_is_judged_once_and_a_change_is_found_in_its_first_window(tmp_path, url, settings):
    stored(url, *some(0, 600), *some(600, 400), *some(1000, 200, GERMAN))
    usual = read_reference(url, TAG, settings)
    (first,) = look_once(tmp_path, url, usual, settings, limit=1)
    assert (first.judged, first.drifted, first.window.rows) == (True, False, 200)

    second, third = look_once(tmp_path, url, usual, settings)
    assert (second.drifted, third.drifted) == (False, True)
    assert "language" in {change.column for change in third.changes}
    assert "de" in third.summary
    assert look_once(tmp_path, url, usual, settings) == []
    assert read_verdicts(tmp_path) == [first, second, third]
    for verdict in (first, second, third):
        page = (get_window_folder(tmp_path, verdict.id) / "report.html").read_text()
        assert verdict.id in page and "<script src" not in page


@pytest.mark.slow
def test_a_window_that_is_not_closed_waits(tmp_path, url, settings):
    stored(url, *some(0, 800))
    usual = read_reference(url, TAG, settings)
    assert look_once(tmp_path, url, usual, settings, now=1000.0 + 799 + 9) == []
    assert len(look_once(tmp_path, url, usual, settings, now=1000.0 + 799 + 11)) == 1


@pytest.mark.slow
def test_corrupt_events_are_set_aside_and_late_ones_counted(tmp_path, url, settings):
    broken = [exchange(700 + n, at=1700.5 + n, request_id=f"broken{n}", messages="no JSON") for n in range(3)]
    stored(url, *some(0, 600), *some(600, 197), *broken)
    usual = read_reference(url, TAG, settings)
    (verdict,) = look_once(tmp_path, url, usual, settings)
    assert sum(verdict.quarantined.values()) == 3 and verdict.window.rows == 197
    lines = (get_window_folder(tmp_path, verdict.id) / "quarantined.jsonl").read_text().splitlines()
    assert {json.loads(line)["request_id"] for line in lines} == {"broken0", "broken1", "broken2"}

    add(url, exchange(650, at=1650.25, request_id="late"))
    assert look_once(tmp_path, url, usual, settings) == []
    (noted,) = read_verdicts(tmp_path)
    assert noted.late_rows == 1


@pytest.mark.slow
def test_a_window_with_too_few_rows_is_set_down_and_not_judged(tmp_path, url, settings):
    by_time = settings.window.model_copy(update={"kind": "time", "hours": 0.05, "min_rows": 100})
    settings = settings.model_copy(update={"window": by_time})
    stored(url, *some(0, 600), *some(600, 50), *some(1000, 200))
    usual = read_reference(url, TAG, settings)
    verdicts = look_once(tmp_path, url, usual, settings)
    few = [verdict for verdict in verdicts if not verdict.judged]
    assert few and "min_rows" in few[0].why_not and not few[0].drifted
    assert any(verdict.judged for verdict in verdicts)
