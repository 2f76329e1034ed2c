import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from stages.common.artifacts import write_json
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.records import make_row, read_rows, write_rows
from stages.common.similarity.compared_text import SharedParts
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import TASK_FILE
from stages.model_card.checks import check_metrics
from stages.split.__main__ import check_sizes, count_sides, main
from stages.split.leaks import prove_split, remove_near_duplicates
from stages.split.sides import (
    Sides,
    assign_sides,
    cap_training_rows,
    choose_group_labels,
    divide_rows,
    draw_training_rows,
    read_strata,
)

ROOT = Path(__file__).parents[3]


def row(question, group=None, intent="On", origin="human"):
    messages = [Message("system", "s"), Message("user", question), Message("assistant", "{}")]
    return make_row(messages, "toy", "mit", group=group, tags={"intent": intent}, origin=origin)


def distinct(number):
    """A sentence that is near no other one."""
    return " ".join(str((number + 7) ** power) for power in range(3, 8))


def many(groups, rows_per_group=5, intents=4):
    return [
        row(distinct(100 * group + number), f"g{group}", f"I{group % intents}")
        for group in range(groups)
        for number in range(rows_per_group)
    ]


def test_every_label_has_its_share_on_each_side():
    labels = {f"{label}{n}": label for label, count in (("a", 100), ("b", 40)) for n in range(count)}
    sides = Counter((labels[group], side) for group, side in assign_sides(labels, 0.1, 0.2, 7).items())
    assert sides["a", "test"] == 20
    assert sides["b", "test"] == 8
    assert sides["a", "validation"] == 10
    assert sides["b", "validation"] == 4


def test_the_shares_of_small_labels_are_right_over_all():
    labels = {f"{label}-{n}": str(label) for label in range(40) for n in range(3)}
    sides = Counter(assign_sides(labels, 0.05, 0.15, 7).values())
    assert sides["test"] == 18
    assert sides["validation"] == 6


def test_every_label_keeps_a_group_in_training():
    labels = {f"{label}-{n}": str(label) for label in range(30) for n in range(1 + label % 3)}
    sides = assign_sides(labels, 0.3, 0.6, 7)
    in_train = {labels[group] for group, side in sides.items() if side == "train"}
    assert in_train == set(labels.values())
    for label, count in Counter(labels.values()).items():
        if count == 1:
            assert sides[f"{label}-0"] == "train"


def test_the_same_seed_gives_the_same_sides_in_whatever_order_groups_come():
    labels = {f"{label}-{n}": str(label) for label in range(9) for n in range(9)}
    backwards = dict(reversed(labels.items()))
    assert assign_sides(labels, 0.1, 0.2, 7) == assign_sides(backwards, 0.1, 0.2, 7)
    assert assign_sides(labels, 0.1, 0.2, 7) != assign_sides(labels, 0.1, 0.2, 8)


def test_a_group_has_its_commonest_label():
    rows = [row("a", "g", "On"), row("b", "g", "Off"), row("c", "g", "Off")]
    assert choose_group_labels(rows, read_strata(rows, "intent", JsonTask(None))) == {"g": "Off"}
    assert choose_group_labels(rows, read_strata(rows, None, JsonTask(None))) == {"g": ""}


def test_a_tag_that_no_row_has_is_refused_with_those_there():
    with pytest.raises(InputError, match=r"no row has the tag 'topic' \(tags: intent\)"):
        read_strata([row("a")], "topic", JsonTask(None))


def test_no_group_is_asked_more_often_than_the_cap_and_all_rows_are_accounted_for():
    rows = many(40)
    labels = choose_group_labels(rows, read_strata(rows, "intent", JsonTask(None)))
    sides, over_cap = divide_rows(rows, assign_sides(labels, 0.1, 0.3, 7), 2, 7)
    assert set(Counter(r.group for r in sides.test).values()) == {2}
    assert sum(len(chosen) for _, chosen in sides.items()) + over_cap == len(rows)


def test_training_rows_near_a_held_out_one_are_removed_and_others_stay():
    test_row = row("turn on the light in the kitchen now", "t")
    near, far = row("turn on the lights in the kitchen now", "a"), row("what time is it in Lima", "b")
    sides, removed = remove_near_duplicates(Sides((near, far), (), (test_row,)), 0.8, SharedParts())
    assert removed == 1
    assert sides == Sides((far,), (), (test_row,))


def test_the_shared_system_message_makes_no_near_duplicate():
    rows = [
        make_row([Message("system", "s" * 300), Message("user", q), Message("assistant", "{}")], "toy", "mit")
        for q in ("lamp on", "what time is it")
    ]
    assert remove_near_duplicates(Sides((rows[0],), (), (rows[1],)), 0.5, SharedParts())[1] == 0


def test_the_proof_names_the_closest_pair_and_how_many_were_compared():
    sides = Sides(
        (row("turn on the light", "a"), row("what time is it", "b")), (), (row("turn on the lights", "c"),)
    )
    found = prove_split(sides, 0.95, SharedParts(), set())
    assert found["pairs_compared"] == 2
    assert found["groups_on_two_sides"] == found["near_duplicates_across"] == 0
    assert found["closest_pair"] == ["turn on the lights", "turn on the light"]
    assert 0.9 < found["highest_similarity"] < 0.95


@pytest.mark.parametrize(
    "sides",
    [
        Sides((row("one thing", "g"),), (), (row("another matter", "g"),)),
        Sides((row("turn on the light", "a"),), (), (row("turn on the light!", "b"),)),
    ],
    ids=["group on two sides", "near duplicate"],
)
def test_a_split_that_leaks_is_refused(sides):
    with pytest.raises(AssertionError, match="not clean"):
        prove_split(sides, 0.8, SharedParts(), set())


def test_a_split_too_small_names_both_sides_numbers_and_what_to_do():
    with pytest.raises(InputError) as error:
        check_sizes(Sides((row("a"),), (), (row("b"),)), {}, 2, 2, 10, 300)
    assert "2 rows in 2 groups" in error.value.what
    assert "train: 1 rows, and 10 are required (split.min_train_rows)" in error.value.what
    assert "test: 1 rows, and 300 are required (split.min_test_rows)" in error.value.what
    assert "rows_per_template" in error.value.fix


def test_a_split_too_small_names_where_the_rows_went_and_looks_there_first():
    gone = {
        "near duplicates of held-out prompts": 2430,
        "near_duplicate (curate)": 9059,
        "short_question (curate)": 0,
    }
    with pytest.raises(InputError) as error:
        check_sizes(Sides((row("a"),), (), (row("b"),)), gone, 3000, 3000, 10, 1)
    assert (
        "rows that went: 9,059 near_duplicate (curate), 2,430 near duplicates of held-out prompts"
        in error.value.what
    )
    assert "short_question" not in error.value.what
    assert error.value.fix.startswith("most rows went for the reasons above")


def test_the_reports_of_earlier_stages_are_in_the_error(project):
    project(many(10), min_test_rows=300)
    write_json(Path("reports/curate/metrics.json"), {"rejected_by_reason": {"near_duplicate": 9059}})
    write_json(Path("reports/collect/metrics.json"), {"rejected_by_reason": {"broken_csv": 3}})
    with pytest.raises(InputError, match=r"9,059 near_duplicate \(curate\), .*3 broken_csv \(collect\)"):
        main()


def test_labels_without_test_rows_are_named():
    sides = Sides((row("a", "g", "On"),), (), (row("b", "h", "Off"),))
    report = count_sides(sides, {"g": "On", "h": "Off"}, "intent")
    assert report["labels_without_test_rows"] == ["On"]
    assert report["labels"]["Off"] == {"groups": 1, "train": 0, "validation": 0, "test": 1}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(rows, stratify_by="intent", **changes):
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params["split"] |= {"max_train_rows_per_group": None} | changes
        params["task"]["stratify_by"] = stratify_by
        write_json(TASK_FILE, JsonTask(None).describe())
        Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        write_rows(Path("artifacts/curate/rows.parquet"), rows)
        write_rows(Path("artifacts/curate/refused.parquet"), [])

    return write


def test_twenty_rows_without_groups_or_labels_can_be_split(project):
    project([row(distinct(n)) for n in range(20)], stratify_by=None, min_train_rows=10, min_test_rows=3)
    main()
    sizes = [
        len(read_rows(Path(f"artifacts/split/{side}.parquet"))) for side in ("train", "validation", "test")
    ]
    assert sizes == [16, 1, 3]


def test_the_split_of_the_same_rows_is_the_same_files(project):
    project(many(60), min_train_rows=10, min_test_rows=10)
    main()
    first = {path.name: path.read_bytes() for path in Path("artifacts/split").iterdir()}
    report = Path("reports/split/metrics.json").read_bytes()
    main()
    assert {path.name: path.read_bytes() for path in Path("artifacts/split").iterdir()} == first
    assert Path("reports/split/metrics.json").read_bytes() == report


def test_nothing_is_written_when_the_test_side_is_too_small(project):
    project(many(10), min_test_rows=300)
    with pytest.raises(InputError, match=r"300 are required \(split.min_test_rows"):
        main()
    assert not Path("artifacts/split").exists()
    assert not Path("reports").exists()


def test_the_report_adds_up(project):
    rows = many(60) + [row(distinct(100 * g) + "!", f"copy{g}", "I0") for g in range(60)]
    project(rows, min_train_rows=10, min_test_rows=10)
    main()
    report = json.loads(Path("reports/split/metrics.json").read_text())
    removed, over_cap = report["train_rows_removed_as_near_duplicates"], report["test_rows_over_cap"]
    assert removed > 0
    assert sum(report["rows"].values()) + removed + over_cap == report["rows_in"] == len(rows)
    assert report["proof"]["near_duplicates_across"] == 0


def test_a_group_is_learned_at_most_so_often_and_a_rare_label_more_often():
    rows = many(groups=8, rows_per_group=9, intents=4)
    rows = [r for r in rows if r.tags["intent"] != "I0" or r.group == "g0"]  # I0: one group, the others two
    labels = choose_group_labels(rows, [r.tags["intent"] for r in rows])
    kept, excluded = cap_training_rows(rows, labels, 2, 7, seed=7)
    by_group = Counter(r.group for r in kept)
    assert by_group["g0"] == 7
    assert {count for group, count in by_group.items() if group != "g0"} == {4}
    assert excluded == len(rows) - len(kept)
    assert [r for r in rows if r in kept] == list(kept)
    assert cap_training_rows(rows, labels, 2, 7, seed=7) == (kept, excluded)
    assert set(Counter(r.group for r in cap_training_rows(rows, labels, 2, 0, seed=7)[0]).values()) == {2}


def test_without_a_limit_every_row_is_learned():
    rows = many(4)
    assert cap_training_rows(rows, {}, None, 20, seed=7) == (rows, 0)


def test_the_rows_over_the_limit_are_counted_and_feedback_is_not_limited(project):
    rows = many(60)
    project([*rows, *feedback_rows(8)], max_train_rows_per_group=3, min_train_rows_per_label=0)
    main()
    report = json.loads(Path("reports/split/metrics.json").read_text())
    assert report["train_rows_over_cap"] == 2 * report["groups"]["train"] - 2 * 8
    accounted = sum(report["rows"].values()) + report["test_rows_over_cap"] + report["train_rows_over_cap"]
    assert accounted == report["rows_in"]
    learned = read_rows(Path("artifacts/split/train.parquet"))
    assert {r.id for r in feedback_rows(8)} <= {r.id for r in learned}


@pytest.mark.parametrize("limit", [7, 20, 59])
def test_rows_are_drawn_with_the_share_of_each_label(limit):
    groups = {
        f"{label}{n}": label for label, count in {"a": 30, "b": 20, "c": 10}.items() for n in range(count)
    }
    rows = [row(distinct(n), group) for n, group in enumerate(groups)]
    drawn = draw_training_rows(rows, groups, limit, seed=7)
    counts = Counter(groups[r.group] for r in drawn)
    assert len(drawn) == limit and len({r.id for r in drawn}) == limit
    assert all(
        abs(counts[label] - limit * share) < 1 for label, share in (("a", 1 / 2), ("b", 1 / 3), ("c", 1 / 6))
    )
    assert list(drawn) == [r for r in rows if r.id in {d.id for d in drawn}]
    assert draw_training_rows(rows, groups, 60, seed=7) == rows
    assert draw_training_rows(rows, groups, None, seed=7) == rows


def test_a_rare_label_keeps_a_row_when_rows_are_drawn():
    groups = {f"common{n}": "common" for n in range(97)} | {f"rare{n}": f"rare{n}" for n in range(3)}
    rows = [row(distinct(n), group) for n, group in enumerate(groups)]
    for limit in (4, 5, 40):
        drawn = draw_training_rows(rows, groups, limit, seed=7)
        assert len(drawn) == limit and len({groups[r.group] for r in drawn}) == 4
    assert len(draw_training_rows(rows, groups, 3, seed=7)) == 3


def test_a_limit_of_the_training_rows_below_what_is_required_is_named(project):
    project(many(60), max_train_rows=5)
    with pytest.raises(InputError, match="train: 5 rows, and 10 are required") as error:
        main()
    assert error.value.fix == "raise split.max_train_rows from 5 to 10 or more"


def test_the_rows_that_are_not_drawn_are_counted_and_feedback_is_kept(project):
    project([*many(60), *feedback_rows(8)], max_train_rows=20)
    main()
    report = json.loads(Path("reports/split/metrics.json").read_text())
    assert report["rows"]["train"] == 20 + 8
    assert report["train_rows_not_drawn"] > 0
    assert check_metrics({"split": report}) == []  # every row is accounted for, or there is no card


def feedback_rows(count, **more):
    return [row(distinct(10_000 + n), f"feedback/{n}", origin="feedback", **more) for n in range(count)]


def test_feedback_leaves_validation_and_test_byte_for_byte_and_is_learned(project):
    rows = many(60)
    project(rows, min_train_rows=10, min_test_rows=10)
    main()
    before = {side: Path(f"artifacts/split/{side}.parquet").read_bytes() for side in ("validation", "test")}
    learned = {r.id for r in read_rows(Path("artifacts/split/train.parquet"))}
    test_row = read_rows(Path("artifacts/split/test.parquet"))[0]
    # Also a new label, a row very near a test row, and one before all others.
    new = [
        *feedback_rows(30),
        *feedback_rows(1, intent="Brew"),
        row(test_row.question + "!", "feedback/near", origin="feedback"),
    ]
    write_rows(Path("artifacts/curate/rows.parquet"), [new[0], *rows, *new[1:]])
    main()
    after = {side: Path(f"artifacts/split/{side}.parquet").read_bytes() for side in before}
    assert after == before
    now = {r.id for r in read_rows(Path("artifacts/split/train.parquet"))}
    assert now == learned | {r.id for r in new[:-1]}
    report = json.loads(Path("reports/split/metrics.json").read_text())
    assert report["feedback_rows"] == 32
    assert report["train_rows_removed_as_near_duplicates"] == 1


def test_feedback_of_a_group_that_is_held_out_is_not_learned_and_the_report_adds_up(project):
    rows = many(60)
    project(rows, min_train_rows=10, min_test_rows=10)
    main()
    before = Path("artifacts/split/test.parquet").read_bytes()
    group = read_rows(Path("artifacts/split/test.parquet"))[0].group
    write_rows(
        Path("artifacts/curate/rows.parquet"),
        [*rows, *(row(distinct(20_000 + n), group, "Other", "feedback") for n in range(9))],
    )
    main()
    assert Path("artifacts/split/test.parquet").read_bytes() == before
    report = json.loads(Path("reports/split/metrics.json").read_text())
    assert report["feedback_rows_of_held_out_groups"] == 9
    accounted = sum(report["rows"].values()) + report["test_rows_over_cap"] + 9
    assert accounted == report["rows_in"] == len(rows) + 9


def test_a_table_of_nothing_but_feedback_is_split_as_any_other(project):
    project(feedback_rows(40), stratify_by=None, min_train_rows=10, min_test_rows=3)
    main()
    assert len(read_rows(Path("artifacts/split/test.parquet"))) == 6


def talk(number, group):
    """A conversation of two questions."""
    messages = [
        Message("user", distinct(number)),
        Message("assistant", "first"),
        Message("user", distinct(number + 5000)),
        Message("assistant", "second"),
    ]
    return make_row(messages, "toy", "mit", group=group, tags={"intent": "On"})


def test_each_answer_of_a_test_conversation_is_a_row_and_training_rows_are_whole(project):
    project([talk(n, f"g{n}") for n in range(40)], stratify_by=None)
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["task"]["learned_turns"] = "all"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    main()
    test, train = (read_rows(Path(f"artifacts/split/{side}.parquet")) for side in ("test", "train"))
    report = json.loads(Path("reports/split/metrics.json").read_text())
    assert report["test_answers"] == len(test) == 2 * report["rows"]["test"]
    assert {one.tags["turn"] for one in test} == {"1", "2"}
    assert {len(one.messages) for one in train} == {4}
