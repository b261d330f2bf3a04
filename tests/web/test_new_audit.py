"""From a file to a review in a real browser: upload, progress, and what goes wrong with a file."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.settings import Settings
from app.work.models import UnitState, WorkUnit
from tests.factories import make_audit
from tests.pipeline.conftest import Models, models, workplace  # noqa: F401  fixtures
from tests.pipeline.tiny import reviews
from tests.pipeline.workplace import Workplace
from tests.web.conftest import Watched, served

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.timeout(600)]


@pytest.fixture
def workshop(workplace: Workplace, celery: Any) -> Iterator[str]:  # noqa: F811
    """A site whose audits are worked on by a worker in this process."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.1):
            with Session(workplace.engine) as session:
                statement = select(WorkUnit.audit_id).where(WorkUnit.state == UnitState.READY)
                audit_id = session.scalars(statement.limit(1)).first()
            if audit_id is not None:
                workplace.finish(audit_id)

    worker = threading.Thread(target=work)
    worker.start()
    settings = workplace.settings.model_copy(update={"require_keys": False})
    try:
        yield from served(settings, workplace.engine, celery)
    finally:
        stop.set()
        worker.join(120)


def write_csv(path: Path, columns: dict[str, Any]) -> Path:
    """Write a table with a column that the service does not need, and a quote to survive."""
    rows = zip(columns["text"], columns["label"], strict=True)
    lines = [f'{place},"say ""{text}""",{label}' for place, (text, label) in enumerate(rows)]
    path.write_text("\n".join(["id,text,label", *lines]) + "\n", encoding="utf-8")
    return path


def start_audit(page: Page, site: str, train: Path, validation: Path, model: str) -> None:
    page.goto(site)
    page.get_by_role("button", name="New audit").first.click()
    page.get_by_label("Training set").set_input_files(train)
    page.get_by_label("Validation set").set_input_files(validation)
    page.get_by_label("Model", exact=True).fill(model)
    page.get_by_label("Epochs").fill("1")
    page.get_by_role("button", name="Start audit").click()


def test_from_a_file_to_a_review(
    workshop: str,
    models: Models,  # noqa: F811
    tab: Watched,
    tmp_path: Path,
) -> None:
    site, page = workshop, tab.page
    train = write_csv(tmp_path / "train.csv", reviews(60, seed=0))
    validation = write_csv(tmp_path / "validation.csv", reviews(20, seed=1))
    start_audit(page, site, train, validation, f"file://{models.encoder}")
    page.wait_for_url("**/audits/aud_*")
    expect(page.get_by_role("heading", name="train.csv")).to_be_visible()
    expect(page.locator("#cut")).to_be_visible(timeout=240_000)  # by itself, when it is done
    page.get_by_label("Reviewer").fill("anna")
    page.get_by_label("Reviewer").blur()
    rows = page.locator("tr[data-index]")
    first, second, third = (int(rows.nth(i).get_attribute("data-index") or -1) for i in range(3))
    page.keyboard.press("j")
    page.keyboard.press("d")
    page.keyboard.press("e")
    page.get_by_label("Label", exact=True).select_option("pos")
    page.get_by_role("button", name="Save", exact=True).click()
    page.keyboard.press("d")
    page.keyboard.press("u")  # the third is dropped by mistake
    expect(page.get_by_text("Undone: drop")).to_be_visible()
    expect(page.locator("[data-act][aria-pressed=true]")).to_have_count(2)

    page.get_by_label("Text contains").fill("music")
    page.get_by_role("button", name="Filter", exact=True).click()
    page.wait_for_url("**search=music**")
    page.get_by_role("button", name="Drop all…").click()
    page.get_by_role("button", name="Decide").click()
    expect(page.get_by_text("Done:")).to_be_visible()

    page.get_by_text("Export", exact=True).click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Cleaned data, by your decisions").click()
    assert download.value.suggested_filename == "train-cleaned.csv"
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [lines[0]]
    for place, line in enumerate(lines[1:]):
        if place == first or "music" in line:
            continue
        kept.append(line.rpartition(",")[0] + ",pos\n" if place == second else line)
    assert third != first
    assert Path(download.value.path()).read_text(encoding="utf-8") == "".join(kept)
    page.goto(site)
    expect(page.get_by_role("row", name="train.csv")).to_contain_text("succeeded")
    assert tab.complaints == []


def test_a_file_that_is_wrong_is_told_at_its_field(
    site: str, settings: Settings, tab: Watched, tmp_path: Path
) -> None:
    page = tab.page
    train = write_csv(tmp_path / "train.csv", reviews(10, seed=0))
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("words,class\na,b\n")
    start_audit(page, site, wrong, train, "hf://org/model@main")
    expect(page.locator("#train-error")).to_contain_text("column")
    page.get_by_label("Training set").set_input_files(train)
    page.get_by_label("Model", exact=True).fill("somewhere/else")
    page.get_by_role("button", name="Start audit").click()
    expect(page.locator("#model-error")).to_be_visible()
    expect(page.locator("#train-error")).to_be_hidden()
    assert page.get_by_label("Epochs").input_value() == "1"  # nothing is lost
    page.get_by_label("Model", exact=True).fill("hf://org/model@main")
    page.get_by_role("button", name="Start audit").click()
    page.wait_for_url("**/audits/aud_*")
    assert len(httpx2.get(f"{site}/v1/datasets").json()["data"]) == 1


def test_an_upload_that_is_cut_off_can_be_sent_again(
    site: str, tab: Watched, tmp_path: Path
) -> None:
    page = tab.page
    train = write_csv(tmp_path / "train.csv", reviews(10, seed=0))
    page.goto(site)
    page.route("**/v1/datasets", lambda route: route.abort(), times=1)
    start_audit_in(page, train)
    expect(page.locator("#train-error")).to_contain_text("connection was lost")
    page.get_by_role("button", name="Start audit").click()
    page.wait_for_url("**/audits/aud_*")


def start_audit_in(page: Page, train: Path) -> None:
    page.get_by_role("button", name="New audit").first.click()
    page.get_by_label("Training set").set_input_files(train)
    page.get_by_label("Model", exact=True).fill("hf://org/model@main")
    page.get_by_role("button", name="Start audit").click()


def test_progress_is_live(site: str, engine: Engine, tab: Watched) -> None:
    audit = make_audit(engine)
    page = tab.page
    page.goto(f"{site}/audits/{audit.id}")
    expect(page.locator("[data-stage]")).to_have_text("waiting for a worker")
    with Session(engine) as session, session.begin():
        row = session.get_one(Audit, audit.id)
        row.state, row.stage, row.progress, row.version = "computing", "gradients", 0.42, 7
        row.samples_per_second, row.eta_seconds = 120.0, 75.0
    expect(page.locator("[data-stage]")).to_have_text("gradients")
    expect(page.locator("[data-detail]")).to_contain_text("42 %")
    expect(page.locator("[data-eta]")).to_have_text("1 min 15 s")
    with Session(engine) as session, session.begin():
        row = session.get_one(Audit, audit.id)
        row.waiting, row.version = "storage", 8
    expect(page.locator("[data-stage]")).to_have_text("waiting: storage")
    assert "waiting: storage" in httpx2.get(f"{site}/audits/{audit.id}").text  # drawn so too
    page.get_by_role("button", name="Cancel this audit").click()
    said = page.get_by_text("The audit will end within seconds")
    expect(said.or_(page.get_by_text("was cancelled"))).to_be_visible()  # nobody holds it
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not page.get_by_text("was cancelled").count():
        page.wait_for_timeout(200)
