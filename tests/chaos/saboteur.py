"""Injects faults while the service works, and keeps count."""

import random
import threading
import traceback
from collections import Counter
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from tests.chaos.cluster import Cluster
from tests.chaos.faults import FAULTS, WAITING, Fault, NotNow
from tests.chaos.oracle import MAX_ATTEMPTS

PAUSE = (0.0, 1.5)
WAITING_AT_ONCE = 2


class Saboteur:
    """Hits a service with a number of faults, in an order that a seed decides.

    Attributes:
        counts: how often each kind was injected.
    """

    def __init__(self, cluster: Cluster, *, seed: int) -> None:
        self._cluster = cluster
        self._random = random.Random(seed)
        self._kinds: list[Fault] = []
        self._points: list[tuple[str, str]] = []
        self._armed: dict[Path, str] = {}
        self.counts: Counter[str] = Counter()

    @property
    def num_injected(self) -> int:
        return sum(self.counts.values())

    def arm(self) -> dict[Path, str]:
        """Leave orders at points that a request of the programme comes to."""
        orders = {}
        for _ in range(WAITING_AT_ONCE):
            if not self._points:
                self._points = self._random.sample(WAITING, len(WAITING))
            point, action = self._points.pop()
            orders[self._cluster.order(point, action)] = f"{action} at {point}"
        self._armed = orders
        return orders

    def disarm(self, orders: dict[Path, str]) -> None:
        """Count the orders that were carried out, and take the others back."""
        for order, name in orders.items():
            if self._cluster.taken_by(order) is not None:
                self.counts[name] += 1
            order.unlink(missing_ok=True)

    def work(self, stop: threading.Event, *, num_faults: int) -> threading.Thread:
        """Inject faults one after the other, in the background, until told to stop."""

        def run() -> None:
            end = self.num_injected + num_faults
            while self.num_injected < end and not stop.is_set():
                try:
                    self._inject_next(stop)
                except Exception:  # noqa: BLE001  the test goes on, and the report tells
                    self.counts["failed to inject"] += 1
                    traceback.print_exc()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def _inject_next(self, stop: threading.Event) -> None:
        if not self._kinds:
            self._kinds = self._random.sample(FAULTS, len(FAULTS))
        fault = self._kinds.pop()
        stop.wait(self._random.uniform(*PAUSE))
        while not stop.is_set() and not self._may_hit():
            stop.wait(0.1)
        if stop.is_set():
            self._kinds.append(fault)
            return
        try:
            fault.inject(self._cluster, self._random)
        except NotNow:
            self._kinds.insert(0, fault)
        else:
            self.counts[fault.name] += 1
            print(fault.name, flush=True)

    def _may_hit(self) -> bool:
        """Tell whether some unit is open, and each has a try left after this fault and the armed.

        A unit may be tried three times; what the faults test is not that a fourth is refused.
        """
        try:
            stages = self._cluster.query(
                "SELECT stage, max(attempts) AS attempts FROM work_units"
                " WHERE state IN ('ready', 'running') GROUP BY stage"
            )
        except SQLAlchemyError:
            return False
        armed = [str(order) for order in self._armed if order.exists()]
        return bool(stages) and all(
            row.attempts + sum(f"@{row.stage}:" in order for order in armed) < MAX_ATTEMPTS - 1
            for row in stages
        )
