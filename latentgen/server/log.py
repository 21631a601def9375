"""The log: a JSON object a line, on the standard error. It names jobs, not what they ask for."""

from __future__ import annotations

import json
import logging
import time
import traceback

__all__ = ["log_as_json", "without_values"]


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        facts = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info)
        return json.dumps(facts, ensure_ascii=False)


def log_as_json() -> None:
    """Send what this process logs there."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in ("httpx", "httpx2", "uvicorn.error", "dbos"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def without_values(error: BaseException) -> str:
    """What an error is and where it happened, without its message: that may quote a client."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"
