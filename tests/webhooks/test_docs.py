"""The receiver that docs/webhooks.md shows works."""

import re
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import WebhookVerificationError

from app.settings import Settings
from app.webhooks.models import EventType
from tests.webhooks.receiver import Receiver
from tests.webhooks.test_calls import PAYLOAD, SECRET, call

TEXT = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text(encoding="utf-8")


def test_the_shown_receiver_takes_a_message_once_and_forgeries_never(
    settings: Settings, receiver: Receiver
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    shown: dict[str, Any] = {}
    exec(snippet, shown)
    call(settings, receiver.url)
    (came,) = receiver.received
    with pytest.raises(WebhookVerificationError):
        shown["receive"](came.body + b" ", came.headers, SECRET)
    assert shown["receive"](came.body, came.headers, SECRET) == PAYLOAD
    assert shown["receive"](came.body, came.headers, SECRET) is None


def test_every_event_is_named() -> None:
    for event in EventType:
        assert f"`{event.value}`" in TEXT
