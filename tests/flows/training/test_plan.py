import shutil

import pytest

from flows.training.plan import Change, Plan, StagePlan, lock_order, make_plan, sort_lock
from stages.common.errors import InputError
from tests.flows.toy import Toy

UNCHANGED = Plan(
    (StagePlan("read", (), ()), StagePlan("train", ("read",), ()), StagePlan("judge", ("train",), ()))
)


def changed(**changes: list[Change]) -> Plan:
    stages = UNCHANGED.stages
    return Plan(tuple(StagePlan(one.name, one.upstream, tuple(changes.get(one.name, ()))) for one in stages))


@pytest.fixture
def checkout(tmp_path, finished_toy, monkeypatch):
    toy = Toy(shutil.copytree(finished_toy.root, tmp_path / "checkout"), finished_toy.environment)
    monkeypatch.chdir(toy.root)
    return toy


def test_a_change_makes_what_follows_stale_and_nothing_else():
    plan = changed(train=[Change("code", "train")])

    assert plan.stale() == {"train", "judge"}
    assert UNCHANGED.stale() == frozenset()


def test_the_graph_is_read_from_dvc_in_the_order_of_dvc_repro(checkout):
    plan = make_plan(checkout.root)

    lines = checkout.dvc("repro", "--force", "--dry").stdout.splitlines()
    names = [line.split("'")[1] for line in lines if line.startswith("Running stage")]
    assert [stage.name for stage in plan.stages] == names
    assert {stage.name: stage.upstream for stage in plan.stages} == {
        "fetch": (),
        "read": (),
        "train": ("fetch", "read"),
        "judge": ("train",),
    }


def test_until_drops_the_stages_that_follow(checkout):
    assert {stage.name for stage in make_plan(checkout.root, "read").stages} == {"read"}


@pytest.mark.parametrize(
    ("path", "old", "new", "name"),
    [
        (
            "params.yaml",
            "learning_rate: 0.003",
            "learning_rate: 0.002",
            "params finetune.learning_rate 0.003→0.002",
        ),
        (
            "params.yaml",
            "rows_per_template: 8",
            "rows_per_template: 5",
            "params collect.sources.0.rows_per_template 8→5",
        ),
        (
            "params.yaml",
            "path: data/feedback/rows.jsonl",
            "path: data/other.jsonl",
            "params collect.sources.1.path data/feedback/rows.jsonl→data/other.jsonl",
        ),
        (
            "params.yaml",
            "    - kind: feedback",
            "    - {kind: file, path: data/mine.jsonl, license: cc-by-4.0}\n    - kind: feedback",
            "params collect.sources 2 entries→3 entries",
        ),
        (
            "params.yaml",
            "Answer with one intent as JSON.",
            "'{Answer} 100 %s\n\n    for $5'",
            "params task.system_prompt Answer with one intent …→{Answer} 100 %s for $5",
        ),
        ("work/judge.py", "alone", "changed", "code judge"),
        ("data/in.txt", "rows", "other rows", "new data read"),
        ("dvc.yaml", "stage.py train 0", "stage.py train 0.0", "command train"),
        ("read.txt", "rows", "touched by hand", "rebuild read.txt"),
    ],
)
def test_the_name_of_a_run_says_what_changed(checkout, path, old, new, name):
    assert make_plan(checkout.root).run_name() == "nothing changed"

    checkout.change(path, old, new)

    assert make_plan(checkout.root).run_name() == name


def test_many_changes_are_counted_and_a_long_name_is_cut():
    plan = changed(
        read=[Change("params", f"read.key_{number} 1→2") for number in range(5)],
        judge=[Change("code", "judge")],
    )

    assert plan.run_name() == "params read.key_0 1→2, params read.key_1 1→2, params read.key_2 1→2, 3 more"
    assert len(changed(read=[Change("params", "x" * 300)]).run_name()) == 100


def test_a_stage_that_never_ended_is_called_unfinished():
    plan = changed(train=[Change("never run", "train")], judge=[Change("never run", "judge")])

    assert plan.run_name() == "unfinished train"


def test_a_broken_graph_is_told_as_dvc_tells_it(checkout):
    checkout.write("dvc.yaml", "stages:\n  read:\n    comand: true\n")

    with pytest.raises(InputError, match=r"DVC cannot read the pipeline.*\n  fix: fix dvc.yaml"):
        make_plan(checkout.root)


def test_stages_added_to_the_lock_are_put_in_the_order_of_the_plan_and_others_stay(checkout):
    plan = make_plan(checkout.root)
    by_dvc = (checkout.root / "dvc.lock").read_bytes()
    order = lock_order(checkout.root)
    reversed_plan = Plan(tuple(reversed(plan.stages)))

    sort_lock(checkout.root, order, reversed_plan)
    assert lock_order(checkout.root) == order, "none of them is new"

    sort_lock(checkout.root, (), reversed_plan)
    assert lock_order(checkout.root) == tuple(reversed(order))

    sort_lock(checkout.root, (), plan)
    assert (checkout.root / "dvc.lock").read_bytes() == by_dvc


def test_a_project_without_a_repository_is_told_to_make_one(checkout):
    shutil.rmtree(checkout.root / ".git")

    with pytest.raises(InputError, match=r"is not a git repository.*\n  fix: .*git init"):
        make_plan(checkout.root)
