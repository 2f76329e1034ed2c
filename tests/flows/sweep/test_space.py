import pytest
import yaml

from flows.sweep.space import (
    check_space,
    decode_values,
    encode_current,
    make_distributions,
    to_changes,
)
from stages.common.errors import ParamsError
from stages.common.params.loading import load_params
from stages.common.params.loop import SweepFlow, TriedValues
from tests.flows.toy import ROOT

PARAMS = ROOT / "params.yaml"


def space(**tried):
    return {f"finetune.{name}": TriedValues(**values) for name, values in tried.items()}


@pytest.mark.parametrize("name", ["params.yaml", "params.tools.yaml"])
def test_the_shipped_spaces_are_right(name):
    check_space(ROOT / name, load_params(ROOT / name).flows.sweep.space)


@pytest.mark.parametrize(
    ("key", "tried", "problem"),
    [
        ("finetune.lerning_rate", {"choices": (0.1,)}, "did you mean finetune.learning_rate?"),
        ("split.seed", {"choices": (1, 2)}, "all trials learn the same rows"),
        ("finetune.rank", {"choices": (8, 0)}, "finetune.rank: input should be greater than or equal to 1"),
        ("finetune.rank", {"low": 4.0, "high": 8.0}, "finetune.rank: input should be a valid integer"),
        ("finetune.dropout", {"low": 0.0, "high": 1.5}, "(value 1.5)"),
        ("finetune.schedule", {"choices": ("cosine", "cosinus")}, "cosinus"),
        ("finetune.validate_every", {"choices": (None,)}, "nothing could be compared"),
        ("finetune.validate_every", {"choices": (0.1, 0.5)}, "points of two trials could not be compared"),
        ("finetune.early_stopping", {"choices": ({"metric": "loss"},)}, "early_stopping.patience: missing"),
    ],
)  # fmt: skip
def test_a_key_or_a_value_that_no_training_takes_is_refused(key, tried, problem):
    with pytest.raises(ParamsError) as error:
        check_space(PARAMS, {key: TriedValues(**tried)})
    assert problem in str(error.value) and "flows.sweep.space" in str(error.value)


def test_a_sweep_without_points_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text().replace("validate_every: 0.5", "validate_every: null"))
    with pytest.raises(ParamsError, match=r"finetune\.validate_every is null"):
        check_space(path, space(rank={"choices": (4, 8)}))


@pytest.mark.parametrize(
    ("tried", "problem"),
    [
        ({"low": 0.1, "high": 0.01}, "low (0.1) is above high (0.01)"),
        ({"low": 0, "high": 1.0, "log": True}, "must be above 0 where log is true"),
        ({"low": 0.1}, "needs low and high, or choices"),
        ({"choices": [1], "high": 2}, "has choices and a range"),
        ({"choices": [1, 2, 1]}, "has the choice 1 twice"),
        ({"choices": []}, "should have at least 1 item"),
        ({"lo": 1, "high": 2}, "unknown key (value 1); did you mean low?"),
    ],
)
def test_a_range_or_choices_of_which_nothing_can_be_drawn_are_refused(tmp_path, tried, problem):
    values = yaml.safe_load(PARAMS.read_text())
    values["flows"]["sweep"]["space"] = {"finetune.learning_rate": tried}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ParamsError) as error:
        load_params(tmp_path / "params.yaml")
    assert problem in str(error.value)


def test_choices_may_be_lists_and_mappings_and_come_back_as_they_were():
    tried = space(
        target_modules={"choices": ("all-linear", ("q_proj", "v_proj"))},
        early_stopping={"choices": (None, {"metric": "loss", "patience": 2})},
        rank={"low": 2, "high": 8},
        learning_rate={"low": 1e-4, "high": 1e-2, "log": True},
    )
    check_space(PARAMS, tried)
    found = make_distributions(tried)
    kinds = {key.split(".")[1]: type(value).__name__ for key, value in found.items()}
    assert kinds["rank"] == "IntDistribution" and kinds["learning_rate"] == "FloatDistribution"
    drawn = {key: one.choices[1] for key, one in found.items() if "Categorical" in type(one).__name__}
    values = decode_values({**drawn, "finetune.rank": 4, "finetune.learning_rate": 0.001}, tried)
    assert to_changes(values) == {
        "finetune": {
            "target_modules": ["q_proj", "v_proj"],
            "early_stopping": {"metric": "loss", "patience": 2},
            "rank": 4,
            "learning_rate": 0.001,
        }
    }


def test_the_present_values_are_drawn_first_if_the_space_has_them():
    section = load_params(PARAMS).finetune.model_dump(mode="json")
    inside = space(rank={"choices": (8, 16)}, learning_rate={"low": 0.001, "high": 0.01})
    assert encode_current(section, inside) == {"finetune.rank": "16", "finetune.learning_rate": 0.003}
    shipped = encode_current(section, load_params(PARAMS).flows.sweep.space)
    assert shipped == {
        "finetune.learning_rate": 0.003,
        "finetune.rank": "16",
        "finetune.validate_every": "0.2",
    }
    assert encode_current(section, space(rank={"choices": (8, 32)})) is None
    assert encode_current(section, space(learning_rate={"low": 0.01, "high": 0.1})) is None


def test_a_sweep_has_at_least_one_trial_and_one_key():
    shipped = load_params(PARAMS).flows.sweep.model_dump()
    for wrong in ({"trials": 0}, {"space": {}}, {"timeout_minutes": 0}, {"pruner": "often"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SweepFlow.model_validate({**shipped, **wrong})
