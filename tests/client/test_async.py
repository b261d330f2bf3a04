"""AsyncClient has the methods of Client, and they do the same under an event loop."""

import asyncio
import inspect
from pathlib import Path

import pytest
from sqlalchemy import Engine
from winnow import AsyncClient, Client, ServiceUnreachable, WinnowError
from winnow.client import Experiments, Webhooks

from app.settings import Settings
from tests.client.answers import audit, file, problem
from tests.client.conftest import ForgetfulService, ScriptedService
from tests.factories import CSV_TABLE, make_audit, make_finished_audit, request_body

CONTENT = b"rank,text\n0,bad film\n"


def public(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(value)
        for name, value in inspect.getmembers(kind, callable)
        if not name.startswith("_") and name != "register"
    }


@pytest.mark.parametrize(
    ("blocking", "other"),
    [
        (Client, AsyncClient),
        (Experiments, type(AsyncClient("http://localhost").experiments)),
        (Webhooks, type(AsyncClient("http://localhost").webhooks)),
    ],
)
def test_both_clients_have_the_same_methods(blocking: type, other: type) -> None:
    own, others = public(blocking), public(other)
    assert own.keys() == others.keys()
    for name, signature in own.items():
        assert signature.parameters.keys() == others[name].parameters.keys(), name
        assert inspect.getdoc(getattr(blocking, name)), name


def test_the_life_of_an_audit(
    url: str, api_key: str, engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    async def story() -> None:
        async with AsyncClient(url, api_key, attempts=2) as client:
            dataset = await client.upload_dataset(CSV_TABLE.encode(), file_format="csv")
            assert [each.id async for each in client.datasets()] == [dataset.id]
            submitted = await client.submit(
                request_body(train={"reference": dataset.reference}), idempotency_key="k"
            )
            assert [each.id async for each in client.audits(state="queued")] == [submitted.id]
            assert (await client.cancel(submitted.id)).cancel_requested_at is not None
            ended = make_finished_audit(engine, settings, num_train=25)
            seen: list[str] = []
            done = await client.wait(ended.id, progress=lambda now: seen.append(now.state))
            assert (done.state, seen) == ("succeeded", ["succeeded"])
            ranks = [each.rank async for each in client.suspects(ended.id, page_size=10)]
            assert ranks == [*range(25)]
            path = await client.download(ended.id, tmp_path / "suspects.csv")
            assert path.read_text().count("\n") == 26
            table = await client.suspects_table(ended.id, "arrow", flagged=True)
            assert table.num_rows == 2
            await client.delete(ended.id)
            with pytest.raises(WinnowError, match="There is no audit"):
                await client.get(ended.id)

    asyncio.run(story())


def test_calls_run_beside_one_another(url: str, api_key: str, engine: Engine) -> None:
    running = [make_audit(engine) for _ in range(5)]

    async def story() -> None:
        async with AsyncClient(url, api_key) as client:
            found = await asyncio.gather(*(client.get(audit.id) for audit in running))
            assert [each.id for each in found] == [audit.id for audit in running]

    asyncio.run(story())


def test_a_busy_service_is_asked_again(service: ScriptedService) -> None:
    service.answers(problem(503), problem(429, retry_after="0"), audit())

    async def story() -> None:
        async with AsyncClient(service.url) as client:
            assert (await client.get("aud_1")).state == "queued"

    asyncio.run(story())
    assert len(service.requests) == 3


def test_other_work_goes_on_while_a_call_pauses(service: ScriptedService) -> None:
    service.answers(problem(503, retry_after="0.5"), audit())

    async def story() -> None:
        async with AsyncClient(service.url) as client:
            call = asyncio.create_task(client.get("aud_1"))
            ticks = 0
            while not call.done():
                await asyncio.sleep(0.01)
                ticks += 1
            assert ticks > 10

    asyncio.run(story())


def test_a_lost_answer_is_one_error(forgetful: ForgetfulService) -> None:
    async def story() -> None:
        async with AsyncClient(forgetful.url, attempts=2) as client:
            with pytest.raises(ServiceUnreachable):
                await client.submit({})

    asyncio.run(story())
    assert len(forgetful.received) == 2


def test_a_download_is_checked(service: ScriptedService, tmp_path: Path) -> None:
    service.answers(file(CONTENT))

    async def story() -> None:
        async with AsyncClient(service.url) as client:
            await client.download("aud_1", tmp_path / "suspects.csv")

    asyncio.run(story())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [CONTENT]


def test_an_iterator_that_is_left_early_closes_its_pages(url: str, api_key: str) -> None:
    with Client(url, api_key) as client:
        client.upload_dataset(CSV_TABLE.encode(), file_format="csv")
        client.upload_dataset(CSV_TABLE.encode(), file_format="csv")
        datasets = client.datasets(page_size=1)
        next(datasets)
        datasets.close()  # type: ignore[attr-defined]
        assert list(datasets) == []
