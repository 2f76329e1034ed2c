"""A real PostgreSQL server for tests: a cluster in a folder, on a free port, run as a plain user."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path


def binaries() -> Path | None:
    """The newest folder with PostgreSQL's server programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Server:
    def __init__(self, folder: Path) -> None:
        self.data, self.log = folder / "data", folder / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql+psycopg://tester@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen | None = None
        # The server refuses to run as root.
        self._user = (
            {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        )
        folder.chmod(0o777)
        self._bin = binaries()
        subprocess.run(
            [self._bin / "initdb", "-D", self.data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            **self._user,
        )

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self.data, "-p", str(self.port), "-h", "127.0.0.1", "-k", ""],
                stdout=log,
                stderr=log,
                cwd=self.data.parent,
                **self._user,
            )
        ready = [self._bin / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        until = time.monotonic() + 300
        while subprocess.run(ready, capture_output=True).returncode:
            assert time.monotonic() < until and self._process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGINT: the fast shutdown, which ends connections."""
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait(60)
            self._process = None

    def kill(self) -> None:
        """SIGQUIT: as after a crash, without a checkpoint."""
        self._process.send_signal(3)
        self._process.wait(60)
        self._process = None
