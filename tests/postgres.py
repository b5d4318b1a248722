"""A PostgreSQL server for tests: a new, empty one in a temporary folder, which can be killed and started again."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sweeps import free_port, wait_for

DEBIAN = "/usr/lib/postgresql/*/bin"
"""Where Debian puts the server's programs: a folder for each version, on nobody's PATH."""


def programs() -> Path | None:
    """The folder that has ``initdb`` and ``postgres``; the newest version's."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/").glob(DEBIAN[1:]), key=lambda path: int(path.parent.name), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").is_file()), None)


class Postgres:
    """``uri`` is that of its empty database."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder, self.process = programs, folder, None
        self.port = free_port()
        self.uri = f"postgresql+psycopg2://tester@127.0.0.1:{self.port}/postgres"
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:  # it refuses to run as root
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            entry = names.get("postgres") or names["nobody"]
            self.user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        command = [programs / "initdb", "-D", folder / "data", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **self.user)

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        command = [self.programs / "postgres", "-D", self.folder / "data", "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, **self.user
            )
        wait_for(self._answers)

    def _answers(self) -> bool:
        import psycopg2

        assert self.process is not None and self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            psycopg2.connect(host="127.0.0.1", port=self.port, user="tester", dbname="postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """At once, with its connections and nothing written out: it recovers from its log when it starts again."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)  # SIGKILL would leave the processes of its connections behind
            self.process.wait(30)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """One that runs; the test is skipped where its programs or its driver are not installed."""
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    folder = programs()
    if folder is None:
        pytest.skip(f"needs PostgreSQL's initdb and postgres, on PATH or in {DEBIAN} (Debian: postgresql)")
    # Not in pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as place:
        server = Postgres(folder, Path(place))
        try:
            server.start()
            yield server
        finally:
            server.kill()
