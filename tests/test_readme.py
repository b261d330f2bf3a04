"""What the README says of settings, requests, calls and folders is what the code says."""

import json
import re
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from app import catalogue_routes, health
from app.audits import ranking_routes
from app.audits import routes as audit_routes
from app.audits.schemas import (
    AuditRequest,
    DatasetSource,
    FineTune,
    Flag,
    ModelSource,
    PlantNoise,
    Probes,
    RankingSpecification,
)
from app.audits.verification_schemas import Verify
from app.catalogue import ESTIMATORS
from app.datasets import routes as dataset_routes
from app.decisions import routes as decision_routes
from app.experiments import routes as experiment_routes
from app.exports import routes as export_routes
from app.settings import Settings
from app.webhooks import routes as webhook_routes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(first_heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading this is."""
    _, _, after = README.partition(f"\n| {first_heading} |")
    assert after, f"no table starts with {first_heading}"
    table = after.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def default_of(field: Any) -> Any:
    default = field.get_default(call_default_factory=True)
    return (
        default.model_dump(mode="json", exclude_none=True)
        if isinstance(default, BaseModel)
        else default
    )


def test_every_setting_is_listed_with_its_default() -> None:
    listed = {name.strip("`"): default.strip("`") for name, default, _ in rows("variable")}
    assert list(listed) == [f"WINNOW_{name.upper()}" for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        said = listed[f"WINNOW_{name.upper()}"]
        if field.default in (None, ()):
            assert said in {"none", "an embedded server"}
        else:
            assert said == str(field.default).replace("True", "true").replace("False", "false")


def test_every_option_of_a_request_is_listed_with_its_default() -> None:
    """Also those of the nested objects; `required` stands where there is no default."""
    listed = {name.strip("`"): default.strip("`") for name, default, _ in rows("field")}
    nested: dict[str, type[BaseModel]] = {
        "model": ModelSource,
        "train": DatasetSource,
        "validation": DatasetSource,
        "test": DatasetSource,
        "fine_tune": FineTune,
        "plant_noise": PlantNoise,
        "ranking": RankingSpecification,
        "probes": Probes,
        "flag": Flag,
        "verify": Verify,
    }
    expected: dict[str, Any] = {}
    for name, field in AuditRequest.model_fields.items():
        if name not in {"model", "train", "ranking"}:
            expected[name] = default_of(field)
        for part, option in (nested[name].model_fields if name in nested else {}).items():
            expected[f"{name}.{part}"] = default_of(option)
    assert list(listed) == list(expected)
    for name, default in expected.items():
        said = listed[name]
        if default is PydanticUndefined:
            assert said == "required", name
        elif default is not None:
            assert json.loads(said) == json.loads(json.dumps(default)), name


def test_the_estimators_are_named() -> None:
    (cell,) = [meaning for name, _, meaning in rows("field") if name == "`estimators`"]
    assert re.findall(r"`(\w+)`", cell.partition(";")[0]) == list(ESTIMATORS)


def test_every_call_is_listed() -> None:
    routers = [
        audit_routes.router,
        audit_routes.results_router,
        ranking_routes.router,
        decision_routes.router,
        export_routes.router,
        experiment_routes.router,
        dataset_routes.router,
        webhook_routes.router,
        catalogue_routes.router,
        health.router,
    ]
    paths = {
        re.sub(r"\{\w+_id\}", "{id}", route.path).replace(".{file_format}", ".parquet")
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
    }
    said = set(re.findall(r"/(?:v1/[\w/{}.]+|healthz|readyz)", README))
    assert paths <= said


def test_the_tree_shows_every_folder() -> None:
    _, _, after = README.partition("## The tree\n\n```\n")
    listed = [line.split()[0].rstrip("/") for line in after.partition("```")[0].splitlines()]
    assert all((ROOT / folder).is_dir() for folder in listed)
    packages = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("app", "workers")
        for path in (ROOT / top).glob("**/__init__.py")
        if len(path.parent.relative_to(ROOT).parts) <= 2
    }
    assert packages <= set(listed)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
