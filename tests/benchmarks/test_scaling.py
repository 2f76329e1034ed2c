"""The simulated scaling: its exchange is that of a ring whose messages are counted one by one."""

import pytest

from benchmarks.scaling import LINKS, Link, format_table, simulate, time_all_reduce, time_exchange, time_ring

LINK = Link(bandwidth=1000.0, latency=0.01)


def send_round_a_ring(size, processes, link):
    """The seconds of an all-reduce, step by step, and whether every process has every sum in the end."""
    parts = [[{owner} for _ in range(processes)] for owner in range(processes)]
    seconds = 0.0
    for step in range(2 * (processes - 1)):
        sent = [(rank, (rank - step) % processes) for rank in range(processes)]
        messages = [(rank, part, set(parts[rank][part])) for rank, part in sent]
        for rank, part, summed in messages:
            parts[(rank + 1) % processes][part] |= summed
        seconds += link.latency + size / processes / link.bandwidth
    return seconds, all(part == set(range(processes)) for own in parts for part in own)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_an_all_reduce_takes_as_long_as_its_messages_round_a_ring(processes):
    seconds, is_complete = send_round_a_ring(1000, processes, LINK)
    assert is_complete
    assert time_all_reduce(1000, processes, LINK) == pytest.approx(seconds)
    assert time_all_reduce(1000, processes, LINK) == 2 * time_ring(1000, processes, LINK)


def test_a_shared_model_is_gathered_twice_and_its_gradients_are_summed_once():
    whole = time_exchange(4, LINK, 400.0, weight_bytes=1000.0)
    assert whole == pytest.approx(2 * time_ring(1000, 4, LINK) + time_ring(400, 4, LINK))
    # Each group has the latency again.
    assert time_exchange(4, LINK, 400.0, 1000.0, groups=5) == pytest.approx(whole + 4 * 3 * 3 * 0.01)


def test_the_speed_up_is_between_no_overlap_and_all_of_it():
    rows = simulate({1: 1.0, 2: 0.5}, {"slow": LINK}, 500.0)
    assert [row["speedup"] for row in rows] == [1.0, pytest.approx(1 / (0.5 + 0.52), abs=0.01)]
    assert [row["speedup_if_all_overlaps"] for row in rows] == [1.0, pytest.approx(1 / 0.52, abs=0.01)]
    assert format_table(rows).splitlines()[0] == "| link | 1 | 2 |"
    assert "| slow | 1.00 to 1.00 | 0.98 to 1.92 |" in format_table(rows)


def test_a_faster_link_is_never_slower():
    times = [time_all_reduce(20e6, 8, link) for link in LINKS.values()]
    assert times == sorted(times, reverse=True)
