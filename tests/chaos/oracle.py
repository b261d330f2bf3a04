"""What must hold after every fault, whatever it was."""

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil

from app.failpoints import VARIABLE
from app.work.leftovers import TEMPORARY
from tests.chaos.cluster import Cluster
from tests.chaos.programme import Outcome
from tests.webhooks.receiver import Receiver

MAX_ATTEMPTS = 3
QUIET_SECONDS = 90.0


def check(cluster: Cluster, outcome: Outcome, quiet: Outcome, *, num_faults: int) -> None:
    """Compare one run of the programme with the quiet one, and look for what it left.

    Raises:
        AssertionError: a promise is broken.
    """
    assert outcome.results == quiet.results, different(outcome.results, quiet.results)
    assert outcome.files == quiet.files, set(outcome.files) ^ set(quiet.files)
    _check_units(cluster, outcome, num_faults)
    _check_rows(cluster, outcome)
    _eventually(lambda: temporary_files(cluster), "temporary files are left")
    _eventually(lambda: _unknown_uploads(cluster), "uploads without a row are left")
    _eventually(lambda: _orphans(cluster), "processes are left")


def different(found: object, wanted: object, place: str = "") -> list[str]:
    """Return where two answers differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [
            line
            for key in keys
            for line in different(found.get(key), wanted.get(key), f"{place}/{key}")
        ]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [line for number, (a, b) in pairs for line in different(a, b, f"{place}/{number}")]
    return [] if found == wanted else [f"{place}: {str(found)[:200]} is not {str(wanted)[:200]}"]


def _check_units(cluster: Cluster, outcome: Outcome, num_faults: int) -> None:
    """Every unit is done, once, and hardly any of them again."""
    units = cluster.query(
        "SELECT u.stage, u.position, u.state, u.attempts FROM work_units u"
        " JOIN audits a ON a.id = u.audit_id WHERE a.id = :audit OR a.experiment_id = :experiment",
        audit=outcome.ids["audit"],
        experiment=outcome.ids["experiment"],
    )
    assert {unit.state for unit in units} == {"done"}, units
    assert all(1 <= unit.attempts <= MAX_ATTEMPTS for unit in units), units
    # a fault meets at most the unit at hand of each of the two workers
    again = sum(unit.attempts - 1 for unit in units)
    assert again <= 2 * num_faults, (again, num_faults, units)


def _check_rows(cluster: Cluster, outcome: Outcome) -> None:
    counts = cluster.query(
        "SELECT (SELECT count(*) FROM training_samples WHERE audit_id = :audit),"
        " (SELECT count(*) FROM rankings WHERE audit_id = :audit),"
        " (SELECT count(*) FROM ranked_samples s JOIN rankings r ON r.id = s.ranking_id"
        "   WHERE r.audit_id = :audit),"
        " (SELECT count(*) FROM audits WHERE experiment_id = :experiment),"
        " (SELECT count(*) FROM audits WHERE finished_at IS NULL),"
        " (SELECT count(*) FROM rankings WHERE finished_at IS NULL)",
        audit=outcome.ids["audit"],
        experiment=outcome.ids["experiment"],
    )
    assert tuple(counts[0]) == (60, 2, 120, 2, 0, 0)


def check_messages(cluster: Cluster, outcome: Outcome, receiver: Receiver) -> None:
    """Each end is owed one message, which has come, under one id however often.

    A message whose sender was killed is sent again after a minute; so this is looked at last.
    """
    statement = (
        "SELECT d.id, d.type, d.state FROM webhook_deliveries d LEFT JOIN audits a"
        " ON a.id = d.payload->'data'->>'id' WHERE d.payload->'data'->>'id'"
        " IN (:audit, :experiment, :ranking) OR a.experiment_id = :experiment"
    )
    ids = {name: outcome.ids[name] for name in ("audit", "experiment", "ranking")}

    def unsent() -> list[object]:
        return [row for row in cluster.query(statement, **ids) if row.state != "succeeded"]

    _eventually(unsent, "messages are not delivered")
    owed = cluster.query(statement, **ids)
    assert Counter(row.type for row in owed) == {
        "audit.succeeded": 3,
        "ranking.succeeded": 1,
        "experiment.done": 1,
    }
    assert {row.id for row in owed} <= {request.id for request in receiver.received}


def temporary_files(cluster: Cluster) -> list[str]:
    """Return what stands under a temporary name."""
    return [str(path) for path in cluster.data_dir.rglob(TEMPORARY)]


def _unknown_uploads(cluster: Cluster) -> set[str]:
    there = {path.name for path in (cluster.data_dir / "datasets").iterdir()}
    return there - {row.id for row in cluster.query("SELECT id FROM datasets")}


def _orphans(cluster: Cluster) -> list[str]:
    """Return the processes of this service that none of its members has started."""
    known = {os.getpid()}
    for member in cluster.members:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(member.process.pid)
            known |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    orphans = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_ours = process.environ().get(VARIABLE) == str(cluster.failpoints)
            if is_ours and process.pid not in known and process.status() != psutil.STATUS_ZOMBIE:
                orphans.append(f"{process.pid} {process.cmdline()}")
    return orphans


def _eventually(found: Callable[[], object], what: str) -> None:
    """Wait until nothing is found any more."""
    end = time.monotonic() + QUIET_SECONDS
    while left := found():
        assert time.monotonic() < end, f"{what}: {left}"
        time.sleep(0.2)
