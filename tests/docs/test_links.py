"""Links between pages lead to pages, and to headings that exist."""

import re

import pytest

from app.api_reference import slug
from tests.docs.pages import PAGES, ROOT, text_of

_CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors_of(page: str) -> set[str]:
    """Return what a link into the page may name: its headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(_CODE, lambda m: m[0].strip("`"), text_of(page)), re.MULTILINE
    )
    return {slug(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for path, anchor in _LINK.findall(_CODE.sub("", text_of(page))):
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        if anchor:
            name = target.relative_to(ROOT.resolve()).as_posix()
            assert anchor in anchors_of(name), f"{page}: {path}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_every_page_is_in_the_index(page: str) -> None:
    """docs/README.md leads to every page, and README.md to docs/README.md."""
    index = ROOT / "docs" / "README.md"
    linked = {
        (index.parent / path).resolve() for path, _ in _LINK.findall(index.read_text("utf-8"))
    }
    assert (ROOT / page).resolve() in linked | {index.resolve()}
    assert "(docs/README.md)" in text_of("README.md")
