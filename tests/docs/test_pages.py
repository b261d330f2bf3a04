"""Every command, snippet, request and file in README.md and docs/ is executed or validated."""

import json
import re
from itertools import count
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from app.audits.schemas import AuditRequest, RankingRequest
from app.audits.verification_schemas import Verify
from app.experiments.schemas import ExperimentRequest
from tests.docs.conftest import Place
from tests.docs.pages import MARKS, Block, all_blocks, blocks_of
from tests.docs.running import environment

pytestmark = pytest.mark.xdist_group("docs")

BLOCKS = all_blocks()
PAGES_WITH_CODE = list(
    dict.fromkeys(block.page for block in BLOCKS if block.language in {"sh", "python"})
)
MODELS: dict[str, type[BaseModel]] = {
    model.__name__: model for model in (AuditRequest, ExperimentRequest, RankingRequest, Verify)
}
LEAST: dict[str, dict[str, Any]] = {
    "AuditRequest": {
        "model": {"reference": "file:///models/base"},
        "train": {"reference": "upload:ds_train"},
        "fine_tune": {},
    },
    "ExperimentRequest": {},
    "RankingRequest": {},
}


def with_mark(mark: str) -> "pytest.MarkDecorator":
    return pytest.mark.parametrize("block", [b for b in BLOCKS if mark in b.marks], ids=str)


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_a_page_does_what_it_says(place: Place, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shell and Python code runs from top to bottom, and nothing fails."""
    reader = place.reader(page)
    monkeypatch.chdir(reader.folder)
    for name, value in environment(place.address).items():
        monkeypatch.setenv(name, value)
    for block in blocks_of(page):
        is_code = block.language in {"sh", "python"} or "file" in block.marks
        if is_code and not {"not executed", "service", "needs"} & set(block.marks):
            reader.do(block)


@with_mark("service")
def test_every_page_starts_the_same_service(block: Block) -> None:
    """The tests run the tutorial's; a page that started another would go untested."""
    (of_tutorial,) = [b for b in blocks_of("docs/tutorial.md") if "service" in b.marks]
    assert block.code == of_tutorial.code


@with_mark("not executed")
def test_what_is_not_executed(block: Block) -> None:
    """Lists it with the reason that the page gives."""
    assert block.marks["not executed"], f"{block} gives no reason"
    if block.language == "json":
        json.loads(block.code)
    if block.language == "yaml":
        yaml.compose(block.code)
    pytest.skip(f"{block}: {block.marks['not executed']}")


@with_mark("body")
def test_a_request_is_taken(block: Block) -> None:
    MODELS[block.marks["body"]].model_validate_json(_filled_in(block.code))


@with_mark("part")
def test_a_part_of_a_request_is_taken(block: Block) -> None:
    name = block.marks["part"]
    MODELS[name].model_validate(LEAST[name] | json.loads(_filled_in(block.code)))


def test_nothing_goes_unchecked() -> None:
    """JSON and YAML are requests or files; marks are known ones."""
    for block in BLOCKS:
        assert set(block.marks) <= MARKS, f"{block} has an unknown mark"
        if block.language in {"json", "yaml"}:
            assert block.marks, f"{block}: say what it is, see tests/docs/pages.py"


def _filled_in(code: str) -> str:
    """Return JSON with ids, all different, in place of the dots that stand for them."""
    numbers = count(1)
    return re.sub("ds_…", lambda _: f"ds_{next(numbers)}", code)
