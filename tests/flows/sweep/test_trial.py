import logging
import time

import pytest
import yaml
from dvc.repo import Repo

from flows.common.checkout import make_checkout
from flows.init.params_file import edit_params
from flows.sweep.baseline import CHECKOUT, check_metric, compute_name, make_baseline
from flows.sweep.experiments import read_head, save_experiment
from flows.sweep.space import to_changes
from flows.sweep.trial import Points, run_trial
from flows.training.plan import make_plan
from flows.training.stage_process import StageProcesses
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.records import write_rows
from stages.finetune.progress.validation import plan_points
from tests.flows.sweep.toy_sweep import loss_of, make_toy_sweep

LOGGER = logging.getLogger("flows.sweep.test")


@pytest.fixture(scope="module")
def toy(tmp_path_factory, clean_environment):
    return make_toy_sweep(tmp_path_factory.mktemp("sweep"), clean_environment)


@pytest.fixture(scope="module")
def baseline(toy):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(toy.root)
        plan = make_plan(toy.root, "finetune")
        yield make_baseline(toy.root, load_params(toy.root / "params.yaml"), plan)


def train(baseline, rate, on_point=lambda *_: False, **values):
    text = edit_params(baseline.params, to_changes({"finetune.learning_rate": rate, **values}))
    processes = StageProcesses(baseline.checkout)
    return run_trial(baseline, processes, text, "loss", 5, on_point, LOGGER)


def test_a_trial_trains_beside_the_workspace_and_is_an_experiment_that_can_be_applied(toy, baseline):
    (toy.root / "README.md").write_text("changed by the user\n")
    before = toy.git("status", "--porcelain", "--ignored")
    seen = []
    outcome = train(baseline, 0.01, lambda *point: bool(seen.append(point)), **{"finetune.rank": 8})
    assert (outcome.state, outcome.value) == ("complete", pytest.approx(loss_of(0.01)))
    assert seen == [(n, pytest.approx(1 + 1 / n)) for n in range(1, 6)]
    assert toy.git("status", "--porcelain", "--ignored") == before
    # The rows came out of the cache; nothing but the two stages of a trial ran.
    stages = yaml.safe_load((baseline.checkout / "dvc.lock").read_text())["stages"]
    assert list(stages) == ["split", "preflight", "finetune"]
    files = {name: (baseline.checkout / name).read_text() for name in ("params.yaml", "dvc.lock")}
    save_experiment(toy.root, baseline.head, "sweep-toy-01", files)
    index = toy.git("diff", "--cached", "--name-only")
    assert index == ""
    with Repo(str(toy.root)) as repo:
        assert [name for name, _ in next(iter(repo.experiments.ls().values()))] == ["sweep-toy-01"]
        repo.experiments.apply("sweep-toy-01")
        assert repo.status(targets=["finetune"]) == {}
    assert load_params(toy.root / "params.yaml").finetune.learning_rate == 0.01
    assert (toy.root / "artifacts" / "finetune" / "weights").read_text() == "0.01 8"
    assert (toy.root / "README.md").read_text() == "changed by the user\n"
    toy.git("checkout", "--", "params.yaml")


@pytest.mark.slow
def test_a_trial_is_stopped_as_soon_as_a_point_is_bad(baseline):
    started = time.monotonic()
    outcome = train(baseline, 0.1, lambda number, _: number == 2)
    assert outcome.state == "pruned" and outcome.value is None
    assert time.monotonic() - started < 60
    points = (baseline.checkout / "reports/finetune/validation.csv").read_text().splitlines()
    assert 3 <= len(points) < 6
    assert not (baseline.checkout / "reports/finetune/metrics.json").exists()


@pytest.mark.parametrize(
    ("updates", "numbers"), [(1, [5]), (3, [2, 3, 5]), (5, [1, 2, 3, 4, 5]), (8, [1, 2, 3, 4, 5])]
)
def test_a_training_with_fewer_updates_than_points_is_not_stopped_at_its_last_one(updates, numbers, tmp_path):
    """Its points have the numbers of the same shares of a longer training."""
    path, seen, lines = tmp_path / "validation.csv", [], ["step,loss"]
    stopped = []

    class Processes:
        def interrupt(self):
            stopped.append(seen[-1])

    def take_point(number, value):
        seen.append(number)
        return number == 5

    points = Points(path, "loss", 5, take_point, Processes())
    for step in sorted(plan_points(updates, 0.2)):
        lines.append(f"{step},{1 / step}")
        path.write_text("\n".join(lines) + "\n")
        points.take(f"finetune: 2 validation rows after {step} of {updates} updates: loss {1 / step}")
    assert seen == numbers and not stopped


@pytest.mark.slow
def test_a_trial_that_is_refused_or_contradicts_itself_has_failed_with_the_reason(baseline):
    outcome = train(baseline, 0.01, **{"finetune.rank": 200})
    assert outcome.state == "failed"
    assert outcome.message.startswith("preflight: rank 200 does not fit into memory")
    wrong = {"finetune.validate_every": None, "finetune.early_stopping": {"metric": "loss", "patience": 1}}
    outcome = train(baseline, 0.01, **wrong)
    assert outcome.state == "failed" and "needs validate_every" in outcome.message


def test_what_decides_a_trial_names_the_study(toy, baseline, tmp_path):
    def name(text):
        (tmp_path / "params.yaml").write_text(text)
        params = load_params(tmp_path / "params.yaml")
        return compute_name(baseline.checkout, params, baseline.head, baseline.lock)

    text = baseline.params
    # A key that is tried, and how long to go on, change no trial.
    same = text.replace("trials: 12", "trials: 20").replace("learning_rate: 0.003", "learning_rate: 0.002")
    assert same != text and name(same) == name(text) == baseline.name
    for old, new in {"epochs: 1": "epochs: 2", "high: 0.01": "high: 0.02"}.items():
        assert name(text.replace(old, new)) != baseline.name
    code = toy.root / "work" / "finetune.py"
    code.write_text(code.read_text() + "\n# another training\n")
    make_checkout(toy.root, baseline.checkout)
    assert name(text) != baseline.name
    toy.git("checkout", "--", "work/finetune.py")
    make_checkout(toy.root, baseline.checkout)
    assert name(text) == baseline.name


def test_a_metric_is_one_that_validation_rows_have(toy):
    settings = load_params(toy.root / "params.yaml").flows.sweep
    assert check_metric(toy.root, settings).kind == "json"
    with pytest.raises(InputError, match=r"flows\.sweep\.metric is chrf, and answers of kind json have none"):
        check_metric(toy.root, settings.model_copy(update={"metric": "chrf"}))
    path = toy.root / "artifacts" / "split" / "validation.parquet"
    whole = path.read_bytes()
    path.unlink()
    write_rows(path, [])
    with pytest.raises(InputError, match="no validation rows"):
        check_metric(toy.root, settings)
    path.write_bytes(whole)


def test_a_folder_without_a_commit_has_no_experiments(tmp_path, toy):
    with pytest.raises(InputError, match="is not a git repository"):
        read_head(tmp_path)
    toy.git("init", "-q", str(tmp_path))
    with pytest.raises(InputError, match="has no commit"):
        read_head(tmp_path)
    assert CHECKOUT.parts[0] == ".perennial"
