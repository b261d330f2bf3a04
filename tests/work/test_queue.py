"""What the queue's settings promise."""

from celery import Celery


def test_a_child_has_time_to_import_what_it_needs_on_a_busy_machine(celery: Celery) -> None:
    """Celery waits 4 s for it, then kills it and starts the next, which is no quicker."""
    assert celery.conf.worker_proc_alive_timeout >= 60
