"""docker-compose.yml and the Dockerfile say what the code understands (no engine is needed)."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command
from typer.testing import CliRunner
from winnow.cli import make_app

from app.jobs import QUEUES
from app.settings import Settings

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OWN_SERVICES = {name: of for name, of in SERVICES.items() if of["image"].startswith("winnow-")}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKERS = [name for name, of in OWN_SERVICES.items() if of["command"][0] == "worker"]
VARIABLE = re.compile(r"\$\{(\w+)(:[-?][^}]*)?\}")

own_services = pytest.mark.parametrize("name", OWN_SERVICES)


def stages() -> dict[str, tuple[str, str]]:
    """Return the Dockerfile's stages: name to what it starts from and its instructions."""
    heads = list(re.finditer(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(DOCKERFILE)]
    return {
        head[2]: (head[1], DOCKERFILE[head.end() : end])
        for head, end in zip(heads, ends, strict=True)
    }


def assert_is_a_command(words: list[str]) -> None:
    """Parse words as arguments of `winnow`; options and missing arguments are checked too."""
    group = get_command(make_app())
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands[words[0]]
    command.make_context(words[0], list(words[1:]), resilient_parsing=False)


def test_the_services_of_an_installation_are_there() -> None:
    assert set(SERVICES) == {
        *("api", "fetcher", "worker", "ranker", "migrate"),
        *("postgres", "redis"),
    }


@own_services
def test_every_setting_that_is_passed_exists(name: str) -> None:
    """A misspelt WINNOW_ variable would be ignored in silence."""
    known = {f"WINNOW_{field.upper()}" for field in Settings.model_fields}
    passed = {key for key in SERVICES[name]["environment"] if key.startswith("WINNOW_")}
    assert passed
    assert passed <= known


@own_services
def test_the_settings_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(key, VARIABLE.sub("0123abcd", value))
    settings = Settings()
    assert settings.require_database_url() == (
        "postgresql+psycopg://winnow:0123abcd@postgres:5432/winnow"
    )
    assert settings.require_broker_url() == "redis://redis:6379/0"
    assert settings.require_keys


def test_variables_of_the_file_itself_are_no_settings() -> None:
    """A ${WINNOW_…} would look like a setting and be none."""
    for match in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text()):
        assert not match[1].startswith("WINNOW_")


@own_services
def test_every_command_is_one_of_winnow(name: str) -> None:
    assert_is_a_command(SERVICES[name]["command"])


def test_the_images_start_commands_that_exist() -> None:
    assert 'ENTRYPOINT ["winnow"]' in DOCKERFILE
    for name in ("api", "worker"):
        (command,) = re.findall(r"^CMD (.+)$", stages()[name][1], re.MULTILINE)
        assert_is_a_command(yaml.safe_load(command))


def test_health_checks_run_what_exists() -> None:
    """The API's asks its own route on its own port; the worker's looks at its sign of life."""
    of_api = SERVICES["api"]["healthcheck"]["test"]
    port = SERVICES["api"]["environment"]["WINNOW_PORT"]
    assert f"http://127.0.0.1:{port}/healthz" in of_api[-1]
    compile(of_api[-1], "healthcheck", "exec")
    for name in WORKERS:
        of_worker = SERVICES[name]["healthcheck"]["test"]
        assert of_worker[:2] == ["CMD", "winnow"]
        assert_is_a_command(of_worker[2:])


def test_nothing_starts_before_what_it_needs() -> None:
    """Services wait for the schema, and for servers that answer, not only for their processes."""
    for name in ("api", *WORKERS):
        needs = SERVICES[name]["depends_on"]
        assert needs["migrate"] == {"condition": "service_completed_successfully"}
        assert needs["postgres"] == {"condition": "service_healthy"}
    for name in WORKERS:
        assert SERVICES[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert SERVICES["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[needed]


def test_submitting_does_not_wait_for_the_broker() -> None:
    """The API takes audits while the broker is down, so it must also start without it."""
    assert "redis" not in SERVICES["api"]["depends_on"]


def test_the_worker_has_a_gpu_and_time_to_stop() -> None:
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["worker"]["stop_grace_period"] == "90s"
    assert not any("deploy" in SERVICES[name] for name in ("fetcher", "ranker"))


def test_every_queue_has_a_worker_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one leaves another one takes, and none waits behind what it need not."""
    taken: list[list[str]] = []

    def run_worker(queues: list[str]) -> int:
        taken.append(queues)
        return 0

    monkeypatch.setattr("workers.celery_app.run_worker", run_worker)
    for name in WORKERS:
        result = CliRunner().invoke(make_app(), SERVICES[name]["command"])
        assert result.exit_code == 0, result.output
    assert sorted(taken) == sorted([queue] for queue in QUEUES)


def test_credentials_for_what_is_fetched_are_the_fetchers_alone() -> None:
    files = {
        name: [file["path"] for file in service.get("env_file", ())]
        for name, service in SERVICES.items()
    }
    assert files.pop("fetcher") == ["winnow.env", "fetch.env"]
    assert all("fetch.env" not in paths for paths in files.values())
    assert "*.env" in (ROOT / ".gitignore").read_text().split()


def test_only_who_must_has_a_way_out() -> None:
    """The fetcher reads what others host, the API calls webhooks; GPU and data are inside."""
    networks = {name: set(of["networks"]) for name, of in SERVICES.items()}
    assert {name for name, of in networks.items() if "outside" in of} == {"api", "fetcher"}
    assert all("inside" in of for of in networks.values())
    assert COMPOSE["networks"] == {"inside": {"internal": True}, "outside": None}
    for name in set(WORKERS) - {"fetcher"}:
        assert SERVICES[name]["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in SERVICES["fetcher"]["environment"]


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_can_do_more_than_it_must(name: str) -> None:
    """No capability, no new privilege, no root, and nothing to write but volumes and memory."""
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "/tmp" in service["tmpfs"]
    assert not {"cap_add", "privileged", "pid", "network_mode", "devices"} & set(service)
    if name not in OWN_SERVICES:
        assert service["user"] == name  # the images' own users; ours are set in the Dockerfile
    for mount in service["volumes"]:
        assert mount.endswith(":ro") or mount.partition(":")[0] in COMPOSE["volumes"]


@own_services
def test_what_a_service_writes_has_a_place(name: str) -> None:
    """Libraries' small files go to memory, and files that may be large to the volume."""
    environment = SERVICES[name]["environment"]
    assert environment["HOME"] in SERVICES[name]["tmpfs"]
    assert environment["TMPDIR"] == environment["WINNOW_DATA_DIR"] + "/tmp"
    assert environment["TMPDIR"] in stages()["base"][1]


def test_the_broker_keeps_its_messages() -> None:
    command = shlex.join(SERVICES["redis"]["command"])
    assert "--appendonly yes --appendfsync everysec" in command
    assert "--maxmemory-policy noeviction" in command


def test_the_servers_are_of_the_stated_versions() -> None:
    assert SERVICES["postgres"]["image"] == "postgres:18"
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]
    assert SERVICES["redis"]["image"] == "redis:8"


@own_services
def test_images_are_built_from_stages_that_exist(name: str) -> None:
    target = SERVICES[name]["image"].removeprefix("winnow-").partition(":")[0]
    assert target in stages()
    if "build" in SERVICES[name]:
        assert SERVICES[name]["build"] == {"context": ".", "target": target}


def test_volumes_and_mounts_fit_together() -> None:
    """The API and the worker share the data directory that the settings name."""
    named = {
        mount.partition(":")[0]
        for service in SERVICES.values()
        for mount in service.get("volumes", [])
        if not mount.startswith(("$", ".", "/"))
    }
    assert named == set(COMPOSE["volumes"])
    for service in OWN_SERVICES.values():
        places = [mount.rpartition(":/")[2] for mount in service["volumes"]]
        assert "data" in places
        assert service["environment"]["WINNOW_DATA_DIR"] == "/data"
        assert service["environment"]["WINNOW_FILE_ROOTS"] == "/models"


def test_the_images_do_not_run_as_root() -> None:
    for name in ("api", "worker"):
        base, instructions = stages()[name]
        assert base == "base"
        assert re.findall(r"^USER (\S+)$", instructions, re.MULTILINE) == ["10001"]
    assert "useradd --uid 10001" in stages()["base"][1]


def test_the_base_image_is_pinned() -> None:
    base, _ = stages()["base"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)


def test_only_the_worker_image_has_torch() -> None:
    installs = {
        name: re.findall(r"^RUN pip install (.+)$", of[1], re.MULTILINE)
        for name, of in stages().items()
    }
    assert installs["base"] == []
    assert installs["api"] == ["--constraint constraints.txt ./client '.[tracing]'"]
    assert installs["worker"] == ["--constraint constraints.txt ./client '.[worker,tracing]'"]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    kept = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_the_versions_agree() -> None:
    """The images carry the version of the package."""
    (version,) = re.findall(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert {of["image"].partition(":")[2] for of in OWN_SERVICES.values()} == {version}
