"""Balance of the rows by group: what is read off them, what is found, what stops the pipeline."""

import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import yaml

from stages.check_bias.__main__ import main
from stages.check_bias.findings import Limits, check_groups
from stages.check_bias.groups import read_outcomes, read_people, read_rejected_rows, read_values
from stages.check_bias.plots import plot_groups
from stages.common.artifacts import read_json, write_json, write_lines, write_text
from stages.common.errors import InputError, ParamsError
from stages.common.messages import Message, Tool, ToolCall
from stages.common.params.loading import load_params
from stages.common.records import format_reject, make_row, write_rows
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import TASK_FILE
from stages.common.task.text_task import TextTask
from stages.common.task.tools_task import ToolsTask

ROOT = Path(__file__).parents[3]
PEOPLE = {
    "Ana": {"gender": "female", "origin": "latin"},
    "Ana Maria": {"gender": "female", "origin": "latin"},
    "Omar": {"gender": "male", "origin": "arabic"},
    "Zoé": {"gender": "female", "origin": "european"},
    "Kim": {"gender": "neutral", "origin": "korean"},
}
STRICT = Limits(min_representation_ratio=0.5, max_cramers_v=0.3)


def row(question, intent="TurnOn", group=None, **tags):
    messages = [Message("user", question), Message("assistant", f'{{"intent":"{intent}"}}')]
    return make_row(messages, "test", "apache-2.0", group=group, tags=tags)


def found(rows, rejected=(), groups=None, **changes):
    """Check the rows; the findings by group and kind."""
    settings = {
        "task": JsonTask("intent"),
        "min_rows": 20,
        "alpha": 0.01,
        "permutations": 999,
        "seed": 1,
    } | changes
    findings, _ = check_groups(rows, rejected, PEOPLE, groups=groups or {"platform": STRICT}, **settings)
    return {(finding.group, finding.kind): finding for finding in findings}


def platform_rows(phones, speakers, tied=False):
    """Rows of two platforms; tied ones have an outcome of their own on each."""
    return [
        row(f"say {n} on {platform}", intent=platform if tied else ("A", "B")[n % 2], platform=platform)
        for platform, count in (("phone", phones), ("speaker", speakers))
        for n in range(count)
    ]


def test_names_are_found_as_whole_words_with_their_capital():
    texts = ["call Ana", "turn on Omar's lamp", "banana", "the Analyst", "omar", "ZoéX", "Zoé?", "nobody"]
    genders = read_values([row(text) for text in texts], "person_gender", PEOPLE)
    assert genders == [("female",), ("male",), (), (), (), (), ("female",), ()]


def test_a_name_written_with_a_combining_accent_is_the_same_name():
    assert read_values([row("call Zoe\u0301")], "person_origin", PEOPLE) == [("european",)]


def test_a_prompt_with_two_people_counts_for_both():
    assert read_values([row("Ana and Omar")], "person_gender", PEOPLE) == [("female", "male")]


def test_the_longest_name_wins():
    people = {**PEOPLE, "Ana Maria": {"gender": "other", "origin": "x"}}
    assert read_values([row("call Ana Maria now")], "person_gender", people) == [("other",)]


def test_names_in_the_answer_or_the_system_message_do_not_count():
    messages = [Message("system", "You are Kim."), Message("user", "hello"), Message("assistant", "Ana here")]
    assert read_values([make_row(messages, "s", "mit")], "person_gender", PEOPLE) == [()]


def test_a_tag_decides_before_the_names_do():
    assert read_values([row("call Ana", person_gender="male")], "person_gender", PEOPLE) == [("male",)]


def test_fields_and_tags_can_be_groups():
    rows = [row("a", platform="phone"), row("b")]
    assert read_values(rows, "platform", PEOPLE) == [("phone",), ()]
    assert read_values(rows, "license", PEOPLE) == [("apache-2.0",), ("apache-2.0",)]


def test_the_shipped_lexicon_is_whole_and_its_names_are_found():
    people = read_people()
    for name, person in people.items():
        assert read_values([row(f"announce that {name}'s bus is here")], "person_gender", people) == [
            (person["gender"],)
        ]
    for column in ("gender", "origin"):
        counts = Counter(person[column] for person in people.values())
        assert len(set(counts.values())) == 1, counts


def test_a_lexicon_with_gaps_or_repeats_is_refused_with_all_its_lines(tmp_path):
    (tmp_path / "people.csv").write_text("name,gender,origin\nAna,female,latin\nBo,,nordic\nAna,female,x\n")
    with pytest.raises(
        InputError, match=r"(?s)people\.csv:3: an empty cell.*people\.csv:4: Ana occurs twice"
    ):
        read_people(tmp_path / "people.csv")
    (tmp_path / "people.csv").write_text("name,gender\nAna,female\n")
    with pytest.raises(InputError, match="no column origin"):
        read_people(tmp_path / "people.csv")


def test_outcomes_of_text_rows_are_quarters_by_the_answers_length():
    rows = [
        make_row([Message("user", f"q{n}"), Message("assistant", "x" * n)], "s", "mit") for n in range(1, 9)
    ]
    names = ["shortest quarter", "second quarter", "third quarter", "longest quarter"]
    assert read_outcomes(rows, TextTask()) == [name for name in names for _ in range(2)]


def test_balanced_rows_pass_with_the_numbers_in_words():
    findings = found(platform_rows(40, 30))
    ratio = findings["platform", "representation"]
    assert (ratio.passed, ratio.value) == (True, 0.75)
    assert "speaker has fewest (30 rows, 42.9%" in ratio.statement
    assert findings["platform", "outcome"].passed is True


def test_a_group_that_comes_short_fails():
    ratio = found(platform_rows(90, 10))["platform", "representation"]
    assert (ratio.passed, ratio.status, ratio.threshold) == (False, "failed", 0.5)
    assert "ratio 0.11; at least 0.50 is required: failed" in ratio.statement


def test_a_gender_that_the_lexicon_knows_and_no_row_names_is_counted_as_none():
    rows = [row(f"{n} call Ana") for n in range(30)] + [row(f"{n} call Omar") for n in range(30)]
    ratio = found(rows, groups={"person_gender": STRICT})["person_gender", "representation"]
    assert (ratio.passed, ratio.value) == (False, 0.0)
    assert "neutral has fewest (0 rows" in ratio.statement


def test_an_outcome_that_goes_with_a_group_fails():
    association = found(platform_rows(40, 40, tied=True))["platform", "outcome"]
    assert association.passed is False
    assert association.value > 0.95 and association.p_value < 0.01


def test_a_tie_that_a_single_template_explains_does_not_fail():
    """All phone rows come from one template: forty rows, but one piece of evidence."""
    rows = [
        row(f"say {n} on {platform}", intent=platform, group=platform, platform=platform)
        for platform in ("phone", "speaker")
        for n in range(40)
    ]
    association = found(rows)["platform", "outcome"]
    assert association.value > 0.95
    assert association.passed is True
    assert "not significant" in association.statement


def test_rows_that_curate_drops_from_one_group_only_fail():
    kept = platform_rows(60, 30)
    rejected = [row(f"dropped {n}", platform="speaker") for n in range(30)]
    association = found(kept, rejected)["platform", "rejection"]
    assert (association.kind, association.passed) == ("rejection", False)


def test_too_few_rows_are_reported_and_not_judged():
    ratio = found(platform_rows(9, 1))["platform", "representation"]
    assert (ratio.passed, ratio.status, ratio.value) == (None, "not_judged", pytest.approx(1 / 9))
    assert "fewer than 20 rows" in ratio.statement


def test_a_ratio_needs_rows_for_each_value():
    """Sixty rows that name two of the lexicon's four origins: the other two may be missing by chance."""
    rows = [row(f"{n} call Ana") for n in range(30)] + [row(f"{n} call Omar") for n in range(30)]
    ratio = found(rows, groups={"person_origin": STRICT})["person_origin", "representation"]
    assert (ratio.passed, ratio.status, ratio.value) == (None, "not_judged", 0.0)
    assert "fewer than 20 rows for each of 4 values" in ratio.statement
    more = [row(f"{n} call {name}") for n in range(40) for name in ("Ana", "Omar")]
    assert found(more, groups={"person_origin": STRICT})["person_origin", "representation"].passed is False


def test_a_group_without_a_threshold_is_reported_and_not_judged():
    groups = {"platform": Limits(min_representation_ratio=None, max_cramers_v=None)}
    findings = found(platform_rows(90, 10, tied=True), groups=groups)
    assert {finding.passed for finding in findings.values()} == {None}
    assert "Reported only" in findings["platform", "representation"].statement


def test_a_group_that_no_row_has_is_reported_as_not_present():
    for finding in found([row(str(n)) for n in range(30)]).values():
        assert (finding.status, finding.passed) == ("not_present", None)
        assert "platform: not present" in finding.statement


def test_a_group_with_one_value_says_that_nothing_is_known_of_others():
    ratio = found([row(str(n), platform="phone") for n in range(30)])["platform", "representation"]
    assert (ratio.status, ratio.passed) == ("not_judged", None)
    assert "all 30 rows are 'phone'" in ratio.statement


def test_no_rows_at_all_are_not_present():
    assert {finding.status for finding in found([]).values()} == {"not_present"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with curated rows; the returned function sets keys of `check_bias`."""
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())

    def configure(rows, **section):
        write_rows(Path("artifacts/curate/rows.parquet"), rows)
        write_text(Path("artifacts/curate/rejects.jsonl"), "")
        write_json(TASK_FILE, JsonTask("intent").describe())
        params["check_bias"].update(section)
        Path("params.yaml").write_text(yaml.safe_dump(params))

    return configure


PLATFORM = {"platform": {"min_representation_ratio": 0.5, "max_cramers_v": 0.3}}


def test_the_gate_fails_after_the_reports_are_written_and_says_what_to_do(project):
    project(platform_rows(90, 10), groups=PLATFORM, min_rows=20)
    with pytest.raises(InputError) as error:
        main()
    assert "ratio 0.11; at least 0.50 is required" in error.value.what
    assert "check_bias.groups in params.yaml" in error.value.fix
    evidence = read_json(Path("reports/check_bias/metrics.json"))
    assert (evidence["success"], evidence["failed"]) == (False, 1)
    assert evidence["groups"]["platform"][0]["rows"] == 90
    assert "FAILED" in Path("reports/check_bias/groups.svg").read_text()


def test_two_runs_write_the_same_bytes(project):
    def contents():
        main()
        return {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()}

    project(platform_rows(40, 30), groups=PLATFORM)
    assert contents() == contents()


def test_every_finding_has_a_sentence(project):
    project(platform_rows(40, 30))
    main()
    evidence = read_json(Path("reports/check_bias/metrics.json"))
    assert len(evidence["findings"]) == 3 * len(load_params().check_bias.groups)
    assert all(finding["statement"].endswith(".") for finding in evidence["findings"])


def test_the_plot_is_drawn_from_any_findings_and_needs_nothing_from_outside(tmp_path):
    for rows in (platform_rows(40, 30), [], [row(str(n), platform=str(n)) for n in range(30)]):
        findings, shares = check_groups(
            rows, [], PEOPLE, groups={"platform": STRICT, "source": STRICT}, task=JsonTask("intent"),
            min_rows=5, alpha=0.01, permutations=99, seed=1,
        )  # fmt: skip
        plot_groups(shares, findings, "intent", tmp_path / "groups.svg")
        svg = (tmp_path / "groups.svg").read_bytes()
        assert ET.fromstring(svg).tag.endswith("svg")
        assert b'href="http' not in svg and b"<image" not in svg


def test_the_plot_counts_the_values_that_it_does_not_show(tmp_path):
    rows = [row(f"{p} {n}", platform=f"p{p:02}") for p in range(20) for n in range(3)]
    findings, shares = check_groups(
        rows, [], PEOPLE, groups={"platform": STRICT}, task=JsonTask("intent"), min_rows=5, alpha=0.01,
        permutations=99, seed=1,
    )  # fmt: skip
    plot_groups(shares, findings, "intent", tmp_path / "groups.svg")
    assert "8 more not shown" in (tmp_path / "groups.svg").read_text()


def test_too_few_permutations_for_the_alpha_are_refused_before_any_work(project):
    project(platform_rows(40, 30), permutations=100)
    with pytest.raises(ParamsError, match=r"check_bias\.permutations: 100 are too few.*1000 could"):
        load_params()


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_a_rejected_row_is_read_again_whatever_line_its_text_ends(tmp_path, character):
    lost = row(f"one{character}two")
    path = tmp_path / "rejects.jsonl"
    write_lines(path, [format_reject(lost, "near_duplicate", "of another")])
    assert read_rejected_rows(path) == [lost]


def test_the_outcome_of_a_conversation_is_the_tool_that_it_calls_first():
    def talk(tool):
        turns = [
            Message("user", "on"),
            Message("assistant", "", (ToolCall(tool, "{}"),)),
            Message("tool", "done"),
            Message("assistant", "It is on."),
        ]
        return make_row(turns, "toy", "mit")

    plain = make_row([Message("user", "hi"), Message("assistant", "hello")], "toy", "mit")
    assert read_outcomes([talk("lamp"), talk("fan"), plain], ToolsTask()) == ["lamp", "fan", "(text)"]


def test_rejected_rows_with_tools_come_back_as_they_were(tmp_path):
    turns = [Message("user", "on"), Message("assistant", "", (ToolCall("lamp", "{}", "c1"),), reasoning="r")]
    row = make_row(turns, "toy", "mit", tools=[Tool('{"type":"function","function":{"name":"lamp"}}')])
    (tmp_path / "rejects.jsonl").write_text(format_reject(row, "unknown_tool", "x"))
    assert list(read_rejected_rows(tmp_path / "rejects.jsonl")) == [row]
