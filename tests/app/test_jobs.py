"""The queue's settings that promises hang on."""

from pathlib import Path

import pytest
from pydantic import SecretStr
from redis.exceptions import RedisError

from app.jobs import MAX_PAUSE, make_celery
from app.settings import Settings


class Enough(Exception):
    """The broker was looked for often enough."""


def test_a_broker_that_is_away_for_long_is_looked_for_every_few_seconds(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the worker's consumer does; by default the pause grows to half a minute."""
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda _: None)
    nobody = SecretStr(f"redis+socket://{tmp_path}/nobody.sock")
    celery = make_celery(settings.model_copy(update={"broker_url": nobody}))
    pauses: list[float] = []

    def tell(_error: Exception, pause: float) -> None:
        pauses.append(pause)
        if len(pauses) == 30:
            raise Enough

    with pytest.raises((Enough, RedisError)), celery.connection_for_read() as connection:
        connection.ensure_connection(tell, None)
    assert len(pauses) == 30
    assert max(pauses) == MAX_PAUSE


def test_a_child_has_time_to_start_on_a_busy_machine(settings: Settings) -> None:
    """It imports the service first; within Celery's 4 s it never did where others worked too."""
    assert make_celery(settings).conf.worker_proc_alive_timeout >= 60
