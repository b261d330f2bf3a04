"""The least that can answer where an audit stands: uvicorn, psycopg, one row by its key, as JSON.

No keys, no tenants, no checks, no logs. It is what `benchmarks.service` compares with.

    python -m benchmarks.bare_endpoint FILE_DESCRIPTOR DATABASE_URL
"""

import asyncio
import socket
import sys
from typing import Any

import orjson
import psycopg
import uvicorn
from psycopg.rows import dict_row

CONNECTIONS = 16
ONE = "SELECT * FROM audits WHERE id = %s"


class BareEndpoint:
    """`GET /v1/audits/{id}` on a few database connections that stay open."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._free: asyncio.Queue[psycopg.AsyncConnection[dict[str, Any]]] = asyncio.Queue()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401  ASGI
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        connection = await self._free.get()
        try:
            found = await connection.execute(ONE, (scope["path"].rpartition("/")[2],))
            row = await found.fetchone()
        finally:
            self._free.put_nowait(connection)
        body = orjson.dumps(row)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _live(self, receive: Any, send: Any) -> None:  # noqa: ANN401  ASGI
        await receive()
        for _ in range(CONNECTIONS):
            connection = await psycopg.AsyncConnection.connect(
                self._url, autocommit=True, row_factory=dict_row
            )
            self._free.put_nowait(connection)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        while not self._free.empty():
            await self._free.get_nowait().close()
        await send({"type": "lifespan.shutdown.complete"})


def main() -> None:
    """Serve on an inherited socket."""
    config = uvicorn.Config(BareEndpoint(sys.argv[2]), access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])


if __name__ == "__main__":
    main()
