"""The table of API keys."""

from datetime import datetime

from sqlalchemy import ARRAY, Index, LargeBinary, String, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class ApiKey(Base):
    """A caller's key: only its SHA-256 is kept.

    Attributes:
        scopes: what it may do; None for all there is.
        requests_per_minute: how often it may call; None for what its tenant may, 0 for no limit.
        previous_sha256: of the secret before the last rotation, which opens until
            `previous_until`.
    """

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    name: Mapped[str]
    sha256: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    scopes: Mapped[list[str] | None] = mapped_column(ARRAY(String))
    requests_per_minute: Mapped[int | None]
    previous_sha256: Mapped[bytes | None] = mapped_column(LargeBinary)
    previous_until: Mapped[datetime | None]

    __table_args__ = (Index("ix_api_keys_previous_sha256", "previous_sha256", unique=True),)
