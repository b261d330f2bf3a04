"""The calls about what the service offers, and whether it is ready."""

import httpx2

from winnow.calls.base import Calls, path_of
from winnow.connection import parse
from winnow.errors import error_of
from winnow.results import Aggregation, Alive, Estimator, Readiness


class CatalogueCalls(Calls):
    """What can be computed, and by whom."""

    async def estimators(self) -> list[Estimator]:
        """Return the estimators that the service offers."""
        return await self._connection.ask(list[Estimator], "GET", path_of("estimators"))

    async def aggregations(self) -> list[Aggregation]:
        """Return the aggregations that the service offers."""
        return await self._connection.ask(list[Aggregation], "GET", path_of("aggregations"))

    async def alive(self) -> Alive:
        """Return the version of the service, if it answers at all."""
        return await self._connection.ask(Alive, "GET", "/healthz")

    async def readiness(self) -> Readiness:
        """Return what the service says of its parts, also when it is not ready."""
        response = await self._connection.answer("GET", "/readyz")
        if response.status_code not in {httpx2.codes.OK, httpx2.codes.SERVICE_UNAVAILABLE}:
            raise error_of(response)
        return parse(Readiness, response)
