"""The one Settings class: the sole reader of the environment."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AnyHttpUrl, Field, IPvAnyNetwork, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Everything an operator can set, as `WINNOW_<NAME>` in the environment."""

    model_config = SettingsConfigDict(env_prefix="WINNOW_", extra="ignore", frozen=True)

    database_url: SecretStr | None = Field(
        None, description="PostgreSQL, as postgresql://…; `winnow serve` starts its own when unset."
    )
    broker_url: SecretStr | None = Field(
        None, description="Redis or Valkey, as redis://…; `winnow serve` starts its own when unset."
    )
    data_dir: Path = Field(
        Path(".winnow"),
        description="Uploads, influence files and results; shared by the API and all workers.",
    )
    artifacts: str | None = Field(
        None,
        description="A bucket, as s3://bucket/folder, that is shared in place of the data "
        "directory, which is then each machine's own; the store is that of WINNOW_S3_ENDPOINT.",
    )
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port the API listens on.")
    require_keys: bool = Field(
        True,
        description="Ask every caller for an API key. Only `winnow serve` with its embedded "
        "servers on a loopback address turns this off.",
    )

    file_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Folders that file:// references may name, separated by ':'."
    )
    hub_endpoint: AnyHttpUrl = Field(
        AnyHttpUrl("https://huggingface.co"), description="Where hf:// references are resolved."
    )
    hub_token: SecretStr | None = Field(None, description="Token for private hub repositories.")

    https_datasets: bool = Field(
        True, description="Take https:// references to datasets: from public addresses only."
    )
    fetch_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = Field(
        (),
        description="Networks that https:// references and a hub's redirects may lead to although "
        "they are not public, separated by ','.",
    )
    fetch_ca_file: Path | None = Field(
        None,
        description="Certificates (PEM) that servers of https:// references are checked against, "
        "in place of the public ones.",
    )
    s3_roots: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Buckets that s3:// references may name, or folders in them, as bucket or "
        "bucket/folder, separated by ','.",
    )
    s3_endpoint: AnyHttpUrl | None = Field(
        None, description="The object store that s3:// means; Amazon's when unset."
    )
    s3_region: str | None = Field(None, description="The region of its buckets.")
    s3_access_key: SecretStr | None = Field(
        None,
        description="Who the workers are to the store; when unset, what boto3 finds (a role).",
    )
    s3_secret_key: SecretStr | None = Field(None, description="The access key's secret.")

    max_upload_bytes: int = Field(2 * 1024**3, gt=0, description="Largest dataset upload.")
    max_body_bytes: int = Field(1024**2, gt=0, description="Largest JSON body.")
    max_rows: int = Field(2_000_000, gt=0, description="Most rows in one dataset.")
    max_text_chars: int = Field(100_000, gt=0, description="Longest text in a dataset.")
    max_concurrent_uploads: int = Field(
        8, gt=0, description="Uploads that one API process takes at once; a tenant may have half."
    )
    slow_client_seconds: float = Field(
        30,
        gt=0,
        description="How long a client may take for the head of a request, for the next part of "
        "its body, or to take some of an answer.",
    )
    min_body_rate: int = Field(
        10_000,
        gt=0,
        description="Bytes a second that a body must come with, after the first "
        "WINNOW_SLOW_CLIENT_SECONDS.",
    )

    requests_per_minute: int = Field(
        0, ge=0, description="How often a key may call; 0 for no limit."
    )
    max_open_audits: int = Field(
        0, ge=0, description="Audits of a tenant that have not ended; 0 for no limit."
    )
    max_dataset_rows: int = Field(
        0, ge=0, description="Rows of all uploads of a tenant; 0 for no limit."
    )
    max_dataset_bytes: int = Field(
        0, ge=0, description="Bytes of all uploads of a tenant; 0 for no limit."
    )
    worker_minutes_per_day: int = Field(
        0,
        ge=0,
        description="Minutes of workers that a tenant may use on a day (UTC) before no more audits "
        "are taken; 0 for no limit.",
    )
    trail_days: float = Field(
        365, ge=0, description="How long it is kept who did what; 0 for ever."
    )

    lease_seconds: float = Field(60, gt=0, description="A worker's hold on a unit of work.")
    heartbeat_seconds: float = Field(3, gt=0, description="How often a worker renews its hold.")
    stall_seconds: float = Field(
        120, gt=0, description="Without progress for this long, a worker's hold is not renewed."
    )
    reconcile_seconds: float = Field(15, gt=0, description="How often lost work is offered again.")
    leftover_seconds: float = Field(
        3600,
        gt=0,
        description="Files that a killed process left are removed after this long; longer than any "
        "upload or stage goes without writing.",
    )
    straggler_seconds: float = Field(
        10,
        ge=0,
        description="A shard that takes twice as long as the others of its stage did, and longer "
        "than this, is given to an idle worker too; 0 for never.",
    )
    max_attempts: int = Field(3, ge=1, description="Tries of one unit before its audit fails.")
    worker_stale_seconds: float = Field(
        60, gt=0, description="A worker that was silent for this long counts as gone."
    )

    shard_seconds: float = Field(
        45,
        gt=0,
        description="How long a shard of an audit shall take, at the speed that is measured.",
    )
    samples_per_shard: int = Field(
        0,
        ge=0,
        description="Training samples in one shard; 0 for as many as WINNOW_SHARD_SECONDS is for.",
    )
    tokens_per_batch: int = Field(
        0,
        ge=0,
        description="Padded tokens in one gradient batch, halved when memory is short; 0 for 1,024 "
        "on a CPU, where more no longer fit into its caches, and 4,096 on a GPU.",
    )
    max_gradient_cache_bytes: int = Field(
        20 * 1024**3,
        ge=0,
        description="Disk that one audit's per-sample gradients may take between the passes of "
        "an estimator that needs several; beyond it they are computed again.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where workers compute; auto is CUDA where there is one."
    )
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="Where a worker puts a model: none is all on its device; auto spreads models "
        "that are too large over all its GPUs, then memory, then the disk.",
    )
    torch_threads: int = Field(
        0, ge=0, description="CPU threads of a worker; 0 leaves it to torch."
    )
    influence_days: float = Field(
        30,
        ge=0,
        description="How long after an audit's end its influence files are kept, for further "
        "rankings; 0 is as long as the audit.",
    )
    audit_days: float = Field(
        0,
        ge=0,
        description="How long after its end an audit is kept with its results; 0 is until "
        "somebody deletes it. Audits of an experiment go when the last of them is as old.",
    )
    checkpoint_steps: int = Field(50, ge=1, description="Fine-tuning steps between checkpoints.")
    webhook_plain_http: bool = Field(
        False, description="Let webhooks have addresses with http://, without encryption."
    )
    webhook_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = Field(
        (),
        description="Networks that webhooks may call although they are not public, separated by "
        "','; for receivers in house.",
    )
    webhook_ca_file: Path | None = Field(
        None,
        description="Certificates (PEM) that receivers of webhooks are checked against, in place "
        "of the public ones; for receivers in house.",
    )
    webhook_retry_seconds: float = Field(
        8,
        gt=0,
        description="Pause before a webhook's second try; each further one is 4.5 times as long.",
    )
    metrics_token: SecretStr | None = Field(
        None,
        description="Bearer token that /metrics asks for; without one it answers callers on its "
        "own machine alone.",
    )
    log_format: Literal["json", "console"] = Field("json", description="How log lines look.")

    @field_validator("file_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(Path(part) for part in value.split(os.pathsep) if part)
        return value

    @field_validator("webhook_networks", "fetch_networks", "s3_roots", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("s3_roots", mode="after")
    @classmethod
    def _plain_roots(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(root.removeprefix("s3://").rstrip("/") for root in value)

    @field_validator("artifacts", mode="after")
    @classmethod
    def _bucket(cls, value: str | None) -> str | None:
        if not value:
            return None
        scheme, _, place = value.partition("://")
        if scheme != "s3" or not place.strip("/"):
            raise ValueError("is a bucket, as s3://bucket or s3://bucket/folder")
        return place.strip("/")

    @field_validator("data_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.absolute()

    @model_validator(mode="after")
    def _files_are_nobodys(self) -> Self:
        """Refuse a bucket for files that callers could read: all tenants' are in it."""
        place = f"{self.artifacts}/"
        for root in self.s3_roots if self.artifacts else ():
            if place.startswith(f"{root}/") or f"{root}/".startswith(place):
                raise ValueError(f"WINNOW_ARTIFACTS and {root} of WINNOW_S3_ROOTS overlap")
        return self

    def require_database_url(self) -> str:
        """Return the database's address in SQLAlchemy's form.

        Raises:
            MissingSetting: WINNOW_DATABASE_URL is not set.
        """
        if self.database_url is None:
            raise MissingSetting(
                "WINNOW_DATABASE_URL is not set. Set it to a PostgreSQL address "
                "(postgresql://user:password@host/database), or use `winnow serve`, "
                "which starts its own server."
            )
        url = self.database_url.get_secret_value()
        scheme, _, rest = url.partition("://")
        return f"postgresql+psycopg://{rest}" if scheme in {"postgres", "postgresql"} else url

    def require_broker_url(self) -> str:
        """Return the broker's address.

        Raises:
            MissingSetting: WINNOW_BROKER_URL is not set.
        """
        if self.broker_url is None:
            raise MissingSetting(
                "WINNOW_BROKER_URL is not set. Set it to a Redis or Valkey address "
                "(redis://host:6379/0), or use `winnow serve`, which starts its own server."
            )
        return self.broker_url.get_secret_value()


class MissingSetting(Exception):
    """A setting that this command needs is absent."""


@lru_cache
def get_settings() -> Settings:
    """Return the settings of this process, read from the environment once."""
    return Settings()
