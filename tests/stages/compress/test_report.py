"""Which models are on the front, and which one is chosen."""

from itertools import combinations

import pytest

from stages.compress.plots import draw_fronts, name_points
from stages.compress.report import choose_model, find_front, format_table


def model(size, value, lost=0.0):
    found = {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 100}
    change = {"value": -lost / 100, "low": -0.1, "high": 0.1, "p_value": 0.5, "n": 100}
    return {
        "bytes": size << 20,
        "results": {"exact_match": found},
        "difference": {"exact_match": change},
        "lost_points": lost,
    }


def report(**models):
    speed = {"alone_tokens_per_s": 100.0, "together_tokens_per_s": 400.0, "peak_memory_mib": 900}
    return {
        "primary": "exact_match",
        "rows": 100,
        "groups": 30,
        "confidence": 0.95,
        "models": models,
        "throughput": {
            name: {**speed, "alone_tokens_per_s": 4000 / one["bytes"]} for name, one in models.items()
        },
        "fronts": {"bytes": [*models], "tokens_per_s": [*models]},
        "chosen": None,
        "choice": "none.",
    }


FOUND = report(exported=model(100, 0.86), int8=model(53, 0.86, 0.2), int4=model(31, 0.80, 6.0))


def test_a_model_that_another_one_beats_is_not_on_the_front():
    models = {
        "exported": model(100, 0.86),
        "int8": model(53, 0.86),
        "q4_k": model(40, 0.79),
        "int4": model(31, 0.80),
    }
    assert find_front(models, lambda name: -models[name]["bytes"], "exact_match") == ["int8", "int4"]


@pytest.mark.parametrize(
    ("wanted", "points", "chosen"),
    [
        (None, 2.0, None),
        ("int4", 2.0, "int4"),  # by name, whatever it loses: the gate judges it
        ("smallest", 0.1, None),
        ("smallest", 2.0, "int8"),
        ("smallest", 10.0, "int4"),
    ],
)
def test_the_choice_is_by_size_and_answers(wanted, points, chosen):
    found, reason = choose_model(FOUND, wanted, points)
    assert found == chosen
    assert reason.endswith(".") and (chosen or "exported") in reason


def test_a_variant_that_is_larger_than_the_export_is_not_the_smallest():
    found = report(exported=model(30, 0.86), int8=model(53, 0.86))
    assert choose_model(found, "smallest", 2.0)[0] is None


def test_the_table_and_the_picture_name_every_model(tmp_path):
    text = "".join(format_table(FOUND | {"chosen": "int8", "choice": "compress.choose is int8."}))
    assert "| **int8** | 53.0 | 0.860 (0.810 to 0.910) | 0.20 | 0.5000 |" in text
    draw_fronts(tmp_path / "pareto.svg", FOUND | {"chosen": "int8"})
    svg = (tmp_path / "pareto.svg").read_text()
    assert all(f">{name}<" in svg for name in FOUND["models"])
    draw_fronts(tmp_path / "again.svg", FOUND | {"chosen": "int8"})
    assert (tmp_path / "again.svg").read_text() == svg


def test_names_of_models_that_are_as_fast_and_as_good_do_not_cover_each_other():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2))
    axes = figure.subplots()
    points = {
        "int4": (29.5, 0.862),
        "pruned": (29.7, 0.889),
        "int8": (30.1, 0.882),
        "halved": (39.6, 0.7),
    }
    axes.scatter(*zip(*points.values(), strict=True))
    figure.draw_without_rendering()
    name_points(axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["halved", "int4", "int8", "pruned"]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
