"""The review as people do it, in a real browser: by keyboard, in bulk, two at once."""

import httpx2
import pytest
from playwright.sync_api import Browser, expect
from sqlalchemy import Engine

from app.audits.models import Audit, AuditState
from app.keys.service import create_key, revoke_key
from app.settings import Settings
from tests.factories import make_finished_audit
from tests.web.conftest import Watched, watched
from tests.web.published import publish_audit, review_texts
from tests.web.reviewing import decisions, open_audit, pressed
from tests.web.test_pages import HOSTILE

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.timeout(600)]


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
        undone = page.locator("tr[data-index]").nth(2).locator("[data-act][aria-pressed=true]")
        expect(undone).to_have_count(0)
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
            first = other.locator("tr[data-index]").first
            expect(first.locator("[data-act=drop][aria-pressed=true]")).to_have_count(1)
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
