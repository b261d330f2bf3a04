"""Check what Winnow is built from: `python -m supply_chain [--sbom FILE] [--require-advisories]`.

Exits with 1 when a licence is neither allowed nor explained, or an advisory is not ignored.
"""

import argparse
import json
import sys
from pathlib import Path

from supply_chain.advisories import audit
from supply_chain.licences import EXCEPTIONS, refused
from supply_chain.materials import bill_of_materials
from supply_chain.pins import pinned

# id of an advisory: why it does not concern Winnow
NOT_CONCERNED: dict[str, str] = {}


def main() -> int:
    """Run every check and say what was found and what was not done."""
    parser = argparse.ArgumentParser(prog="supply_chain", description=__doc__)
    parser.add_argument("--sbom", type=Path, help="write the bill of materials here")
    parser.add_argument(
        "--require-advisories", action="store_true", help="fail where no source can be reached"
    )
    options = parser.parse_args()
    pins = list(pinned())
    missing = [pin.name for pin in pins if pin.distribution is None]
    bad = refused()
    print(f"licences: {len(pins) - len(missing)} packages, {len(EXCEPTIONS)} exceptions explained")
    if missing:
        print(f"licences: NOT CHECKED, not installed here: {', '.join(missing)}")
    for line in bad:
        print(f"licences: NOT ALLOWED: {line}")
    if options.sbom:
        options.sbom.write_text(json.dumps(bill_of_materials(), indent=2) + "\n")
        print(f"bill of materials: {len(pins)} packages in {options.sbom}")
    told = audit()
    if told.source is None:
        print(f"advisories: NOT CHECKED. No source of advisories can be used here: {told.trouble}")
    else:
        print(f"advisories: asked {told.source} about {len(pins)} packages")
        if told.skipped:
            print(f"advisories: NOT CHECKED, unknown there: {', '.join(told.skipped)}")
    weak = [line for line in told.found if not any(known in line for known in NOT_CONCERNED)]
    for line in weak:
        print(f"advisories: FOUND: {line}")
    return int(bool(bad or weak or (told.source is None and options.require_advisories)))


if __name__ == "__main__":
    sys.exit(main())
