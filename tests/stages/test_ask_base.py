import json
from pathlib import Path

import pytest
import yaml

from services.engines import offline
from services.engines.support import pick_engine
from stages import ask_base
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.generation import read_answers
from stages.common.records import make_row, write_rows
from tests.tiny import save_model

ROOT = Path(__file__).parents[2]


def rows_of(count, groups=12):
    return [
        make_row(
            [Message("user", f"question {i}"), Message("assistant", "yes" * (i % 4 + 1))],
            "toy",
            "mit",
            group=f"g{i % groups}",
        )
        for i in range(count)
    ]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that prepares a project folder in which the test then runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(offline, "KV_CACHE_MIB", 4)
    save_model(Path("artifacts/fetch_base"))

    def prepare(rows, gguf=True, **changes):
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["ask_base"] |= {"min_test_rows": 10, "max_new_tokens": 8} | changes
        params["export"]["gguf"] = gguf
        Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        write_rows(Path("artifacts/split/test.parquet"), rows)

    return prepare


def report():
    return json.loads(Path("reports/ask_base/metrics.json").read_text())


def test_every_chosen_row_has_an_answer(project):
    rows = rows_of(24)
    project(rows)
    ask_base.main()
    answers = read_answers(Path("artifacts/ask_base/answers.parquet"))
    assert list(answers) == [row.id for row in rows]
    assert all(answer.tokens <= 8 and answer.reference_loss > 0 for answer in answers.values())
    assert report()["engine"] == "paged"
    assert report()["rows"] == report()["test_rows"] == 24
    assert report()["finished"] == sum(answer.complete for answer in answers.values())


def test_asking_twice_gives_the_same_bytes(project):
    project(rows_of(24))
    path = Path("artifacts/ask_base/answers.parquet")
    ask_base.main()
    first = path.read_bytes()
    ask_base.main()
    assert path.read_bytes() == first


def test_the_limit_leaves_room_for_the_longest_reference_and_no_more(project):
    project(rows_of(24), max_new_tokens=500)
    ask_base.main()
    assert report()["answer_limit_tokens"] == 17  # twelve letters and the end of turn, and a quarter
    assert report()["references_over_limit"] == 0


def test_without_a_gguf_transformers_answers_alike(project):
    project(rows_of(24))
    ask_base.main()
    paged = read_answers(Path("artifacts/ask_base/answers.parquet"))
    project(rows_of(24), gguf=False)
    ask_base.main()
    assert report()["engine"] == "transformers"
    other = read_answers(Path("artifacts/ask_base/answers.parquet"))
    losses = [[answer.reference_loss for answer in found.values()] for found in (paged, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # either may compute in bfloat16


def test_an_engine_that_cannot_compute_the_model_is_refused_only_if_it_is_wanted(tmp_path):
    save_model(tmp_path, model_type="gpt_neox")
    assert pick_engine("auto", tmp_path, True) == "transformers"
    with pytest.raises(InputError, match="this model is of 'gpt_neox'"):
        pick_engine("paged", tmp_path, True)


def test_a_reference_that_does_not_fit_into_the_context_is_excluded_counted_and_named(project, caplog):
    long = make_row([Message("user", "q"), Message("assistant", "y" * 600)], "toy", "mit")
    project([*rows_of(24), long], min_test_rows=24)
    ask_base.main()
    found = report()
    assert (found["test_rows"], found["rejected_rows"], found["rows"]) == (25, 1, 24)
    assert f"row {long.id} from toy: too_long: 621 tokens, at most 512 fit" in caplog.text
    project([*rows_of(24), long], min_test_rows=25)
    with pytest.raises(InputError, match=r"24 rows, fewer than ask_base.min_test_rows \(25\)"):
        ask_base.main()


def test_fewer_test_rows_than_required_stop_the_pipeline(project):
    project(rows_of(24), min_test_rows=25)
    with pytest.raises(InputError, match=r"24 rows, fewer than ask_base.min_test_rows \(25\)") as error:
        ask_base.main()
    assert "split.test_fraction" in error.value.fix
    assert not Path("reports/ask_base").exists()


def test_test_rows_of_one_group_are_refused(project):
    project(rows_of(24, groups=1))
    with pytest.raises(InputError, match="of one group"):
        ask_base.main()


def test_max_rows_takes_the_same_rows_every_time():
    rows = rows_of(24)
    chosen = ask_base.choose_rows(rows, 15, 10, seed=7)
    assert len(chosen) == 15
    assert chosen == ask_base.choose_rows(rows, 15, 10, seed=7)
    assert [row for row in rows if row in chosen] == chosen


def test_answers_that_are_missing_name_the_stage_that_makes_them(tmp_path):
    with pytest.raises(InputError, match="cannot be read") as error:
        read_answers(tmp_path / "ask_base" / "answers.parquet")
    assert error.value.fix == "run the stage that writes it: dvc repro ask_base"
