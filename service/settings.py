"""Every setting: a field here, a flag of `reparam serve`, an environment variable REPARAM_<FIELD>."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

DeviceChoice = Literal["auto", "cpu", "cuda"]


def _fits_a_header(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", key.get_secret_value()):
        raise ValueError("an API key is made of printable ASCII without blanks")
    return key


def _no_service_link(port: Any) -> Any:
    if isinstance(port, str) and port.startswith("tcp://"):
        raise ValueError("Kubernetes sets this for a service called reparam: give the pod `enableServiceLinks: false`")
    return port


class Settings(BaseSettings):
    """Reparam serves trained VAE samplers over HTTP.

    Each option can also be given in the environment: REPARAM_ and its name in capitals, as in REPARAM_PORT=9000. An
    option on the command line wins.
    """

    model_config = SettingsConfigDict(
        env_prefix="REPARAM_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_prog_name="reparam serve",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    host: str = "127.0.0.1"
    """Address to listen on, or a name, whose IPv4 address it is; 0.0.0.0 for every interface."""
    port: Annotated[int, BeforeValidator(_no_service_link), Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 for any free one."""
    artifacts: Path = Path("artifacts")
    """The model repository: <model>/<version>/model.onnx."""
    default_model: str | None = None
    """Model of a request that names none; else the first by name."""
    device: DeviceChoice = "auto"
    """auto takes CUDA when it works; cuda refuses to start without it."""
    tf32: bool = False
    """Let CUDA use TensorFloat-32: faster, and exact to three digits instead of seven."""
    cuda_graphs: bool = True
    """Let CUDA run a model as one graph for each size of a batch; without, its kernels are started one by one."""
    workers: NonNegativeInt = 0
    """Processes that serve side by side, each with the models and its part of the limits on rows and bytes held; 0
    for one a core on a CPU under Linux, at most 4, else for one."""
    threads: NonNegativeInt = 0
    """Cores that the models may use on the CPU; 0 for all."""
    runners: NonNegativeInt = 0
    """Batches that a worker runs at a time on the CPU; 0 for one a core of its own, at most 8. With 1 worker, 1 suits
    models that take long for a single row: each run has all cores."""
    api_key: Annotated[SecretStr, AfterValidator(_fits_a_header)] | None = None
    """If set, /sample and /models ask for `Authorization: Bearer <key>`."""
    max_batch_rows: PositiveInt = 1024
    """Rows of one run of a model; the service takes fewer of a slow one, so that nobody waits long for others, and no
    more than suit a CPU's caches."""
    max_queue_rows: PositiveInt = 65536
    """Rows that may wait, of all workers together; a request beyond a worker's part gets 429."""
    max_held_bytes: PositiveInt = 512 * 2**20
    """Bytes that bodies and answers may hold, of all workers together; a request beyond a worker's part gets 429."""
    max_rows: PositiveInt = 100_000_000
    """Rows of one streamed answer (application/x-npy)."""
    max_buffered_bytes: PositiveInt = 32 * 2**20
    """Raw bytes of one answer that is not streamed (JSON, PNG, npz); a row counts for at least 1 KiB."""
    max_body_bytes: PositiveInt = 8 * 2**20
    """Bytes of a request body."""
    request_timeout: PositiveFloat = 30.0
    """Seconds a request may take, or a stream until its first rows; a `Request-Timeout` header can only shorten it."""
    hang_timeout: PositiveFloat = 60.0
    """Seconds after which a batch that does not end makes /livez fail."""
    drain_delay: Annotated[NonNegativeFloat, Field(le=86400, allow_inf_nan=False)] = 1.0
    """Seconds from SIGTERM, when /readyz turns 503, to the closing of the port, so that load balancers see it."""
    drain_timeout: Annotated[NonNegativeInt, Field(le=86400)] = 7
    """Seconds that requests in flight may take after that."""
    log_format: Literal["json", "text"] = "json"
    """How a log line looks."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe lines logged; `info` includes one line a request."""
