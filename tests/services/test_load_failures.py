from services.load_failures import LoadFailures


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def pauses(failures, clock, times, **options):
    """Record failures, each as soon as the next attempt is due; return the pauses between them."""
    found = []
    for _ in range(times):
        failures.record("m:1", "no memory", **options)
        start = clock.now
        while not failures.may_try("m:1") and clock.now < start + 1000:
            clock.now += 0.5
        found.append(clock.now - start)
    return found


def test_pauses_grow_to_a_minute_and_no_further():
    clock = Clock()
    assert pauses(LoadFailures(clock), clock, 9) == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_version_with_a_limit_is_given_up_until_all_is_forgotten():
    clock = Clock()
    failures = LoadFailures(clock)
    assert pauses(failures, clock, 3, max_attempts=3) == [1, 2, 1000]
    assert "until the aliases change" in failures.describe("m:1")
    failures.forget()
    assert failures.may_try("m:1") and failures.describe("m:1") is None


def test_an_engine_that_dies_soon_after_each_load_does_not_begin_again():
    clock = Clock()
    failures = LoadFailures(clock)
    for times in (1, 2, 3):
        failures.note_loaded("m:1")
        clock.now += 59
        failures.record("m:1", "the engine died")
        assert failures.count("m:1") == times
    failures.note_loaded("m:1")
    clock.now += 60
    failures.record("m:1", "the engine died")
    assert failures.count("m:1") == 1


def test_the_description_has_reason_number_and_next_attempt():
    failures = LoadFailures(Clock())
    failures.record("m:1", "no memory")
    failures.record("m:1", "no memory")
    assert failures.describe("m:1") == (
        "m:1 is not served: no memory (failure 2 in a row; the next attempt is 2 s later)"
    )
    assert failures.describe("m:2") is None and failures.may_try("m:2")
