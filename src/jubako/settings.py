"""Every setting: its environment variable is its name in capitals after ``JUBAKO_``.

The table in ``docs/settings.md`` is checked against this module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from jubako.keys import ApiKey, read_keys, read_keys_file, require_unlike
from jubako.weight_sets import Precision, WeightsChoice

__all__ = ["Settings", "SettingsError", "forbid_remote_code", "load_settings"]

PREFIX = "JUBAKO_"


class SettingsError(ValueError):
    """A setting has a value that can't be used; the text names the variable."""


def _words(value: object) -> object:
    return (
        tuple(filter(None, (word.strip() for word in value.split(",")))) if isinstance(value, str) else value
    )


def _urls(value: object) -> object:
    """``sd=http://a:3000|http://b:3000,sdxl=http://c:3000``: of each family one or several."""
    if not isinstance(value, str):
        return value
    pairs = [word.partition("=") for word in value.split(",") if word.strip()]
    urls = {name.strip(): tuple(url.strip() for url in several.split("|")) for name, _, several in pairs}
    for name, several in urls.items():
        for url in several:
            address = urlsplit(url)
            if address.scheme not in {"http", "https"} or not address.hostname:
                raise ValueError(f"{name}: {url!r} is no URL; write {name}=http://host:port")
    return urls


def _by_model(value: object) -> object:
    """``nvidia`` is for all models, under an empty name; ``sdxl=nvidia`` for that one."""
    if not isinstance(value, str):
        return value
    words = [word.strip() for word in value.split(",") if word.strip()]
    pairs = [word.rpartition("=") for word in words]
    return {name.strip(): choice.strip() for name, _, choice in pairs}


def _keys(value: object) -> object:
    return read_keys(value) if isinstance(value, str) else value


def _keys_file(value: object) -> object:
    return read_keys_file(value) if isinstance(value, str) else value


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)


def _bytes(value: object) -> object:
    """A size in words as a number of bytes: 20GB and 20G are decimal, 20GiB and 20Gi are binary."""
    if not isinstance(value, str) or value == "auto":
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is no size; write auto, or bytes as in 20GB, 8GiB or 20000000000")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


class Settings(BaseModel):
    """The settings of one process, read once from its environment."""

    # An error shows what was given, which may be a key or a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    home: Path = Field(
        default_factory=lambda: Path.home() / ".jubako", description="Where records and results are kept"
    )
    catalog: Path | None = Field(
        default=None, description="A folder of your own YAML files that add or override models"
    )
    families: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        default=(), description="The families to serve, separated by commas; empty: all"
    )
    family_urls: Annotated[Mapping[str, tuple[str, ...]], BeforeValidator(_urls)] = Field(
        default_factory=dict,
        description="Families that run elsewhere, as `family=http://host:port`, separated by commas; "
        "replicas of one have their URLs separated by vertical bars, or one name with several addresses",
    )
    default_model: str | None = Field(
        default=None, description="The model of a request that names none; unset: the catalog's default"
    )
    accepted_licences: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        default=(),
        description="Licences that you have read and accept, by their ids in `jubako models`, separated by "
        "commas; `all`: every one",
    )
    batching: Literal["step", "request"] | None = Field(
        default=None, description="`step` or `request` batching for every family; unset: the catalog's choice"
    )
    device: str = Field(
        default="auto", description="The torch device of the families: `auto`, `cpu`, `cuda`, `cuda:1`, …"
    )
    weights: Annotated[Mapping[str, WeightsChoice], BeforeValidator(_by_model)] = Field(
        default_factory=dict,
        description="`auto`, `standard`, `nvidia` or `amd` weights, for all models or as `model=nvidia`, "
        "separated by commas; unset: the catalog's choice",
    )
    precision: Annotated[Mapping[str, Precision | Literal["auto"]], BeforeValidator(_by_model)] = Field(
        default_factory=dict,
        description="`float32`, `float16`, `bfloat16`, `float8` or `mixed`, for all models or as "
        "`model=float8`; unset: float32 on a CPU, else the catalog's",
    )
    execution_provider: Literal["auto", "cpu", "cuda", "tensorrt", "migraphx"] = Field(
        default="auto",
        description="What ONNX Runtime runs graphs on; `auto`: TensorRT or MIGraphX on the GPU that is here, "
        "never the CPU",
    )
    adapter_bytes: Annotated[PositiveInt, BeforeValidator(_bytes)] = Field(
        default=2 * 10**9,
        description="Memory for the adapters of each model, as `2GB`; past it the least recently used go",
    )
    engine_bytes: Annotated[PositiveInt, BeforeValidator(_bytes)] = Field(
        default=100 * 10**9,
        description="Size of all engines that were built for this machine, as `100GB`; past it the least "
        "recently used go first",
    )
    accelerations: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        default=(),
        description="How PyTorch is made fast, as `no-compile,tf32`, separated by commas; empty: what suits "
        "the device; `none`: nothing",
    )
    preload: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        default=(), description="Models to load at start, separated by commas; empty: the default model"
    )
    memory_budget: Annotated[PositiveInt | Literal["auto"], BeforeValidator(_bytes)] = Field(
        default="auto",
        description="Memory for the models of each family, as `20GB` or `8GiB`; `auto`: 90 % of what the GPU "
        "has free at start, on a CPU 60 % of the RAM",
    )
    max_wait: float = Field(
        default=60.0,
        gt=0,
        description="Seconds that a request may be expected to take; one that would take longer in its queue "
        "is refused",
    )
    timeout: float = Field(
        default=600.0, gt=0, description="Seconds after which a request that has no picture yet is cancelled"
    )
    stop_delay: float = Field(
        default=0.0,
        ge=0,
        description="Seconds for which a server that was told to stop is not ready any more but serves on, "
        "so that balancers notice",
    )
    stop_grace: float = Field(
        default=25.0, ge=0, description="Seconds that what is at work has then to end before it is given up"
    )
    database_url: str | None = Field(
        default=None,
        pattern=r"^(postgresql|postgres|sqlite)(\+\w+)?://",
        description="Where jobs are recorded: `postgresql://…` for several gateways; unset: a SQLite file in "
        "`JUBAKO_HOME`",
    )
    gateway: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+$",
        description="The gateway's own name among several, the same after a restart; unset: the host's name",
    )
    max_queued_jobs: PositiveInt = Field(
        default=1000, description="Jobs of one API key that may wait for a family; more are refused"
    )
    training: bool = Field(
        default=True, description="Whether this gateway's machine trains; off where another one is to do it"
    )
    training_processes: PositiveInt = Field(
        default=1, description="Processes of one training, as many as GPUs that it is to have"
    )
    job_timeout: float = Field(
        default=3600.0, gt=0, description="Seconds after which a job that is run without a result has failed"
    )
    job_lease: float = Field(
        default=15.0,
        ge=1,
        description="Seconds without a sign of life after which other gateways take over a gateway's jobs",
    )
    keep_days: float = Field(
        default=7.0, gt=0, description="Days for which jobs that have ended and their files are kept"
    )
    keep_bytes: Annotated[PositiveInt, BeforeValidator(_bytes)] = Field(
        default=20 * 10**9, description="Size of all files of jobs, as `20GB`; past it the oldest go first"
    )
    safety: Literal["off", "flag", "blur", "refuse"] = Field(
        default="off",
        description="What is done about pictures that the safety checker flags: `flag` them in the answer, "
        "`blur` or `refuse` them; `off`: nobody looks",
    )
    safety_checker: str = Field(
        default="safety-checker",
        description="A checker of the catalog, which is to be pulled, or your own as `module:function`",
    )
    safety_frames: PositiveInt = Field(
        default=5, description="Of so many frames of a clip the safety checker looks at one, and at the last"
    )
    similar_distance: Annotated[int, Field(ge=0, le=64)] | Literal["off"] = Field(
        default=4,
        description="Bits of 64 by which a result may differ from an earlier one and be reported in "
        "`similar_to`; 0: not even one; `off`: nothing is compared",
    )
    preview_steps: int = Field(
        default=5, ge=0, description="Steps between two previews of a job; 0: no previews"
    )
    api_keys: Annotated[tuple[ApiKey, ...], BeforeValidator(_keys)] = Field(
        default=(), description="API keys as `name key scopes`, separated by semicolons"
    )
    api_keys_file: Annotated[tuple[ApiKey, ...], BeforeValidator(_keys_file)] = Field(
        default=(), description="A file of API keys, one `name key scopes` a line"
    )
    family_key: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="The key that a family served alone asks for and the gateway gives; the same on both",
    )
    public_without_keys: bool = Field(
        default=False, description="Serve without API keys beyond this machine: to whoever reaches it"
    )
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        default=(),
        description="Names by which the server is called, separated by commas; empty: with keys any, without "
        "them `localhost`",
    )

    log_format: Literal["text", "json"] = Field(
        default="text", description="`text`, or `json` for one object a line"
    )
    log_prompts: bool = Field(
        default=False, description="Whether a family logs each job's prompts; nothing else logs any"
    )

    @field_validator("api_keys_file")
    @classmethod
    def _unlike(cls, keys: tuple[ApiKey, ...], info: ValidationInfo) -> tuple[ApiKey, ...]:
        require_unlike((*info.data.get("api_keys", ()), *keys))
        return keys

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All API keys, those of the variable and those of the file."""
        return (*self.api_keys, *self.api_keys_file)

    def weights_for(self, model: str) -> WeightsChoice | None:
        """What is set for this model, or for all of them; None leaves it to the catalog."""
        return self.weights.get(model) or self.weights.get("")

    def precision_for(self, model: str) -> Precision | Literal["auto"] | None:
        """What is set for this model, or for all of them; None leaves it to the catalog."""
        return self.precision.get(model) or self.precision.get("")


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings. An unset or empty variable means the default; a bad one raises SettingsError."""
    environ = os.environ if environ is None else environ
    given = {
        field: value for field in Settings.model_fields if (value := environ.get(PREFIX + field.upper(), ""))
    }
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        variable = PREFIX + str(first["loc"][0]).upper()
        raise SettingsError(f"{variable}: {first['msg']}") from error


def forbid_remote_code() -> None:
    """Have diffusers take no code from the hub, and the hub's client tell nobody what is done here.

    Both look when they are imported, so this comes before; processes that are started inherit it.
    """
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
