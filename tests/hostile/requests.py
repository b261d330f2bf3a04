"""Requests that nobody thought of, made up from the OpenAPI document, to a running API.

In the long size, by itself:

    .venv/bin/python -m tests.hostile.requests
"""

import argparse
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2
import schemathesis
import structlog
from pydantic import SecretStr, ValidationError
from schemathesis import GenerationMode
from schemathesis.config import (
    ChecksConfig,
    CoveragePhaseConfig,
    ExamplesPhaseConfig,
    FuzzingPhaseConfig,
    GenerationConfig,
    PhasesConfig,
    PositiveDataAcceptanceConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
    StatefulPhaseConfig,
)
from schemathesis.engine import events, from_schema
from schemathesis.hooks import unregister
from sqlalchemy import Engine

from app.db import make_engine
from app.embedded import embedded_postgres, embedded_valkey
from app.errors import PROBLEM_MEDIA_TYPE, ProblemDocument
from app.jobs import make_celery
from app.keys.service import create_key
from app.main import create_app
from app.migrate import migrate
from app.settings import Settings
from tests.client.conftest import serving
from tests.hostile.populated import Inhabitants, populate

SECONDS_PER_REQUEST = 10.0
# Its own answer, as documented: on a busy machine the broker may take longer than it waits.
NOT_READY = ("GET /readyz", 503)


@dataclass
class Findings:
    """What was asked and what was wrong.

    Attributes:
        num_requests: by kind of generation.
        statuses: of the answers.
        operations: that were asked at least once.
        failures: what was not as documented; each once, with a request that shows it.
    """

    num_requests: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    operations: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.num_requests.values())

    def add(self, event: events.EngineEvent) -> None:
        """Take in what the generator tells."""
        if isinstance(event, events.NonFatalError):
            self.failures.setdefault(f"{event.label}: {event.info.title}", event.info.message)
        elif isinstance(event, events.FatalError):
            raise event.exception
        elif isinstance(event, events.ScenarioFinished):
            recorder = event.recorder
            self.num_requests[event.phase.name.lower()] += len(recorder.interactions)
            for case_id, interaction in recorder.interactions.items():
                self.operations.add(recorder.cases[case_id].value.operation.label)
                if interaction.response is not None:
                    self.statuses[interaction.response.status_code] += 1
            for case_id, checks in recorder.checks.items():
                label = recorder.cases[case_id].value.operation.label
                answer = recorder.interactions[case_id].response
                if (label, answer and answer.status_code) == NOT_READY:
                    continue
                for check in checks:
                    if check.failure_info is not None:
                        failure = check.failure_info
                        name = f"{label}: {check.name}: {failure.failure.title}"
                        self.failures.setdefault(
                            name, f"{failure.failure.message}\n{failure.code_sample}"
                        )

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.num_requests.items())
        lines = [
            f"{self.total:,} requests to {len(self.operations)} operations ({kinds})",
            "answers: " + ", ".join(f"{s}: {n:,}" for s, n in sorted(self.statuses.items())),
            f"{len(self.failures)} failures",
            *(f"\n--- {name}\n{detail}" for name, detail in self.failures.items()),
        ]
        return "\n".join(lines)


@schemathesis.check
def errors_are_problems(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """Every error is a problem document that says what to change, and never our own fault."""
    del ctx, case
    if response.status_code < HTTPStatus.BAD_REQUEST:
        return
    kind = response.headers.get("content-type", [""])[0]
    assert kind == PROBLEM_MEDIA_TYPE, f"an error is a {kind}"
    try:
        problem = ProblemDocument.model_validate_json(response.content)
    except ValidationError as error:
        raise AssertionError(str(error)) from error
    assert problem.status == response.status_code
    assert problem.title
    assert problem.detail


def ask(url: str, key: str, *, found: Inhabitants, max_examples: int, coverage: bool) -> Findings:
    """Make requests up and return what came of them.

    Args:
        url: of the running API.
        key: an API key.
        found: ids of what there is; half of all made-up ids are exchanged for some.
        max_examples: per operation and kind of generation.
        coverage: also every limit and every missing or wrong part, one by one: some 4,000.
    """
    generation = GenerationConfig(max_examples=max_examples, deterministic=True, no_shrink=True)
    project = ProjectConfig(
        headers={"Authorization": f"Bearer {key}"},
        request_timeout=SECONDS_PER_REQUEST,
        max_stream_events=2,
        continue_on_failure=True,
        checks=ChecksConfig(
            # what JSON Schema can say of a request is less than what a request must keep to
            positive_data_acceptance=PositiveDataAcceptanceConfig(enabled=False),
        ),
        generation=generation,
        phases=PhasesConfig(
            examples=ExamplesPhaseConfig(),
            coverage=CoveragePhaseConfig(enabled=coverage),
            fuzzing=FuzzingPhaseConfig(),
            stateful=StatefulPhaseConfig(max_steps=6),
        ),
    )
    config = SchemathesisConfig(seed=1, projects=ProjectsConfig(default=project))
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    draw = random.Random(1)

    @schema.hook
    def map_path_parameters(_context: Any, parameters: Any) -> Any:
        return _with_known(parameters, found.ids, draw)

    @schemathesis.hook
    def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
        """Let half of the valid requests succeed, so that links can be followed."""
        is_valid = case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE
        bodies = found.bodies.get(case.operation.label, ())
        if bodies and is_valid and draw.random() < 0.5:
            case.body = draw.choice(bodies)

    @schema.hook
    def map_query(_context: Any, query: Any) -> Any:
        query = _with_known(query, found.ids, draw)
        if isinstance(query, dict) and _is_number(query.get("wait")):
            query["wait"] = min(float(query["wait"]), 0.1)  # a long poll tells nothing new
        return query

    findings = Findings()
    try:
        for event in from_schema(schema).execute():
            findings.add(event)
    finally:
        unregister(before_call)
    return findings


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def _with_known(parameters: Any, known: Mapping[str, list[str]], draw: random.Random) -> Any:
    if not isinstance(parameters, dict):
        return parameters
    return {
        name: draw.choice(known[name]) if name in known and draw.random() < 0.5 else value
        for name, value in parameters.items()
    }


def ask_service(
    engine: Engine, settings: Settings, *, max_examples: int, coverage: bool
) -> Findings:
    """Run the API on a migrated, empty database, fill it, and make requests up."""
    celery = make_celery(settings)
    key = create_key(engine, tenant="default", name="test", valid_days=1).secret
    headers = {"Authorization": f"Bearer {key}"}
    with serving(create_app(settings, engine, celery)) as url:
        with httpx2.Client(base_url=url, headers=headers) as client:
            found = populate(engine, settings, client)
        findings = ask(url, key, found=found, max_examples=max_examples, coverage=coverage)
    celery.close()
    return findings


def main() -> None:
    """Make requests up in the long size, on servers of this process's own, and print findings."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--examples", type=int, default=130, help="per operation")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with embedded_postgres(folder) as database_url, embedded_valkey() as broker_url:
            settings = Settings(
                database_url=SecretStr(database_url),
                broker_url=SecretStr(broker_url),
                data_dir=folder / "data",
            )
            settings.data_dir.mkdir()
            engine = make_engine(settings.require_database_url())
            migrate(engine)
            findings = ask_service(engine, settings, max_examples=arguments.examples, coverage=True)
            engine.dispose()
    print(findings)  # noqa: T201  the report
    sys.exit(bool(findings.failures))


if __name__ == "__main__":
    main()
