"""Which licences there are, and which of them a user of Winnow may be asked to accept."""

import re
from importlib import metadata

from license_expression import ExpressionError, get_spdx_licensing

from supply_chain.pins import Pin, pinned

ALLOWED = frozenset(
    {
        *("0BSD", "Apache-2.0", "BlueOak-1.0.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0"),
        *("HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "PostgreSQL", "PSF-2.0", "Python-2.0"),
        *("Unlicense", "Zlib", "BSL-1.0", "Apache-2.0 WITH LLVM-exception", "CNRI-Python"),
    }
)
# what is neither on the list nor says clearly what it is, and why it may stay
EXCEPTIONS = {
    "atheris": "says nothing; its LICENSE file is Apache-2.0. Of the tests alone",
    "axe-playwright-python": "says nothing; its LICENSE file is MIT's. Of the tests alone",
    "certifi": "MPL-2.0: a list of certificates, used unchanged; the licence is per file",
    "hypothesis": "MPL-2.0: of the tests alone, used unchanged; the licence is per file",
    "orjson": "MPL-2.0 or Apache-2.0 or MIT by part; used unchanged, and MPL-2.0 is per file",
    "pathspec": "MPL-2.0: of mypy, used unchanged; the licence is per file",
    "psycopg": "LGPL-3.0: a library that is called, unchanged, and can be replaced",
    "psycopg-binary": "LGPL-3.0: as psycopg, of which it is the compiled part",
    "tqdm": "MPL-2.0 and MIT: used unchanged; the licence is per file",
}
# the words of classifiers and of old metadata, as SPDX
_SPELLINGS = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd-3-clause license": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
    "the mit license (mit)": "MIT",
}
_LICENSING = get_spdx_licensing()
_LONGEST_NAME = 100  # longer ones are the licence's text


def licence_of(distribution: metadata.Distribution) -> str:
    """Return what a package says of its licence, as SPDX where it can be understood."""
    told = distribution.metadata.json
    if expression := told.get("license_expression"):
        return str(expression)
    classified = [
        value.rpartition(" :: ")[2]
        for value in told.get("classifier", [])
        if value.startswith("License :: ")
        and not value.endswith((" OSI Approved", "DFSG approved"))
    ]
    free = str(told.get("license") or "").strip()
    names = classified or [re.split(r"\n", free)[0][:_LONGEST_NAME]]
    return " AND ".join(f"({_spdx(name)})" if " " in name else _spdx(name) for name in names)


def _spdx(name: str) -> str:
    return _SPELLINGS.get(name.strip().lower(), name.strip())


def is_allowed(licence: str) -> bool:
    """Return whether a user can choose allowed licences alone."""
    try:
        parsed = _LICENSING.parse(licence.strip() or "unknown", simple=False)
    except ExpressionError:
        return False
    return parsed is not None and _holds(parsed)


def _holds(expression: object) -> bool:
    arguments = getattr(expression, "args", ())
    if not arguments:
        return str(getattr(expression, "key", expression)) in ALLOWED
    holds = [_holds(part) for part in arguments]
    return any(holds) if type(expression).__name__ == "OR" else all(holds)


def refused() -> list[str]:
    """Return a line for every pinned package whose licence nobody has allowed or explained."""
    return [
        f"{pin.name} {pin.version}: {licence_of(pin.distribution) or 'says nothing'}"
        for pin in pinned()
        if pin.distribution is not None and not _is_explained(pin)
    ]


def _is_explained(pin: Pin) -> bool:
    return pin.key in EXCEPTIONS or is_allowed(licence_of(pin.distribution))  # type: ignore[arg-type]
