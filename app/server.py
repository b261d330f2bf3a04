"""The API as a process: uvicorn around the application.

    python -P -m app.server FILE_DESCRIPTOR

serves on a socket that `winnow serve` has opened; `winnow api` opens its own.
"""

import gc
import socket
import sys

import uvicorn

from app.logs import configure_logging
from app.main import create_app
from app.middleware import is_loopback_host
from app.settings import Settings, get_settings
from app.slow_clients import PatientProtocol

GRACE_SECONDS = 5


class RefusedToStart(Exception):
    """Starting would be wrong; the message says why and what to do."""


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        RefusedToStart: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise RefusedToStart(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Choose another "
            "address with --host and --port."
        ) from error


class _Server(uvicorn.Server):
    """Lets those go first who wait for news: they would hold up the end as long as it may take."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.watcher.close()  # type: ignore[union-attr]  # it is ours
        await super().shutdown(sockets)


def run_api(settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        RefusedToStart: keys are off on an address that others can reach.
    """
    host = str(listener.getsockname()[0])
    if not settings.require_keys and not is_loopback_host(host):
        raise RefusedToStart(f"Keys cannot be off on {host}, which other machines can reach.")
    configure_logging(settings.log_format)
    config = uvicorn.Config(
        create_app(settings),
        log_config=None,  # structlog's handlers
        log_level="warning",
        access_log=False,  # the middleware writes one line per request
        timeout_graceful_shutdown=GRACE_SECONDS,
        http=PatientProtocol,
    )
    gc.freeze()  # what was made until here stays: no collection needs to walk over it again
    _Server(config).run(sockets=[listener])


def main() -> None:
    """Serve on an inherited socket, with the settings of the environment."""
    run_api(get_settings(), socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
