"""What `winnow doctor` finds where the service is installed, on the real servers."""

from importlib import metadata
from pathlib import Path

import pytest
from sqlalchemy import Engine
from winnow.commands.findings import Finding

from app import doctor
from app.embedded import EmbeddedServers
from app.settings import Settings


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_servers_that_answer_and_workers_that_do_not(engine: Engine, settings: Settings) -> None:
    found = by_name(list(doctor.check_servers(settings)))
    assert {name: finding.status for name, finding in found.items()} == {
        "database": "ok",
        "broker": "ok",
        "workers": "fail",
    }
    assert "winnow worker" in found["workers"].detail


def test_servers_that_are_not_there() -> None:
    nowhere = {"database_url": "postgresql://nobody@127.0.0.1:1/x", "broker_url": None}
    found = by_name(list(doctor.check_servers(Settings.model_validate(nowhere))))
    assert {finding.status for finding in found.values()} == {"fail"}
    assert "Start PostgreSQL" in (found["database"].advice or "")
    assert "WINNOW_BROKER_URL" in found["broker"].detail


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_PORT", "high")
    found = by_name(list(doctor.look_around()))
    assert found["settings"].status == "fail"
    assert "WINNOW_PORT" in found["settings"].detail


def test_a_library_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_libraries().status == "ok"
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "celery" else real(name))
    finding = doctor.check_libraries()
    assert finding.status == "fail"
    assert "celery is 1.0" in finding.detail
    assert "pip install" in (finding.advice or "")


def test_a_cuda_that_is_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = doctor.check_gpu(Settings(device="cuda"))
    assert finding.status == "fail"
    assert "WINNOW_DEVICE=cpu" in (finding.advice or "")


def test_an_installation_without_torch_runs_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert doctor.check_gpu(Settings()).status == "warn"


def test_the_disk(
    servers: EmbeddedServers, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "none"
    assert doctor.check_disk(Settings(data_dir=missing)).status == "ok"
    shared = Settings(data_dir=missing, database_url=servers.database_url)
    assert doctor.check_disk(shared).status == "fail"
    monkeypatch.setattr(doctor, "ENOUGH_FREE_BYTES", 0)
    assert doctor.check_disk(settings).status == "ok"
    monkeypatch.setattr(doctor, "ENOUGH_FREE_BYTES", 2**60)
    assert doctor.check_disk(settings).status == "warn"
