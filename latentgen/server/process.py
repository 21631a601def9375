"""The worker's process.

    python -m latentgen.server.process

It reads its settings, and then the ids of jobs that were cancelled, as lines of JSON from its
standard input, and tells what it does as lines of JSON on its standard output. When the input ends,
its server is gone, and so is it, also while it is still loading.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

from .. import startup
from ..errors import InvalidRequest
from .log import log_as_json
from .settings import Settings

if TYPE_CHECKING:
    from .worker import Worker


STOPS = ("SIGINT", "SIGTERM", "SIGHUP")
NICE = 5  # drawing gives way to answering
LATEST = 10_000  # cancelled jobs that are remembered; most of them are never drawn


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints goes to the log
    for name in STOPS:  # they reach the whole group; the server leaves, and then the input ends
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(NICE)
    startup.begin()
    log_as_json()
    settings = Settings.from_json(sys.stdin.readline())
    cancelled: deque[str] = deque(maxlen=LATEST)
    workers: list[Worker] = []
    listener = threading.Thread(target=_listen, args=[cancelled, workers])
    listener.start()

    from .worker import launch  # seconds of imports

    try:
        workers.append(launch(settings, out, cancelled))
    except InvalidRequest as error:
        told = {"field": error.field, "value": str(error.value), "hint": error.hint}
        print(json.dumps({"event": "refused", **told}), file=out, flush=True)
        os._exit(0)  # a thread listens
    except Exception:  # a database out of reach, say, which may come back
        logging.exception("the worker cannot start")
        os._exit(1)
    startup.end()
    listener.join()


def _listen(cancelled: deque[str], workers: list[Worker]) -> None:
    """Hear what was cancelled, also before there is a worker; leave when nobody is there any
    more."""
    for line in sys.stdin:
        cancelled.append(json.loads(line)["cancel"])
    for worker in workers:
        worker.give_up()
    os._exit(0)  # the threads that draw do not wait for anybody


if __name__ == "__main__":
    main()
