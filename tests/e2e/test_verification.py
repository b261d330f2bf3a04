"""A verification as a pipeline asks for it: submit with a test set, and read what it changes."""

from typing import Any

import pytest

from tests.e2e.conftest import Reviews, Service

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("service"), pytest.mark.timeout(600)]


def test_an_audit_says_what_filtering_changes(
    service: Service, reviews: Reviews, request_body: dict[str, Any]
) -> None:
    changes = {
        "test": {"reference": service.upload(reviews.test_csv)},
        "estimators": ["grad_cosine"],
        "ranking": {"estimator": "grad_cosine"},
        "verify": {"seeds": [0, 1], "arms": ["filtered", "full"], "fraction": 0.2},
    }
    audit = service.finish(service.submit(**request_body | changes))
    assert audit["state"] == "succeeded", audit
    assert {"verify", "conclude"} <= audit["timings"].keys()
    found = audit["results"]["verification"]
    assert found["num_test"] == 40
    filtered, full = found["arms"]
    assert (filtered["name"], filtered["num_train"], filtered["num_removed"]) == (
        *("filtered", 160),
        40,
    )
    assert full["against_full"] is None
    for metric in ("accuracy", "macro_f1", "loss"):
        values = [arm["metrics"][metric] for arm in (filtered, full)]
        assert all(len(value["values"]) == 2 for value in values)
        difference = filtered["against_full"][metric]
        assert difference["low"] <= difference["difference"] <= difference["high"]
        assert difference["difference"] == pytest.approx(values[0]["mean"] - values[1]["mean"])
