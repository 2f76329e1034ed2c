import json

import pytest

from stages.common.errors import InputError
from stages.common.model.adapter import (
    InitialAdapter,
    check_base,
    clear_initial_adapter,
    put_initial_adapter,
    read_initial_adapter,
    write_trained_ids,
)


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "initial_adapter").mkdir()
    (tmp_path / "initial_adapter" / "README.md").write_text("a page")
    return tmp_path / "initial_adapter"


def test_an_adapter_that_is_put_there_is_read_and_can_be_taken_away(adapter, folder):
    assert read_initial_adapter(folder) is None
    start = put_initial_adapter(adapter, "0123456789ab", "base", folder)
    assert read_initial_adapter(folder) == start == InitialAdapter(folder, "0123456789ab", "base")
    assert [path.read_bytes() for path in start.files] == [b"{}", b"weights"]
    assert json.loads((folder / "origin.json").read_text()) == {
        "version": "0123456789ab",
        "base_sha256": "base",
    }
    assert start.read_trained_ids() == frozenset()
    write_trained_ids({"b", "a"}, adapter)
    assert put_initial_adapter(adapter, "0123456789ab", "base", folder).read_trained_ids() == {"a", "b"}
    clear_initial_adapter(folder)
    assert read_initial_adapter(folder) is None
    assert [path.name for path in folder.iterdir()] == ["README.md"]


def test_a_folder_that_is_not_there_holds_no_adapter(tmp_path):
    assert read_initial_adapter(tmp_path / "nowhere") is None
    clear_initial_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors", "origin.json"])
def test_half_an_adapter_is_refused_with_what_is_missing(adapter, folder, lost):
    put_initial_adapter(adapter, "0123456789ab", "base", folder)
    (folder / lost).unlink()
    with pytest.raises(InputError, match=f"lacks {lost}"):
        read_initial_adapter(folder)


@pytest.mark.parametrize("about", ['{"version": "v"}', '["v"]', '{"version": 1, "base_sha256": "b"}'])
def test_a_start_that_does_not_say_what_it_is_is_refused(adapter, folder, about):
    put_initial_adapter(adapter, "v", "b", folder)
    (folder / "origin.json").write_text(about)
    with pytest.raises(InputError, match="no version and base_sha256") as error:
        read_initial_adapter(folder)
    assert "empty" in error.value.fix


def test_what_is_no_adapter_leaves_the_one_there_as_it_is(adapter, folder, tmp_path):
    put_initial_adapter(adapter, "v", "b", folder)
    with pytest.raises(InputError, match="contains no adapter"):
        put_initial_adapter(tmp_path, "other", "b", folder)
    assert read_initial_adapter(folder) == InitialAdapter(folder, "v", "b")


def test_an_adapter_of_another_base_is_refused_with_both_hashes_and_what_to_do(folder):
    start = InitialAdapter(folder, "0123456789ab", "aaaa")
    check_base(start, "aaaa")
    with pytest.raises(InputError, match=r"(?s)0123456789ab.*aaaa.*bbbb") as error:
        check_base(start, "bbbb")
    assert "empty" in error.value.fix
