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

DEMO_MODELS = Path(__file__).parent.parent / "artifacts"


def artifacts_or_demo_models() -> Path:
    """Returns ./artifacts, which `reparam publish` makes, if it exists, else the demo models."""
    here = Path("artifacts")
    return here if here.exists() else DEMO_MODELS


def _fits_a_header(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", key.get_secret_value()):
        raise ValueError("an API key is made of printable ASCII without blanks")
    return key


def _no_service_link(port: Any) -> Any:
    if isinstance(port, str) and port.startswith("tcp://"):
        raise ValueError("Kubernetes sets this for a service called reparam: give the pod `enableServiceLinks: false`")
    return port


class Settings(BaseSettings):
    """Serve trained VAE samplers over HTTP.

    Each option can also be set in the environment: REPARAM_ and its name in capitals, as in REPARAM_PORT=9000.
    An option on the command line wins.

    Example: reparam serve my-models --port 9000
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
    """Address to listen on, or a name with an IPv4 address; 0.0.0.0 listens on every interface."""
    port: Annotated[int, BeforeValidator(_no_service_link), Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes any free port."""
    artifacts: Path = Field(default_factory=artifacts_or_demo_models)
    """Folder of models: <model>/<version>/model.onnx. Default: ./artifacts if it exists, else the demo models."""
    default_model: str | None = None
    """Model of a request without `model`. Default: the first by name."""
    device: DeviceChoice = "auto"
    """auto uses CUDA if it works; cuda refuses to start without CUDA."""
    tf32: bool = False
    """Let CUDA use TensorFloat-32: faster, and exact to three digits instead of seven."""
    cuda_graphs: bool = True
    """Let CUDA run a model as one graph for each batch size; without, CUDA starts each kernel on its own."""
    workers: NonNegativeInt = 0
    """Processes that serve side by side. Each has the models and its share of the limits on rows and bytes. 0 is one
    per core on a CPU under Linux, at most 4, else one."""
    threads: NonNegativeInt = 0
    """Cores that the models may use on the CPU; 0 is all."""
    runners: NonNegativeInt = 0
    """Batches that a worker runs at a time on the CPU; 0 is one per core of the worker, at most 8. With 1 worker, 1
    suits models that take long for a single row: each run has all cores."""
    api_key: Annotated[SecretStr, AfterValidator(_fits_a_header)] | None = None
    """If set, /sample and /models require `Authorization: Bearer <key>`."""
    max_batch_rows: PositiveInt = 1024
    """Most rows of one batch. The service takes fewer of a slow model, so that requests do not wait long for each
    other, and no more than fit a CPU's caches."""
    max_queue_rows: PositiveInt = 65536
    """Most rows in the queues of all workers together; a request beyond a worker's share gets 429."""
    max_held_bytes: PositiveInt = 512 * 2**20
    """Most bytes of bodies and responses in all workers together; a request beyond a worker's share gets 429."""
    max_rows: PositiveInt = 100_000_000
    """Most rows of one streamed response (application/x-npy)."""
    max_buffered_bytes: PositiveInt = 32 * 2**20
    """Most raw bytes of one response that is not streamed (JSON, PNG, npz); a row counts for at least 1 KiB."""
    max_body_bytes: PositiveInt = 8 * 2**20
    """Most bytes of a request body."""
    request_timeout: PositiveFloat = 30.0
    """Seconds a request may take, or a stream until its first rows; a `Request-Timeout` header can only shorten it."""
    hang_timeout: PositiveFloat = 60.0
    """Seconds after which a batch that has not ended makes /livez fail."""
    drain_delay: Annotated[NonNegativeFloat, Field(le=86400, allow_inf_nan=False)] = 1.0
    """Seconds from SIGTERM, when /readyz turns 503, to the closing of the port; load balancers need them to react."""
    drain_timeout: Annotated[NonNegativeInt, Field(le=86400)] = 7
    """Seconds that requests in flight may take after the port is closed."""
    log_format: Literal["json", "text"] = "json"
    """Format of a log line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest severity that is logged; `info` includes one line for each request."""
