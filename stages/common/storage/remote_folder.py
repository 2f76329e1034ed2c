"""A folder at a URL that fsspec can open: on a shared file system, in an object store, on a server.

Credentials are never in the URL. fsspec and the library of each kind of store read them from the environment
or from their own files: `AWS_ACCESS_KEY_ID`, `FSSPEC_S3_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.common.errors import InputError, TransientError

PROBE_PATIENCE_S = 60.0
_PROBE = b"perennial"
_WITH_PASSWORD = re.compile(r"://[^/]*:[^/]*@")


def find_url_problem(url: str) -> str | None:
    """Return why a URL cannot be one of a folder, or None."""
    if _WITH_PASSWORD.search(url) or "?" in url:
        return (
            "must have neither a password nor a query, which logs and dvc.lock would show: set credentials "
            "in the environment, as AWS_ACCESS_KEY_ID or FSSPEC_SFTP_PASSWORD"
        )
    if "://" not in url or "::" in url:
        return "must be a URL of one folder, as s3://bucket/folder or file:///mnt/shared/folder"
    return None


class RemoteFolder:
    """A folder at a URL; it need not exist before something is written.

    Args:
        url: as `find_url_problem` takes it.

    Raises:
        InputError: fsspec has no file system for it, or its library is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec
        import fsspec.core

        self.url = url.rstrip("/")
        try:
            self._files, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            fix = f"install it with pip, in the version for fsspec {fsspec.__version__}"
            raise InputError(f"{url} cannot be opened: {error}", fix) from None
        except Exception as error:  # each kind of file system connects here, and fails, in its own way
            raise _explain(self.url, error) from None
        self._root = root.rstrip("/")

    def check_writable(self, patience_s: float = PROBE_PATIENCE_S) -> None:
        """Write a small file, read it and delete it.

        Raises:
            InputError: one of these is not possible.
            TransientError: the store does not answer.
        """

        def probe() -> bool:
            name = f".probe-{uuid.uuid4().hex}"
            self.write(name, _PROBE)
            read = self.read(name)
            self.remove(name)
            return read == _PROBE

        try:
            same = run_in_time(probe, patience_s)
        except Exception as error:  # each library has errors of its own
            raise _explain(self.url, error) from None
        if not same:
            raise InputError(f"{self.url} returns other bytes than were written", "use another store")

    def list_files(self, name: str) -> list[str]:
        """Return the files in a folder of this one, by their paths in it; none if it is not there."""
        self._files.invalidate_cache()  # others write here too
        try:
            found = self._files.find(self._path(name))
        except FileNotFoundError:
            return []
        return [path.removeprefix(f"{self._path(name)}/") for path in found]

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        data: bytes = self._files.cat_file(self._path(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file; with object stores it appears when it is whole."""
        self._files.pipe_file(self._make_parent(name), data)

    def put(self, source: Path, name: str) -> None:
        """Copy a file into the folder."""
        self._files.put_file(str(source), self._make_parent(name))

    def get(self, name: str, target: Path) -> None:
        """Copy a file from the folder; its parents are made."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._files.get_file(self._path(name), str(target))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing if it is not there."""
        assert name.strip("/"), "what is at the URL itself may not be ours"
        self._files.invalidate_cache()
        path = self._path(name)
        if self._files.exists(path):
            self._files.rm(path, recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_parent(self, name: str) -> str:
        """Return the path of a file, whose folder exists.

        Object stores, whose file systems are the asynchronous ones, have no folders, and some would make a
        bucket of a misspelt name.
        """
        path = self._path(name)
        if not self._files.async_impl:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path


def run_in_time(work: Callable[[], Any], patience_s: float) -> Any:
    """Return what `work` returns.

    Raises:
        TimeoutError: it has not ended in time; it is not stopped, but the process need not wait for it.
        Exception: what `work` raises.
    """
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience_s)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer within {patience_s:.0f} s")
    return found[0]


def _explain(url: str, error: Exception) -> InputError:
    what = f"{url} cannot be written, read and cleared: {type(error).__name__}: {error}"
    # Libraries that have errors of their own name them so: EndpointConnectionError, ReadTimeoutError.
    unanswered = isinstance(error, TimeoutError | ConnectionError) or re.search(
        "Connect|Timeout", type(error).__name__
    )
    if unanswered:
        return TransientError(what, "check the network and the address of the store, then run again")
    return InputError(
        what,
        "correct the URL, set the credentials in the environment, and allow this user to write, read, list "
        "and delete there",
    )
