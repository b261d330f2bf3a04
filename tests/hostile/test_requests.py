"""No request, however odd, gets an answer that is not documented, or an error without a reason."""

import logging
from collections.abc import Iterator

import pytest
import structlog
from sqlalchemy import Engine

from app.settings import Settings
from tests.app.conftest import api, client, new_client
from tests.hostile.requests import ask_service

__all__ = ["api", "client", "new_client"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A traceback of every failure would fill the screen; the findings name the requests."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.mark.timeout(600)
def test_requests_from_the_document_get_the_answers_of_the_document(
    settings: Settings, engine: Engine
) -> None:
    """Some five hundred; `python -m tests.hostile.requests` makes more than ten thousand."""
    findings = ask_service(engine, settings, max_examples=6, coverage=False)
    assert not findings.failures, str(findings)
    assert findings.total > 300
    assert len(findings.operations) >= 53
    assert findings.num_requests["stateful_testing"] > 0
