"""Take the pictures of docs/screenshots: python -m tests.web.screenshots [folder]."""

import csv
import io
import sys
import tempfile
from pathlib import Path

import httpx2
from playwright.sync_api import Browser, Page, sync_playwright

from app.audits.models import Audit, AuditState
from app.db import make_engine, transaction
from app.embedded import embedded_postgres, embedded_valkey
from app.jobs import make_celery
from app.migrate import migrate
from app.settings import Settings
from tests.factories import make_audit, make_ended_audit
from tests.web.conftest import chromium, served
from tests.web.published import publish_audit, review_texts

FOLDER = Path(__file__).parents[2] / "docs" / "screenshots"
WIDTHS = {1280: 720, 390: 780}
MAX_BYTES = 200_000


def main() -> None:
    """Publish audits, look at them in every width and theme, and keep what was seen."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = chromium()
    if path is None:
        raise SystemExit("No chromium is installed.")
    with (
        tempfile.TemporaryDirectory() as data,
        embedded_postgres(Path(data)) as database_url,
        embedded_valkey() as broker_url,
        sync_playwright() as playwright,
    ):
        settings = Settings(
            database_url=database_url,
            broker_url=broker_url,
            data_dir=Path(data),
            require_keys=False,
        )
        engine = make_engine(settings.require_database_url())
        migrate(engine)
        browser = playwright.chromium.launch(
            executable_path=path, args=["--headless", "--no-sandbox"]
        )
        for site in served(settings, engine, make_celery(settings)):
            texts = review_texts(2000)
            train = {"reference": upload(site, "film-reviews.csv", texts)}
            failed = make_ended_audit(engine, AuditState.FAILED)
            audit = publish_audit(engine, settings, texts=texts, train=train)
            running = make_audit(
                engine, train={"reference": upload(site, "support-tickets.csv", texts)}
            )
            with transaction(engine) as session:
                row = session.get_one(Audit, running.id)
                row.state, row.stage, row.progress = AuditState.COMPUTING, "gradients", 0.42
                row.samples_per_second, row.eta_seconds, row.num_train = 412.0, 96.0, 2000
            paths = {"running": f"/audits/{running.id}", "failed": f"/audits/{failed.id}"}
            take_all(browser, site, audit, paths, folder)
        browser.close()
        engine.dispose()


def upload(site: str, name: str, texts: list[str]) -> str:
    """Upload a table of texts and return its reference."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["text", "label"])
    writer.writerows((text, ("negative", "positive")[i % 2]) for i, text in enumerate(texts))
    answer = httpx2.post(f"{site}/v1/datasets", files={"file": (name, table.getvalue())})
    answer.raise_for_status()
    return str(answer.json()["reference"])


def take_all(
    browser: Browser, site: str, audit: Audit, paths: dict[str, str], folder: Path
) -> None:
    """Take every page at both widths in both themes."""
    for width, height in WIDTHS.items():
        for theme in ("light", "dark"):
            with browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if theme == "dark" else "light",
            ) as context:
                page = context.new_page()
                page.goto(site)
                keep(page, folder / f"audits-{width}-{theme}.png")
                page.get_by_role("button", name="New audit").first.click()
                keep(page, folder / f"new-audit-{width}-{theme}.png")
                for name, path in paths.items():
                    page.goto(f"{site}{path}")
                    page.wait_for_timeout(300)
                    keep(page, folder / f"{name}-{width}-{theme}.png")
                page.goto(f"{site}/audits/{audit.id}")
                page.get_by_label("Reviewer").fill("anna")
                page.locator("#cut").wait_for()
                page.get_by_label("Reviewer").blur()
                keep(page, folder / f"audit-{width}-{theme}.png")
                page.locator(".overview .panel").last.scroll_into_view_if_needed()
                keep(page, folder / f"layers-{width}-{theme}.png")
                page.keyboard.press("j")
                for key in ("a", "x", "d"):
                    page.keyboard.press(key)
                page.locator("[data-act=drop][aria-pressed=true]").first.wait_for()
                page.evaluate("document.querySelector('#suspects').scrollIntoView()")
                page.wait_for_timeout(600)
                keep(page, folder / f"suspects-{width}-{theme}.png")
                page.keyboard.press("Enter")
                page.locator(".why").wait_for()
                page.evaluate("document.querySelector('[aria-current]').scrollIntoView()")
                page.wait_for_timeout(600)
                keep(page, folder / f"evidence-{width}-{theme}.png")
                for _ in range(3):  # the next turn decides again
                    page.keyboard.press("u")
                page.get_by_text("Undone: accept").wait_for()


def keep(page: Page, path: Path) -> None:
    """Keep what is on the screen.

    Raises:
        SystemExit: the file is too large for the repository.
    """
    page.screenshot(path=path)
    if path.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
