"""How often a key may call: counted in the broker for all processes, or else in this one."""

import math
import threading
import time
from dataclasses import dataclass

import structlog
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage, Storage
from limits.strategies import MovingWindowRateLimiter
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

PATIENCE_SECONDS = 0.5  # a caller waits for it, so a slow broker is as good as none
APART_SECONDS = 10.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Rate:
    """Where a key stands after a call.

    Attributes:
        is_over: whether the call is one too many.
        limit: calls a minute.
        remaining: calls that may still come at once.
        seconds: until the oldest call of the last minute counts no more; at least 1.
    """

    is_over: bool
    limit: int
    remaining: int
    seconds: int

    @property
    def headers(self) -> dict[str, str]:
        """The fields of draft-ietf-httpapi-ratelimit-headers."""
        return {
            "RateLimit-Policy": f'"requests";q={self.limit};w=60',
            "RateLimit": f'"requests";r={self.remaining};t={self.seconds}',
        }


class Rates:
    """Counts calls, over the minute before each.

    Without the broker every process counts by itself, so that a key may call as often of each of
    them: a limit that is too wide for a while is better than an API that is down.
    """

    def __init__(self, broker_url: str) -> None:
        self._broker_url = broker_url
        self._lock = threading.Lock()
        self._shared: MovingWindowRateLimiter | None = None
        self._own = MovingWindowRateLimiter(MemoryStorage())
        self._apart_until = 0.0

    def count(self, name: str, per_minute: int) -> Rate:
        """Count a call of a key and return where the key stands."""
        if time.monotonic() >= self._apart_until:
            try:
                return _count(self._in_broker(), name, per_minute)
            except (RedisError, OSError) as error:
                self._apart_until = time.monotonic() + APART_SECONDS
                log.warning("rates_counted_apart", error=str(error))
        return _count(self._own, name, per_minute)

    def _in_broker(self) -> MovingWindowRateLimiter:
        with self._lock:
            if self._shared is None:
                self._shared = MovingWindowRateLimiter(_storage(self._broker_url))
            return self._shared


def _storage(broker_url: str) -> Storage:
    url = broker_url.replace("redis+socket://", "redis+unix://", 1)  # kombu's word for it
    return RedisStorage(
        url,
        key_prefix="winnow-rates",
        socket_timeout=PATIENCE_SECONDS,
        socket_connect_timeout=PATIENCE_SECONDS,
        retry=Retry(NoBackoff(), 0),  # type: ignore[arg-type]  # handed on to redis as it is
    )


def _count(limiter: MovingWindowRateLimiter, name: str, per_minute: int) -> Rate:
    item = RateLimitItemPerMinute(per_minute)
    is_within = limiter.hit(item, name)
    stats = limiter.get_window_stats(item, name)
    return Rate(
        is_over=not is_within,
        limit=per_minute,
        remaining=stats.remaining,
        seconds=max(1, math.ceil(stats.reset_time - time.time())),
    )
