"""What the operator of a server decides, once, at its start."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import InvalidRequest
from ..home import home
from ..modelfolder import DEFAULT_MODEL, Model, bundled_models, find, models_in

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a server listens, what it draws with, and its limits.

    Attributes:
        host, port: where it listens; hosts other than the loopback need a token.
        token: what clients must send, as Bearer or as the password of HTTP Basic; None: nothing.
        model: drawn with unless a request names another: a folder, hub id or checkpoint.
        device, dtype, attention: as in `LatentDiffusion.from_pretrained`.
        data_dir: everything that is kept: pictures, jobs, LoRAs, embeddings, models.
        database_url: of PostgreSQL; None: an SQLite file in the data folder.
        allowed_hosts: further names under which clients may reach it (the Host header).
        max_queue: jobs that wait; more are refused.
        max_batch: pictures of different jobs that are drawn at once.
        max_images, max_steps: in one job, whose pictures are drawn at once.
        max_pixels: of each picture, drawn or sent.
        max_body: bytes of a request.
        log_prompts: whether the log may hold what people ask for.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    model: str = DEFAULT_MODEL
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    data_dir: Path = field(default_factory=home)
    database_url: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_queue: int = 100
    max_batch: int = 8
    max_images: int = 16
    max_steps: int = 150
    max_pixels: int = 2048 * 2048
    max_body: int = 64 * 2**20
    log_prompts: bool = False

    @property
    def outputs(self) -> Path:
        """Finished pictures."""
        return self.data_dir / "outputs"

    @property
    def inputs(self) -> Path:
        """Pictures that jobs start from."""
        return self.data_dir / "inputs"

    @property
    def embeddings(self) -> Path:
        """Textual inversions; all of them are loaded, each called by its token."""
        return self.data_dir / "embeddings"

    @property
    def database(self) -> str:
        """The URL of the database."""
        if self.database_url is not None:
            return self.database_url
        return f"sqlite:///{self.data_dir / 'jobs.sqlite'}"

    def told(self, message: str) -> str:
        """A message as clients may read it: where the data lies is the server's own business."""
        own = self.default_model.path
        if own is not None and own.is_absolute():
            message = message.replace(str(own), own.name)
        return message.replace(str(self.data_dir), "LATENTGEN_HOME")

    def to_json(self) -> str:
        """One line for the worker, which has no business with the token."""
        told = asdict(self) | {"data_dir": str(self.data_dir), "token": None, "allowed_hosts": []}
        return json.dumps(told) + "\n"

    @classmethod
    def from_json(cls, line: str) -> Settings:
        told = json.loads(line)
        own = {"data_dir": Path(told["data_dir"]), "allowed_hosts": tuple(told["allowed_hosts"])}
        return cls(**(told | own))

    @cached_property
    def default_model(self) -> Model:
        """What `model` names; if that is on the hub, it is asked once and not with each request.

        Raises:
            InvalidRequest: there is no such model.
        """
        return find(self.model)

    def models(self) -> dict[str, Model]:
        """What can be drawn with, by name, the default first: what `model` names, the bundled
        model, and what lies in the folder `models` of the data folder."""
        own = self.default_model
        if own.hub_id is None and own.path is not None and own.path.exists():
            with suppress(InvalidRequest):  # half of another one, so far
                own = find(own.path)
        names: dict[str, Model] = {}
        for model in [own, *bundled_models(), *models_in(self.data_dir / "models")]:
            names.setdefault(model.name, model)
        return names
