"""The pages of the documentation and the blocks of code in them.

A comment right before a block says what is to become of it:

    <!-- not executed: why not -->   it is listed with the reason
    <!-- service -->                 it starts the service that all pages talk to
    <!-- file: name -->              it is written to that file, for the blocks after it
    <!-- needs: package -->          it is executed where that package is installed
    <!-- steps -->                   a workflow of GitHub Actions: the commands of its steps run
    <!-- body: Model -->             JSON: a whole request, taken by this model of the API
    <!-- part: Model -->             JSON: some fields of such a request

Without one, `sh` and `python` are executed, in the order of the page.
"""

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = "docs/api.md"  # whole by itself; test_api_reference.py says that it is up to date
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
)
LANGUAGES = frozenset({"sh", "python", "json", "yaml"})
MARKS = frozenset({"not executed", "service", "file", "needs", "steps", "body", "part"})

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_MARK = re.compile(r"<!-- ([a-z ]+?)(?:: ((?:(?!-->).)+?))? -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the marks before it."""

    page: str
    line: int
    language: str
    code: str
    marks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    """Return a page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page in their order."""
    text = text_of(page)
    return [
        Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            textwrap.dedent(match["code"]),
            _marks_before(text[: match.start()]),
        )
        for match in _FENCE.finditer(text)
    ]


def all_blocks() -> list[Block]:
    """Return the blocks of all pages in the languages that are checked."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in LANGUAGES]


def _marks_before(text: str) -> dict[str, str]:
    marks: dict[str, str] = {}
    while match := _MARK.search(text):
        marks[match[1]] = " ".join((match[2] or "").split())
        text = text[: match.start()]
    return marks
