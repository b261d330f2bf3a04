"""axe-core finds no serious fault, in both themes; and no script or style breaks the policy."""

from pathlib import Path
from typing import Literal

import httpx2
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import Engine

from app.audits.models import Audit, AuditState
from app.settings import Settings
from tests.factories import make_audit, make_ended_audit
from tests.web.conftest import watched
from tests.web.published import publish_audit, review_texts

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.timeout(600)]
SERIOUS = {"serious", "critical"}
Theme = Literal["light", "dark"]


def faults(page: Page) -> list[str]:
    """Return the serious faults of what the page shows now."""
    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:200]} ({node['failureSummary'][:200]})"
        for fault in found
        if fault["impact"] in SERIOUS
        for node in fault["nodes"][:3]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_shuts_anybody_out(
    *,
    site: str,
    engine: Engine,
    settings: Settings,
    browser: Browser,
    theme: Theme,
    tmp_path: Path,
) -> None:
    audit = publish_audit(engine, settings, texts=review_texts(70))
    running, failed = make_audit(engine), make_ended_audit(engine, AuditState.FAILED)
    with browser.new_context(
        viewport={"width": 1280, "height": 900}, color_scheme=theme
    ) as context:
        tab = watched(context)
        page = tab.page
        found: dict[str, list[str]] = {}
        page.goto(site)
        found["list"] = faults(page)
        page.get_by_role("button", name="New audit").click()
        found["form"] = faults(page)
        for name, one in (("running", running), ("failed", failed)):
            page.goto(f"{site}/audits/{one.id}")
            found[name] = faults(page)
        open_evidence(page, site, audit)
        found["audit"] = faults(page)
        page.keyboard.press("?")
        found["help"] = faults(page)
        page.goto(f"{site}/audits/{audit.id}/samples/3")
        found["sample"] = faults(page)
        assert tab.complaints == []
        report = tmp_path / "report.html"
        report.write_text(httpx2.get(f"{site}/v1/audits/{audit.id}/report.html").text)
        page.goto(report.as_uri())
        expect(page.get_by_text("most suspect samples")).to_be_visible()
        # axe is a script, and a report allows none
        assert page.evaluate("getComputedStyle(document.querySelector('.card')).display") == "grid"
        assert tab.complaints == []
        with browser.new_context(bypass_csp=True, color_scheme=theme) as open_one:
            other = open_one.new_page()
            other.goto(report.as_uri())
            found["report"] = faults(other)
    assert {name: each for name, each in found.items() if each} == {}


def open_evidence(page: Page, site: str, audit: Audit) -> None:
    """Open an audit's page with a decision and the evidence of a sample."""
    page.goto(f"{site}/audits/{audit.id}")
    page.get_by_label("Reviewer").fill("anna")
    expect(page.locator("#cut")).to_be_visible()
    page.get_by_label("Reviewer").blur()
    for key in ("j", "a", "Enter"):
        page.keyboard.press(key)
    expect(page.locator(".why")).to_be_visible()
    expect(page.locator("[data-act=accept][aria-pressed=true]")).to_have_count(1)
