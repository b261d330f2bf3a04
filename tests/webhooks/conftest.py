"""A receiver in house, and settings that let it be called."""

from collections.abc import Iterator

import pytest
from pydantic import TypeAdapter
from pydantic.networks import IPvAnyNetwork

from app.settings import Settings
from tests.app.conftest import api, client, new_client
from tests.webhooks.receiver import Receiver, receiving

__all__ = ["api", "client", "new_client"]


def networks(*names: str) -> tuple[IPvAnyNetwork, ...]:
    """Return networks as settings have them."""
    return TypeAdapter(tuple[IPvAnyNetwork, ...]).validate_python(names)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Settings of an operator who lets loopback be called."""
    update = {"webhook_plain_http": True, "webhook_networks": networks("127.0.0.0/8")}
    return settings.model_copy(update={**update, "webhook_retry_seconds": 0.01})


@pytest.fixture
def strict(settings: Settings) -> Settings:
    """Settings of one who allows plain http, but nothing that is not public."""
    return settings.model_copy(update={"webhook_networks": ()})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver
