"""Tell many listeners of changes in the database by one question every half second.

Listeners wait in the event loop: they hold neither a connection nor a thread. One poller for each
process reads the versions of all that is watched, and only while somebody listens. LISTEN and
NOTIFY would save the question, but hold a connection for good, make every heartbeat of a worker
take the one lock that orders notifications, and get lost in poolers of connections.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

import structlog
from anyio import CapacityLimiter, to_thread
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.live.snapshots import Snapshot, Thing, read_snapshots

POLL_SECONDS = 0.5

log = structlog.get_logger()


class _Topic:
    """What is known of a watched thing, for all who listen."""

    def __init__(self) -> None:
        self.num_listeners = 0
        self.latest: Snapshot | None = None
        self.is_over = False
        self._changed = asyncio.Event()

    def tell(self, snapshot: Snapshot | None) -> None:
        """Let the listeners know where the thing stands; None if it is gone."""
        if snapshot is None:
            self.end()
        elif self.latest is None or snapshot.version != self.latest.version:
            self.latest = snapshot
            self._wake()

    def end(self) -> None:
        """Let the listeners go."""
        self.is_over = True
        self._wake()

    async def change(self) -> None:
        """Wait until something is told."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Watcher:
    """Watches rows for the listeners of this process; use it in one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._topics: dict[Thing, _Topic] = {}
        self._poller: asyncio.Task[None] | None = None
        self._is_new = asyncio.Event()
        self._is_closed = False
        # its own thread: callers that wait for a connection must not hold up the poller
        self._limiter = CapacityLimiter(1)

    @property
    def num_watched(self) -> int:
        """How many things somebody listens to."""
        return len(self._topics)

    async def snapshots(self, thing: Thing) -> AsyncGenerator[Snapshot]:
        """Yield where a thing stands, now and at every change seen, until it is gone."""
        if self._is_closed:
            return
        topic = self._topics.setdefault(thing, _Topic())
        topic.num_listeners += 1
        self._poll_from_now_on()
        seen: Snapshot | None = None
        try:
            while not topic.is_over:
                if topic.latest is None or topic.latest is seen:
                    await topic.change()
                else:
                    seen = topic.latest
                    yield seen
        finally:
            topic.num_listeners -= 1
            if not topic.num_listeners and self._topics.get(thing) is topic:
                del self._topics[thing]

    async def wait(
        self, thing: Thing, is_enough: Callable[[Snapshot], bool], *, seconds: float
    ) -> None:
        """Return when a thing stands as it should, when it is gone, or after some seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), aclosing(self.snapshots(thing)) as snapshots:
                async for snapshot in snapshots:
                    if is_enough(snapshot):
                        return

    def close(self) -> None:
        """Let all listeners go, and take no more: the process is about to end."""
        self._is_closed = True
        self._end_topics()

    def _end_topics(self) -> None:
        for topic in self._topics.values():
            topic.end()
        self._topics.clear()

    def _poll_from_now_on(self) -> None:
        if self._poller is None:
            self._is_new = asyncio.Event()
            self._poller = asyncio.create_task(self._poll(), name="watcher")
        self._is_new.set()

    async def _poll(self) -> None:
        try:
            while self._topics:
                self._is_new.clear()
                await self._look()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._is_new.wait(), POLL_SECONDS)
        finally:
            self._poller = None
            self._end_topics()  # there are some only where it broke; nobody shall wait for ever

    async def _look(self) -> None:
        topics = dict(self._topics)
        try:
            found = await to_thread.run_sync(
                read_snapshots, self._engine, list(topics), limiter=self._limiter
            )
        except SQLAlchemyError as error:
            # The database may be restarting; the next look finds everything still there.
            log.warning("watching_failed", error=str(error))
            return
        for thing, topic in topics.items():
            topic.tell(found.get(thing))
