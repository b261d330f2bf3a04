"""A hundred clients poll audits of a working service: is an answer lost, and how long do they wait?

`winnow serve` with its worker does small audits one after the other, each uploaded, paged, decided
on, exported and deleted. Meanwhile every client polls the status of one of the audits that ended,
by a fixed schedule (an open loop): an answer counts from when its call was due.

    .venv/bin/python -m benchmarks.clients [--clients 100] [--seconds 60] [--every 2]
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import httpx2

from benchmarks.http_load import get, open_loop
from benchmarks.soak import Load, serving

NUM_POLLED = 5
SHARES = (0.5, 0.95, 0.99)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=float, default=2, help="Seconds between a client's polls.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="winnow-clients-") as name:
        folder = Path(name)
        with serving(folder) as (_, http):
            load = Load(http, folder, at_once=2)
            polled = [load.submit() for _ in range(NUM_POLLED)]
            _wait(http, polled)
            requests = [
                get(f"/v1/audits/{polled[client % NUM_POLLED]}")
                for client in range(options.clients)
            ]
            ended = threading.Event()
            worker = threading.Thread(target=_work, args=(load, ended))
            worker.start()
            try:
                found = open_loop(
                    int(http.base_url.port or 0),
                    requests,
                    rate=options.clients / options.every,
                    seconds=options.seconds,
                )
            finally:
                ended.set()
                worker.join()
    print(
        f"{options.clients} clients, a poll every {options.every:g} s each, {options.seconds:g} s"
    )
    print(f"answers: {dict(found.statuses)}; audits done meanwhile: {dict(load.ended)}")
    shares = "  ".join(f"p{100 * share:g} {found.percentile(share):.0f} ms" for share in SHARES)
    most = max(found.milliseconds)
    print(f"{shares}  most {most:.0f} ms  (of it by this program: {found.late:.0f})")


def _wait(http: httpx2.Client, audits: list[str]) -> None:
    while not all(http.get(f"/v1/audits/{audit}").json()["done"] for audit in audits):
        time.sleep(1)


def _work(load: Load, ended: threading.Event) -> None:
    while not ended.is_set():
        load.step()
        time.sleep(0.2)


if __name__ == "__main__":
    main()
