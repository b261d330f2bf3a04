"""The API's fixtures, on a database that these tests fill."""

from tests.app.conftest import api, client, new_client

__all__ = ["api", "client", "new_client"]
