"""What the pages say of settings, requests, calls and folders is what the code says."""

import json
import re
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from app.api_reference import openapi_document
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
from app.settings import Settings
from tests.docs.pages import ROOT, text_of


def rows(text: str, first_heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading this is."""
    _, _, after = text.partition(f"\n| {first_heading} |")
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
    settings = rows(text_of("docs/configuration.md"), "variable")
    listed = {name.strip("`"): default.strip("`") for name, default, _ in settings}
    assert list(listed) == [f"WINNOW_{name.upper()}" for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        said = listed[f"WINNOW_{name.upper()}"]
        if field.default in (None, ()):
            assert said in {"none", "an embedded server"}
        else:
            assert said == str(field.default).replace("True", "true").replace("False", "false")


def test_every_option_of_a_request_is_listed_with_its_default() -> None:
    """Also those of the nested objects; `required` stands where there is no default."""
    options = rows(text_of("docs/request.md"), "field")
    listed = {name.strip("`"): default.strip("`") for name, default, _ in options}
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
    options = rows(text_of("docs/request.md"), "field")
    (cell,) = [meaning for name, _, meaning in options if name == "`estimators`"]
    assert re.findall(r"`(\w+)`", cell.partition(";")[0]) == list(ESTIMATORS)


def test_every_call_is_listed() -> None:
    paths = {re.sub(r"\{\w+_id\}", "{id}", path) for path in openapi_document()["paths"]}
    paths = {path.replace(".{file_format}", ".parquet") for path in paths}
    said = set(re.findall(r"/(?:v1/[\w/{}.]+|healthz|readyz|metrics)", text_of("docs/request.md")))
    assert paths <= said


def test_the_tree_shows_every_folder() -> None:
    _, _, after = text_of("docs/how-it-works.md").partition("## The tree\n\n```\n")
    listed = [line.split()[0].rstrip("/") for line in after.partition("```")[0].splitlines()]
    assert all((ROOT / folder).is_dir() for folder in listed)
    packages = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("app", "workers")
        for path in (ROOT / top).glob("**/__init__.py")
        if len(path.parent.relative_to(ROOT).parts) <= 2
    }
    assert packages <= set(listed)
