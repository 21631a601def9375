"""A real server with a tiny model, and ways to talk to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fakes
import httpx
import pytest

from latentgen import LatentDiffusion

HERE = "127.0.0.1"


def pytest_collection_modifyitems(items):
    """These tests talk to a server of their own, on this machine: one after the other, because a
    server and its worker want processors too."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.enable_socket)
            item.add_marker(pytest.mark.xdist_group("server"))


class Running:
    """A server process, which may be killed and started again."""

    def __init__(self, home: Path, model: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind((HERE, 0))
            self.port = free.getsockname()[1]
        self.home = home
        self.url = f"http://{HERE}:{self.port}"
        self.log = home.parent / f"{home.name}.log"
        self._command = [sys.executable, "-m", "latentgen", "serve", "-m", str(model)]
        self._command += ["--port", str(self.port), *flags]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def start(self) -> Running:
        environment = {**os.environ, "LATENTGEN_HOME": str(self.home)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=environment, stderr=log, stdout=log)
        return self

    def wait(self, worker: str = "ready", seconds: float = 120) -> Running:
        """Until it answers and its worker is ready."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                told = self.http.get("/health", headers={"Host": f"localhost:{self.port}"}).json()
                if worker in ("", told["worker"]):
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def worker(self) -> int | None:
        """The process id of its worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        return found[0] if found else None

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def submit(self, **fields) -> str:
        answer = self.http.post("/jobs", json={"prompt": "a cat", "steps": 2, **fields})
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def job(self, id: str) -> dict:
        return self.http.get(f"/jobs/{id}").json()

    def ended(self, id: str, seconds: float = 60) -> dict:
        end = time.monotonic() + seconds
        while (state := self.job(id))["ended"] is None:
            assert time.monotonic() < end, state
            time.sleep(0.05)
        return state

    def drawn(self, id: str, steps: int, seconds: float = 120) -> None:
        """Wait until so many steps of a job are done."""
        end = time.monotonic() + seconds
        while ((state := self.job(id))["progress"] or {"index": 0})["index"] < steps:
            assert state["ended"] is None, state
            assert time.monotonic() < end, state
            time.sleep(0.02)

    def events(self, id: str) -> list[tuple[str, dict]]:
        with self.http.stream("GET", f"/jobs/{id}/events") as answer:
            lines = list(answer.iter_lines())
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event:")]
        data = [json.loads(line.removeprefix("data: ")) for line in lines if line[:5] == "data:"]
        return list(zip(names, data, strict=True))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny model: 32 x 32 pixels, drawn in milliseconds."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LatentDiffusion(**fakes.components(sample_size=4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _server(tmp_path_factory, tiny):
    flags = ["--max-queue", "40", "--max-steps", "900"]
    running = Running(tmp_path_factory.mktemp("served") / "home", tiny, *flags)
    running.home.mkdir()
    running.start().wait()
    yield running
    running.stop()


@pytest.fixture
def server(_server):
    """The server of all tests; what a test leaves unfinished is nobody else's burden."""
    yield _server
    for status in ("running", "queued"):
        jobs = _server.http.get("/jobs", params={"status": status, "limit": 200}).json()["jobs"]
        for job in jobs:
            _server.http.post(f"/jobs/{job['id']}/cancel")


@pytest.fixture(scope="session")
def postgres():
    """The URL of a PostgreSQL of our own, on this machine."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("there is no PostgreSQL here")
    tools = found[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = []
    if os.geteuid() == 0:  # it refuses to run as root
        user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind((HERE, 0))
        port = free.getsockname()[1]
    data = folder / "data"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*user, tools / "initdb", "-D", data, "-U", "us", "-A", "trust"], **quiet)
    options = f"-p {port} -c listen_addresses={HERE} -c unix_socket_directories="
    control = [*user, tools / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-o", options, "-l", folder / "log", "start"], **quiet)
    yield f"postgresql://us@{HERE}:{port}/jobs"
    subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(folder)
