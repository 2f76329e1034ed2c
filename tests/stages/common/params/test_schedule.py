from pathlib import Path

import pytest

from stages.common.errors import ParamsError
from stages.common.params.loading import load_params
from stages.common.params.schedule import check_cron, check_timezone


@pytest.mark.parametrize(
    "text", ["0 3 * * 1", "*/10 * * * *", "0,30 8-18/2 1 jan-mar MON-FRI", "59 23 31 12 7", "5 4 * * sun"]
)
def test_a_cron_expression_is_taken_as_it_is(text):
    assert check_cron(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "every monday",
        "",
        "* * * *",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * * 13 *",
        "* * * * 8",
        "*/0 * * * *",
        "5-1 * * * *",
        "a * * * *",
        "* * * mon *",
        "1- * * * *",
        ", * * * *",
        "* * * * * *",
    ],
)
def test_what_is_no_cron_expression_is_refused(text):
    with pytest.raises(ValueError, match="is no cron expression"):
        check_cron(text)


@pytest.mark.parametrize("text", ["Europe/Nowhere", "", "../../etc/passwd", "/etc/localtime", "UTC\0"])
def test_a_time_zone_that_is_not_there_is_refused(text):
    with pytest.raises(ValueError, match="is no time zone"):
        check_timezone(text)
    assert check_timezone("Europe/Berlin") == "Europe/Berlin"


def test_a_schedule_that_cannot_be_is_named_with_its_line(tmp_path):
    shipped = Path("params.yaml").read_text(encoding="utf-8")
    path = tmp_path / "params.yaml"
    path.write_text(
        shipped.replace("cron: 0 3 * * 1", "cron: every monday").replace("timezone: UTC", "timezone: Mars", 1)
    )
    with pytest.raises(ParamsError) as raised:
        load_params(path)
    assert "every monday" in str(raised.value) and "Mars" in str(raised.value)


def test_permutations_that_reach_no_p_value_are_refused(tmp_path):
    shipped = Path("params.yaml").read_text(encoding="utf-8")
    path = tmp_path / "params.yaml"
    path.write_text(
        shipped.replace("permutations: 2000 # permutations of sessions", "permutations: 300 # of")
    )
    with pytest.raises(ParamsError, match="at least 399 are needed"):
        load_params(path)


def test_more_drifted_windows_than_are_looked_at_are_refused(tmp_path):
    shipped = Path("params.yaml").read_text(encoding="utf-8")
    path = tmp_path / "params.yaml"
    path.write_text(shipped.replace("    drifted: 2 #", "    drifted: 4 #"))
    with pytest.raises(ParamsError, match=r"monitoring\.trigger\.drifted: 4 is above of"):
        load_params(path)
