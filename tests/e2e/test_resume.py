"""Nothing accepted is lost: kills and restarts change neither the end nor a byte of the result."""

import signal
from typing import Any

import pytest

from tests.e2e.conftest import Service

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("service"), pytest.mark.timeout(600)]


def _sha256(audit: dict[str, Any]) -> str:
    assert audit["state"] == "succeeded", audit
    return str(audit["results"]["files"]["parquet"]["sha256"])


def test_an_audit_survives_kill_9_and_a_restart_to_the_byte(
    service: Service, request_body: dict[str, Any]
) -> None:
    """Killed in fine-tuning and between shards, then stopped and started with the whole service."""
    request_body["fine_tune"]["epochs"] = 2
    quiet = service.finish(service.submit(**request_body))

    audit_id = service.submit(**request_body)
    service.reach(audit_id, "fine_tune")
    checkpoint = service.data_dir / "audits" / audit_id / "fine_tune" / "checkpoint.safetensors"
    service.wait_for(checkpoint.exists, seconds=60)
    service.kill_worker()
    service.reach(audit_id, "gradients", seconds=240)
    facts = service.data_dir / "audits" / audit_id / "facts"
    service.wait_for(lambda: any(facts.glob("0*.safetensors")), seconds=60)
    service.kill_worker()
    disturbed = service.finish(audit_id)
    assert _sha256(disturbed) == _sha256(quiet)

    audit_id = service.submit(**request_body)
    service.reach(audit_id, "fine_tune")
    assert service.stop(signal.SIGTERM) == 0, service.tail()
    service.start()
    assert _sha256(service.finish(audit_id)) == _sha256(quiet)
