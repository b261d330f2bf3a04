"""How many uploads a process takes at once: each holds a file on disk and a thread."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import Busy, QuotaExceeded

RETRY_SECONDS = 5


class UploadSlots:
    """Places for uploads; one tenant may have half of them, so that others have some left."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._share = max(1, count // 2)
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, tenant: str) -> Iterator[None]:
        """Hold a place.

        Raises:
            QuotaExceeded: the tenant has its share.
            Busy: all places are taken.
        """
        with self._lock:
            self._check(tenant)
            self._taken[tenant] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[tenant] -= 1
                self._taken += Counter()  # forget tenants that have none

    def _check(self, tenant: str) -> None:
        headers = {"Retry-After": str(RETRY_SECONDS)}
        if self._taken[tenant] >= self._share:
            raise QuotaExceeded(
                f"{self._share} uploads of yours are on their way, the most that may be at once: "
                "half of WINNOW_MAX_CONCURRENT_UPLOADS. Send this one when one of them is done.",
                quota="max_concurrent_uploads",
                limit=self._share,
                used=self._taken[tenant],
                headers=headers,
            )
        if self._taken.total() >= self._count:
            raise Busy(
                f"{self._count} uploads are on their way, the most that this server takes at once "
                "(WINNOW_MAX_CONCURRENT_UPLOADS). Try again in a few seconds.",
                headers=headers,
            )
