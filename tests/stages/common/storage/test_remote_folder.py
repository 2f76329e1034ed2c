import os
import time

import pytest

from stages.common.errors import InputError, TransientError
from stages.common.storage.remote_folder import RemoteFolder, find_url_problem, run_in_time


@pytest.fixture(params=["file", "memory"])
def folder(request, tmp_path):
    found = RemoteFolder(f"{request.param}://{tmp_path}/checkpoints/")
    yield found
    found.remove("run")


def test_files_are_written_listed_read_and_removed(folder, tmp_path):
    assert folder.list_files("run") == []
    (tmp_path / "weights").write_bytes(b"x" * 1000)
    folder.put(tmp_path / "weights", "run/checkpoint-3/inner/weights")
    folder.write("run/checkpoint-3/complete.json", b"{}")
    assert sorted(folder.list_files("run")) == ["checkpoint-3/complete.json", "checkpoint-3/inner/weights"]
    assert folder.read("run/checkpoint-3/complete.json") == b"{}"
    folder.get("run/checkpoint-3/inner/weights", tmp_path / "other" / "weights")
    assert (tmp_path / "other" / "weights").read_bytes() == b"x" * 1000
    folder.remove("run/checkpoint-3/complete.json")
    folder.remove("run/checkpoint-9")
    assert folder.list_files("run") == ["checkpoint-3/inner/weights"]
    folder.remove("run")
    assert folder.list_files("run") == []


def test_a_folder_is_tried_before_the_work_and_nothing_is_left_in_it(folder, tmp_path):
    folder.check_writable()
    assert folder.list_files("run") == []
    assert not list(tmp_path.glob("checkpoints/*"))


def test_what_cannot_be_written_is_refused_with_the_fix(tmp_path):
    (tmp_path / "taken").write_text("a file, where the folder should be")
    with pytest.raises(InputError, match="cannot be written, read and cleared") as caught:
        RemoteFolder(f"file://{tmp_path}/taken/checkpoints").check_writable()
    assert "credentials in the environment" in caught.value.fix
    with pytest.raises(
        InputError, match="cannot be written, read and cleared: ValueError: Protocol not known"
    ):
        RemoteFolder("carrier-pigeon://loft")
    with pytest.raises(InputError, match="nstall") as caught:
        RemoteFolder("oss://bucket/folder")
    assert "in the version for fsspec" in caught.value.fix


def test_a_store_that_does_not_answer_is_a_failure_that_may_pass(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it

    class Silent(RemoteFolder):
        def read(self, name):
            return (tmp_path / "pipe").read_bytes()

    with pytest.raises(TransientError, match="no answer within 0 s"):
        Silent(f"file://{tmp_path}/store").check_writable(patience_s=0.1)


def test_work_in_time_returns_or_raises_what_it_did():
    assert run_in_time(lambda: 7, 5) == 7
    with pytest.raises(ZeroDivisionError):
        run_in_time(lambda: 1 / 0, 5)
    with pytest.raises(TimeoutError):
        run_in_time(lambda: time.sleep(1), 0.01)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://bucket/folder", None),
        ("file:///mnt/shared", None),
        ("abfs://container@account.dfs.core.windows.net/folder", None),
        ("sftp://user@host:22/folder", None),
        ("sftp://user:geheim@host/folder", "neither a password"),
        ("s3://bucket/folder?token=geheim", "neither a password"),
        ("/mnt/shared", "must be a URL"),
        ("simplecache::s3://bucket", "must be a URL"),
    ],
)
def test_a_url_names_one_folder_and_no_secret(url, problem):
    found = find_url_problem(url)
    assert found is None if problem is None else problem in found
