"""Sends what webhooks are owed, from every API process, each message by one at a time."""

import threading

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.failpoints import reach
from app.settings import Settings
from app.webhooks.calls import Caller
from app.webhooks.deliveries import ClaimedDelivery, claim_due, give_back, record

LOOK_SECONDS = 1.0
MAX_AT_ONCE = 4

log = structlog.get_logger()


class WebhookSender(threading.Thread):
    """Looks for deliveries that are due and sends a few at once, until stopped."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        super().__init__(name="webhooks", daemon=True)
        self._engine = engine
        self._settings = settings
        self._caller = Caller(settings)
        self._stopped = threading.Event()
        self._calls: list[threading.Thread] = []

    def run(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            try:
                self._look()
            except SQLAlchemyError as error:
                # The database may be restarting; what is owed is still there at the next look.
                log.warning("webhooks_not_looked_for", error=str(error))

    def _look(self) -> None:
        self._calls = [call for call in self._calls if call.is_alive()]
        free = MAX_AT_ONCE - len(self._calls)
        for claimed in claim_due(self._engine, limit=free) if free else []:
            # daemons: a lookup of a name cannot be broken off, and must not hold up the end
            call = threading.Thread(target=self._send, args=(claimed,), daemon=True)
            call.start()
            self._calls.append(call)

    def _send(self, claimed: ClaimedDelivery) -> None:
        try:
            reach("webhook.claimed")
            outcome = self._caller.call(claimed.call)
            reach("webhook.called")
            if outcome.error is not None and self._caller.is_stopped:
                give_back(self._engine, claimed)
            else:
                pause = self._settings.webhook_retry_seconds
                record(self._engine, claimed, outcome, retry_seconds=pause)
        except SQLAlchemyError as error:
            # It is sent again when the lease is over, under the same id.
            log.warning("webhook_not_noted", delivery_id=claimed.delivery_id, error=str(error))

    def stop(self) -> None:
        """End the thread and its calls; what was broken off is sent after the next start."""
        self._stopped.set()
        self._caller.stop()
        self.join(timeout=5)
        for call in self._calls:
            call.join(timeout=1)
