"""A worker's hold on its unit of work: renewed by a thread, watched by the work itself.

The work calls `tick` at every batch. The thread renews the lease while ticks come; when the lease
is lost, the audit is cancelled or the worker drains, the next tick raises and the work ends. A
work that no longer ticks loses its lease, and then its process, so that a hung worker never holds
a unit or a queue slot for ever (SERVICE.md, section 3).
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.settings import Settings
from app.work import repository as work
from app.work.claims import Claim, LeaseLost

log = structlog.get_logger()

HUNG_EXIT_CODE = 70
REPORTS_PER_HEARTBEAT = 3  # of all workers of an audit together: its row is one


class Stopped(Exception):
    """The unit must be left at once; subclasses say why."""


class CancelRequested(Stopped):
    """The audit is being cancelled."""


class Draining(Stopped):
    """This worker is being stopped; another one goes on."""


class HoldLost(Stopped):
    """Another worker has the unit, or its audit has ended."""


class Hold:
    """Keeps a claim alive while the work ticks; a context manager."""

    def __init__(self, engine: Engine, settings: Settings, claim: Claim) -> None:
        self._engine = engine
        self._settings = settings
        self._claim = claim
        self._over = threading.Event()
        self._is_draining = False
        self._stop_reason: type[Stopped] | None = None
        self._started = self._renewed_at = self._ticked_at = time.monotonic()
        self._done = 0
        self._total = 1
        self._first_done: int | None = None
        self._may_be_silent = False
        self._thread = threading.Thread(target=self._renew_until_over, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def tick(self, done: int, total: int) -> None:
        """Report progress in samples.

        Raises:
            Stopped: the work must end now.
        """
        if self._first_done is None or done < self._done:  # or another pass begins
            self._first_done, self._started = done, time.monotonic()
        self._report(done, total)

    def step(self, done: int, total: int) -> None:
        """Report progress that is not counted in samples, so that no speed is told.

        Raises:
            Stopped: the work must end now.
        """
        self._first_done = None
        self._report(done, total)

    def _report(self, done: int, total: int) -> None:
        self._ticked_at = time.monotonic()
        self._done, self._total = done, total
        if self._is_draining:
            raise Draining
        if self._stop_reason is not None:
            raise self._stop_reason

    def keep_alive(self) -> None:
        """Tick without progress.

        Raises:
            Stopped: the work must end now.
        """
        self._report(self._done, self._total)

    def drain(self) -> None:
        """Let the next tick raise Draining; safe in a signal handler."""
        self._is_draining = True

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Allow a step that cannot tick, such as a download, to take as long as it takes."""
        self._may_be_silent = True
        try:
            yield
        finally:
            self._ticked_at = time.monotonic()
            self._may_be_silent = False

    def _samples_per_second(self) -> float | None:
        elapsed = self._ticked_at - self._started
        if self._first_done is None or elapsed <= 0:
            return None
        return (self._done - self._first_done) / elapsed or None

    def _renew_until_over(self) -> None:
        while not self._over.wait(self._settings.heartbeat_seconds):
            now = time.monotonic()
            silent = now - self._ticked_at
            if silent > self._settings.stall_seconds and not self._may_be_silent:
                if now - self._renewed_at > self._settings.lease_seconds:
                    log.error("worker_hung", unit_id=self._claim.unit_id, silent_seconds=silent)
                    os._exit(HUNG_EXIT_CODE)
                continue
            if self._stop_reason is None:
                self._renew(now)

    def _renew(self, now: float) -> None:
        try:
            is_cancelled = work.renew(
                self._engine,
                self._claim,
                lease_seconds=self._settings.lease_seconds,
                done=self._done,
                total=self._total,
                samples_per_second=self._samples_per_second(),
                report_seconds=self._settings.heartbeat_seconds / REPORTS_PER_HEARTBEAT,
            )
        except LeaseLost:
            self._stop_reason = HoldLost
        except SQLAlchemyError as error:
            log.warning("lease_not_renewed", unit_id=self._claim.unit_id, error=str(error))
            if now - self._renewed_at > self._settings.lease_seconds:
                self._stop_reason = HoldLost
        else:
            self._renewed_at = now
            if is_cancelled:
                self._stop_reason = CancelRequested
