import pytest
from dvc_data.hashfile.istextfile import DEFAULT_CHUNK_SIZE, istextblock

from stages.common.artifacts import (
    STATE,
    atomic_dir,
    atomic_write,
    hash_files,
    make_folder,
    read_json,
    read_lines,
    write_json,
    write_text,
)
from stages.common.errors import InputError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic_write(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_json_is_the_same_bytes_for_the_same_value(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": "ü"})
    write_json(tmp_path / "b", {"y": "ü", "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_json_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_fresh_folder_takes_the_place_of_the_old_one_only_on_success(tmp_path):
    folder = tmp_path / "model"
    with atomic_dir(folder) as new:
        (new / "old").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_dir(folder) as new:
        (new / "half").write_text("2")
        raise ZeroDivisionError
    assert [p.name for p in folder.iterdir()] == ["old"]
    with atomic_dir(folder) as new:
        (new / "new").write_text("3")
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_beside_a_folder_is_swept_away(tmp_path):
    (tmp_path / ".model.killed").mkdir()
    with atomic_dir(tmp_path / "model") as new:
        (new / "new").write_text("1")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_broken_evidence_names_the_file_and_the_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports/curate").mkdir(parents=True)
    path = tmp_path.joinpath("reports/curate/metrics.json").relative_to(tmp_path)
    with pytest.raises(InputError, match="dvc repro curate"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_json(path)


def test_a_line_separator_in_a_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_text(path, "")
    assert read_lines(path) == []
    write_text(path, "a\u2028b\nc\x85d\n")
    assert read_lines(path) == ["a\u2028b", "c\x85d"]


@pytest.mark.parametrize("text", ["दिल्ली का मौसम", "北京的天气", "😀😡"])
def test_metrics_in_any_script_are_text_for_dvc_and_the_same_values(tmp_path, text):
    path = tmp_path / "metrics.json"
    write_json(path, {"closest_pair": [text * 20] * 2})
    assert istextblock(path.read_bytes()[:DEFAULT_CHUNK_SIZE])
    assert read_json(path) == {"closest_pair": [text * 20] * 2}


def test_the_hash_of_files_depends_on_their_names_and_contents_and_not_on_their_folder(tmp_path):
    for name in ("one", "two", "other"):
        write_text(tmp_path / name / "weights", "abc")
        write_text(tmp_path / name / "config", "def")
    (tmp_path / "other" / "config").rename(tmp_path / "other" / "settings")
    one, two, other = (hash_files(sorted((tmp_path / name).iterdir())) for name in ("one", "two", "other"))
    assert one == two != other
    write_text(tmp_path / "two" / "config", "deg")
    assert hash_files(sorted((tmp_path / "two").iterdir())) != one


def test_only_its_owner_can_open_the_folder_of_the_state(tmp_path):
    state = tmp_path / "checkout" / STATE
    make_folder(state / "logs")
    assert state.stat().st_mode & 0o777 == 0o700
    state.chmod(0o755)
    write_json(state / "gate" / "x" / "answers.json", {})
    assert state.stat().st_mode & 0o777 == 0o700
    write_json(tmp_path / "checkout" / "reports" / "metrics.json", {})
    assert (tmp_path / "checkout" / "reports").stat().st_mode & 0o777 != 0o700
