"""Whatever is killed, frozen or lost: every accepted piece of work ends once, to the same byte.

`pytest tests/chaos` injects a few faults, `make chaos` many.
"""

import random
import threading

import pytest

from tests.chaos import oracle
from tests.chaos.conftest import DEFAULT_FAULTS, Site
from tests.chaos.programme import Outcome, Programme
from tests.chaos.saboteur import Saboteur

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(7200)]

FAULTS_PER_ROUND = 6


def test_faults_of_every_kind_change_nothing(
    site: Site, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    num_faults = request.config.getoption("--chaos-faults", default=DEFAULT_FAULTS)
    seed = request.config.getoption("--chaos-seed", default=0)
    chance = random.Random(seed)
    saboteur = Saboteur(site.cluster, seed=seed)
    proxy = site.cluster.proxy
    outcomes: list[Outcome] = []
    with capsys.disabled():
        while saboteur.num_injected < num_faults:
            before = saboteur.num_injected
            # about every other round loses 30 % of the messages, and sends the rest three times
            proxy.drop, proxy.copies = chance.choice([(0.0, 1), (0.3, 3)])
            stop = threading.Event()
            orders = saboteur.arm()
            left = min(FAULTS_PER_ROUND, num_faults - before)
            thread = saboteur.work(stop, num_faults=left)
            programme = Programme(site.cluster)
            try:
                programme.begin()
                outcome = programme.end()
            finally:
                stop.set()
                thread.join()
                saboteur.disarm(orders)
            proxy.drop, proxy.copies = 0.0, 1
            injected = saboteur.num_injected - before
            oracle.check(site.cluster, outcome, site.quiet, num_faults=injected)
            outcomes.append(outcome)
            print(f"round {len(outcomes)}: {saboteur.num_injected} faults", flush=True)
        for outcome in outcomes:
            oracle.check_messages(site.cluster, outcome, site.receiver)
        print(f"\n{saboteur.num_injected} faults in {len(outcomes)} rounds, 0 lost, 0 duplicated:")
        for name, number in sorted(saboteur.counts.items()):
            print(f"  {number:4d} × {name}")
        for name, number in sorted(proxy.counts.items()):
            print(f"  {number:4d} × message {name}")
    assert saboteur.counts["failed to inject"] == 0
