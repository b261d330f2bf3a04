"""The review as people do it, in a real browser: by keyboard, in bulk, two at once."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState
from app.keys.service import create_key, revoke_key
from app.settings import Settings
from app.work.models import UnitState, WorkUnit
from tests.factories import make_audit, make_finished_audit
from tests.pipeline.conftest import Models, models, workplace  # noqa: F401  fixtures
from tests.pipeline.tiny import reviews
from tests.pipeline.workplace import Workplace
from tests.web.conftest import Watched, served, watched
from tests.web.published import publish_audit, review_texts
from tests.web.test_pages import HOSTILE

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.timeout(600)]


def open_audit(
    page: Page, site: str, audit: Audit, *, reviewer: str = "anna", query: str = ""
) -> None:
    page.goto(f"{site}/audits/{audit.id}{query}")
    page.get_by_label("Reviewer").fill(reviewer)
    page.get_by_label("Reviewer").blur()
    expect(page.locator("#cut")).to_be_visible()


def pressed(page: Page, row: int) -> list[str]:
    """Return what is decided on a row of the table."""
    buttons = page.locator("tr[data-index]").nth(row).locator("[data-act][aria-pressed=true]")
    return [text.lower() for text in buttons.all_inner_texts()]


def decisions(site: str, audit: Audit) -> dict[int, str]:
    """Return what the API has, by the sample's row."""
    answer = httpx2.get(f"{site}/v1/audits/{audit.id}/suspects?decision=any&limit=1000")
    return {each["index"]: each["decision"]["action"] for each in answer.json()["data"]}


@pytest.fixture
def audit(engine: Engine, settings: Settings) -> Audit:
    """A finished audit of 130 reviews."""
    return publish_audit(engine, settings, texts=review_texts(130))


class TestByKeyboard:
    def test_samples_are_decided_and_undone(self, site: str, audit: Audit, tab: Watched) -> None:
        page = tab.page
        open_audit(page, site, audit)
        for key in ("j", "a", "x", "d"):  # deciding goes on to the next sample
            page.keyboard.press(key)
        for row, action in enumerate(("accept", "keep", "drop")):
            expect(
                page.locator(f"tr[data-index] >> nth={row}").locator(f"[data-act={action}]")
            ).to_have_attribute("aria-pressed", "true")
        assert sorted(decisions(site, audit).values()) == ["accept", "drop", "keep"]
        expect(page.locator("[data-part=review] .big")).to_have_text("3")
        page.keyboard.press("u")
        expect(page.get_by_text("Undone: drop")).to_be_visible()
        assert [pressed(page, row) for row in range(3)] == [["accept"], ["keep"], []]
        page.reload()
        assert [pressed(page, row) for row in range(3)] == [["accept"], ["keep"], []]
        assert "anna" in page.locator("tr[data-index] [data-who]").first.inner_text()
        assert tab.complaints == []

    def test_the_evidence_opens_below_its_row(self, site: str, audit: Audit, tab: Watched) -> None:
        page = tab.page
        open_audit(page, site, audit)
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        evidence = page.locator("tr.evidence")
        for title in ("it harms most", "most alike", "What the model says", "by layer group"):
            expect(evidence.get_by_text(title)).to_be_visible()
        page.keyboard.press("Enter")
        expect(evidence).to_have_count(0)
        page.keyboard.press("k")
        assert page.evaluate("document.activeElement.dataset.rank") == "0"

    def test_a_label_is_edited(self, site: str, audit: Audit, tab: Watched) -> None:
        page = tab.page
        open_audit(page, site, audit)
        page.keyboard.press("j")
        page.keyboard.press("e")
        page.get_by_label("Label", exact=True).select_option("positive")
        page.get_by_role("button", name="Save", exact=True).click()
        expect(page.locator("tr[data-index]").first.locator("[data-who]")).to_contain_text(
            "positive"
        )
        assert list(decisions(site, audit).values()) == ["edit"]

    def test_help_pages_and_typing_are_kept_apart(
        self, site: str, audit: Audit, tab: Watched
    ) -> None:
        page = tab.page
        open_audit(page, site, audit)
        page.keyboard.press("?")
        expect(page.locator("#help")).to_be_visible()
        page.keyboard.press("a")
        page.keyboard.press("Escape")
        page.get_by_label("Text contains").press_sequentially("jaxd")
        assert decisions(site, audit) == {}
        page.get_by_label("Text contains").blur()
        page.keyboard.press("n")
        page.wait_for_url("**from_rank=50**")
        page.keyboard.press("p")
        page.wait_for_url("**before_rank=50**")
        assert page.locator("tr[data-index]").first.get_attribute("data-rank") == "0"

    def test_who_decides_is_asked_once(self, site: str, audit: Audit, tab: Watched) -> None:
        page = tab.page
        page.goto(f"{site}/audits/{audit.id}")
        page.keyboard.press("j")
        page.keyboard.press("x")
        page.get_by_label("Your name is stored with your decisions").fill("bela")
        page.keyboard.press("Enter")
        expect(page.locator("tr[data-index]").first.locator("[data-who]")).to_contain_text("bela")
        page.reload()
        assert page.get_by_label("Reviewer").input_value() == "bela"


class TestInBulk:
    def test_the_whole_filter_is_previewed_decided_and_undone(
        self, site: str, audit: Audit, tab: Watched
    ) -> None:
        page = tab.page
        open_audit(page, site, audit)
        page.get_by_label("Given label").select_option("positive")
        page.get_by_role("button", name="Filter", exact=True).click()
        page.wait_for_url("**label=positive**")
        assert "flagged=" not in page.url
        found = httpx2.get(f"{site}/v1/audits/{audit.id}/suspects/summary?label=positive").json()
        number = found["num_matching"]
        assert number > 50  # more than a page shows
        expect(page.locator("[data-summary]")).to_have_text(f"{number} samples of this filter")
        page.get_by_role("button", name="Drop all…").click()
        expect(page.get_by_text(f"{number} samples will be dropped.")).to_be_visible()
        assert decisions(site, audit) == {}
        page.get_by_role("button", name=f"Decide {number} samples").click()
        expect(page.get_by_text(f"Done: {number} samples changed.")).to_be_visible()
        expect(page.locator("[data-act=drop][aria-pressed=true]")).to_have_count(50)
        assert list(decisions(site, audit).values()) == ["drop"] * number
        page.get_by_text("History").click()
        page.locator("[data-undo]").first.click()
        expect(page.get_by_text("Undone: drop")).to_be_visible()
        expect(page.locator("[data-act][aria-pressed=true]")).to_have_count(0)
        assert decisions(site, audit) == {}
        assert tab.complaints == []

    def test_the_cut_selects_what_it_counts(self, site: str, audit: Audit, tab: Watched) -> None:
        page = tab.page
        open_audit(page, site, audit)
        slider = page.locator("#cut")
        before = page.locator("#cut-count").inner_text()
        slider.focus()
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        told = page.locator("#cut-count").inner_text()
        assert told != before
        number = told.split()[0]
        page.get_by_role("button", name="Show these").click()
        page.wait_for_url("**max_score=**")
        expect(page.locator("[data-summary]")).to_contain_text(f"{number} sample")
        expect(page.locator("#cut-count")).to_contain_text(f"{number} sample")

    def test_a_cell_of_the_matrix_filters(self, site: str, audit: Audit, tab: Watched) -> None:
        page = tab.page
        open_audit(page, site, audit)
        cell = page.locator(".matrix a").nth(1)
        number = cell.inner_text()
        cell.click()
        page.wait_for_url("**suggested_label=**")
        expect(page.locator("[data-summary]")).to_contain_text(f"{number} sample")


class TestWhatGoesWrong:
    def test_two_reviewers_at_one_sample(
        self, site: str, audit: Audit, tab: Watched, browser: Browser
    ) -> None:
        """The second is told, loses nothing, and chooses."""
        with browser.new_context() as context:
            other = watched(context).page
            for page, name in ((tab.page, "anna"), (other, "bela")):
                open_audit(page, site, audit, reviewer=name)
            tab.page.keyboard.press("j")
            tab.page.keyboard.press("d")
            expect(tab.page.locator("[data-part=review] .big")).to_have_text("1")
            other.keyboard.press("j")
            other.keyboard.press("x")
            told = other.get_by_text("anna decided 1 sample of yours")
            expect(told).to_be_visible()
            assert list(decisions(site, audit).values()) == ["drop"]
            other.get_by_role("button", name="Reload theirs").click()
            expect(told).to_be_hidden()
            assert pressed(other, 0) == ["drop"]
            other.keyboard.press("x")
            expect(other.locator("[data-act=keep][aria-pressed=true]")).to_have_count(1)
            assert list(decisions(site, audit).values()) == ["keep"]

    def test_a_bulk_decision_counts_what_others_decided(
        self, site: str, audit: Audit, tab: Watched
    ) -> None:
        page = tab.page
        open_audit(page, site, audit, query="?flagged=true")
        index = int(page.locator("tr[data-index]").first.get_attribute("data-index") or -1)
        body = {"action": "keep", "indices": [index], "reviewer": "bela"}
        httpx2.post(f"{site}/v1/audits/{audit.id}/decisions", json=body).raise_for_status()
        page.get_by_role("button", name="Drop all…").click()
        expect(page.get_by_text("Somebody else has decided 1 sample of them")).to_be_visible()
        page.get_by_role("button", name="Decide anyway").click()
        expect(page.get_by_text("Done:")).to_be_visible()
        assert set(decisions(site, audit).values()) == {"drop"}

    def test_a_lost_connection_keeps_the_decision_for_later(
        self, site: str, audit: Audit, tab: Watched
    ) -> None:
        page = tab.page
        open_audit(page, site, audit)
        page.keyboard.press("j")
        page.context.set_offline(True)
        page.keyboard.press("d")
        expect(page.get_by_text("the connection was lost")).to_be_visible()
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("[data-act=drop][aria-pressed=true]")).to_have_count(1)
        assert list(decisions(site, audit).values()) == ["drop"]

    def test_a_deleted_audit_is_told(self, site: str, audit: Audit, tab: Watched) -> None:
        page = tab.page
        open_audit(page, site, audit)
        httpx2.delete(f"{site}/v1/audits/{audit.id}").raise_for_status()
        page.keyboard.press("j")
        page.keyboard.press("a")
        expect(
            page.get_by_text("It may have been deleted since this page was loaded")
        ).to_be_visible()
        page.keyboard.press("Enter")

    def test_a_session_that_ends_loses_nothing(
        self, locked_site: str, engine: Engine, audit: Audit, tab: Watched
    ) -> None:
        key, later = (
            create_key(engine, tenant="default", name=name, valid_days=1) for name in ("k1", "k2")
        )
        page = tab.page
        page.goto(f"{locked_site}/audits/{audit.id}")
        page.get_by_label("API key").fill(key.secret)
        page.keyboard.press("Enter")
        expect(page.locator("#cut")).to_be_visible()
        revoke_key(engine, key.id)
        page.keyboard.press("j")
        page.keyboard.press("x")
        expect(page.get_by_text("Your session is over")).to_be_visible()
        second = page.context.new_page()
        second.goto(f"{locked_site}/sign-in")
        second.get_by_label("API key").fill(later.secret)
        second.keyboard.press("Enter")
        expect(second.get_by_role("heading", name="Audits")).to_be_visible()
        second.close()
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("[data-act=keep][aria-pressed=true]")).to_have_count(1)
        expect(page.locator("tr[data-index]").first.locator("[data-who]")).to_contain_text("k2")


def test_hostile_texts_do_not_run(
    site: str, engine: Engine, settings: Settings, tab: Watched
) -> None:
    audit = publish_audit(engine, settings, texts=[*HOSTILE] * 40, labels=HOSTILE)
    page = tab.page
    page.on("dialog", lambda dialog: tab.complaints.append(f"ran: {dialog.message}"))
    open_audit(page, site, audit)
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.locator(".why")).to_be_visible()
    page.keyboard.press("a")
    expect(page.locator("[data-act=accept][aria-pressed=true]")).to_have_count(1)
    page.keyboard.press("e")
    expect(page.locator("#edit")).to_be_visible()
    assert tab.complaints == []


# --- from an upload to a review, with a worker ------------------------------------------------


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
    page.get_by_role("button", name="Cancel this audit").click()
    expect(page.get_by_text("The audit will end within seconds")).to_be_visible()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not page.get_by_text("was cancelled").count():
        page.wait_for_timeout(200)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("state", ["list", "audit", "sample", "failed"])
def test_no_page_is_wider_than_the_screen(
    *, site: str, engine: Engine, settings: Settings, browser: Browser, width: int, state: str
) -> None:
    audit = publish_audit(engine, settings, texts=["word" * 200, *review_texts(59)])
    make_finished_audit(engine, settings)
    with browser.new_context(viewport={"width": width, "height": 844}) as context:
        page = watched(context).page
        paths = {
            "list": "/",
            "audit": f"/audits/{audit.id}",
            "sample": f"/audits/{audit.id}/samples/0",
        }
        page.goto(f"{site}{paths.get(state, '/audits/aud_none')}")
        if state == "audit":
            expect(page.locator("#cut")).to_be_visible()
            page.locator("[data-expand]").first.click()
            expect(page.locator(".why")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert AuditState(audit.state).is_final
