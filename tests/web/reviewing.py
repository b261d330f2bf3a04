"""The review as a browser has it, and as the API tells of it."""

import httpx2
from playwright.sync_api import Page, expect

from app.audits.models import Audit


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
