"""Webhooks over HTTP: made, shown without their secret, rotated, tested, read, sent again."""

from typing import Any

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update

from app.db import transaction
from app.main import create_app
from app.settings import Settings
from app.webhooks.models import EventType, Webhook
from tests.factories import long_ago
from tests.webhooks.test_deliveries import BROKEN, DONE, make_due, note, take

URL = "https://example.com/hook?team=7"


def make(client: TestClient, **changes: Any) -> dict[str, Any]:
    response = client.post("/v1/webhooks", json={"url": URL, **changes})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    assert response.headers["location"] == made["links"]["self"]
    return made


def test_the_secret_is_shown_once(client: TestClient) -> None:
    made = make(client, description="for the pipeline")
    assert made["secret"].startswith("whsec_")
    assert made["events"] == [event.value for event in EventType]
    shown = client.get(made["links"]["self"])
    assert shown.json() == {name: value for name, value in made.items() if name != "secret"}
    listed = client.get("/v1/webhooks")
    assert listed.json()["data"] == [shown.json()]
    assert made["secret"] not in shown.text + listed.text


def test_a_new_secret_leaves_the_old_one_a_day(client: TestClient) -> None:
    made = make(client)
    rotated = client.post(f"{made['links']['self']}/rotate").json()
    assert rotated["secret"] != made["secret"]
    assert rotated["previous_secret_until"] is not None
    client.post(f"{made['links']['self']}/test")


def test_events_are_those_that_were_asked_for(client: TestClient) -> None:
    made = make(client, events=["audit.failed", "audit.failed", "experiment.done"])
    assert made["events"] == ["audit.failed", "experiment.done"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"events": []}, "#/events"),
        ({"events": ["audit.exploded"]}, "#/events/0"),
        ({"colour": "red"}, "#/colour"),
        ({"description": "x" * 501}, "#/description"),
        ({"url": None}, "#/url"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, body: dict[str, Any], pointer: str) -> None:
    response = client.post("/v1/webhooks", json={"url": URL, **body})
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == pointer


class TestAddresses:
    @pytest.fixture
    def sealed(self, strict: Settings, engine: Engine, celery: Celery) -> TestClient:
        """A service that allows nothing but public addresses by https, and asks for no keys."""
        update = {"webhook_plain_http": False, "require_keys": False}
        api = create_app(strict.model_copy(update=update), engine, celery)
        return TestClient(api, base_url="http://localhost")

    @pytest.mark.parametrize(
        "url",
        [
            *("http://example.com/", "ftp://example.com/", "example.com", "//example.com", ""),
            *("https://", "https:///hook", "https://:443/", "file:///etc/passwd"),
            *("https://user@example.com/", "https://user:word@example.com/"),
            *("https://example.com:22/", "https://example.com:99999/", "https://example.com:x/"),
            *("https://example.com/#part", "https://example.com/a b", "https://éxample.com/"),
            *("https://example.com\\@127.0.0.1/", "https://[::1/", "https://exa\nmple.com/"),
            *("https://127.0.0.1/", "https://127.1/", "https://0x7f000001/", "https://0/"),
            *("https://localhost/", "https://me.LOCALHOST./", "https://[::ffff:7f00:1]/"),
            *("https://[::1]/", "https://169.254.169.254/", "https://10.0.0.1:8443/"),
            "https://example.com/" + "x" * 2000,
        ],
    )
    def test_those_that_are_never_called_are_refused_by_name(
        self, sealed: TestClient, url: str
    ) -> None:
        response = sealed.post("/v1/webhooks", json={"url": url})
        assert response.status_code == 422, response.text
        assert [error["pointer"] for error in response.json()["errors"]] == ["#/url"]

    @pytest.mark.parametrize(
        "url", [URL, "https://example.com:8443/", "https://93.184.215.14/", "https://a.internal/"]
    )
    def test_others_are_taken_and_checked_at_every_call(self, sealed: TestClient, url: str) -> None:
        assert sealed.post("/v1/webhooks", json={"url": url}).status_code == 201

    @pytest.mark.parametrize("url", ["http://example.com/", "http://127.0.0.1:9000/"])
    def test_an_operator_can_allow_more(self, client: TestClient, url: str) -> None:
        assert make(client, url=url)["url"] == url


class TestDeliveries:
    def test_a_test_message_goes_the_way_of_all_messages(
        self, client: TestClient, engine: Engine
    ) -> None:
        made = make(client)
        response = client.post(f"{made['links']['self']}/test")
        assert response.status_code == 202
        delivery = response.json()
        assert (delivery["type"], delivery["state"]) == ("webhook.test", "pending")
        assert delivery["payload"]["data"] == {"id": made["id"]}
        note(engine, take(engine), BROKEN)
        (told,) = client.get(made["links"]["deliveries"]).json()["data"]
        assert (told["status_code"], told["attempts"]) == (500, 1)
        assert told["error"] == "The receiver answered 500."
        assert told["next_attempt_at"] is not None
        assert [entry["status_code"] for entry in told["history"]] == [500]

    def test_the_log_is_read_in_pages(self, client: TestClient) -> None:
        made = make(client)
        sent = [client.post(f"{made['links']['self']}/test").json()["id"] for _ in range(5)]
        read: list[str] = []
        url = f"{made['links']['deliveries']}?limit=2"
        while url:
            response = client.get(url)
            read += [delivery["id"] for delivery in response.json()["data"]]
            url = response.links.get("next", {}).get("url", "")
        assert read == sent[::-1]

    def test_a_message_is_sent_again_under_its_id_with_all_tries_anew(
        self, client: TestClient, engine: Engine
    ) -> None:
        made = make(client)
        sent = client.post(f"{made['links']['self']}/test").json()
        again = f"{made['links']['deliveries']}/{sent['id']}/redeliver"
        claimed = take(engine)
        assert client.post(again).status_code == 409
        note(engine, claimed, DONE)
        answer = client.post(again)
        assert answer.status_code == 202
        assert (answer.json()["id"], answer.json()["state"]) == (sent["id"], "pending")
        claimed = take(engine)
        assert claimed.call.message_id == sent["id"]
        assert note(engine, claimed, BROKEN).tries_left == 7
        make_due(engine)
        note(engine, take(engine), DONE)
        (told,) = client.get(made["links"]["deliveries"]).json()["data"]
        assert [entry["status_code"] for entry in told["history"]] == [204, 500, 204]

    def test_a_disabled_webhook_is_told_nothing(self, client: TestClient, engine: Engine) -> None:
        made = make(client)
        sent = client.post(f"{made['links']['self']}/test").json()
        with transaction(engine) as session:
            values = {"disabled_at": long_ago(), "disabled_reason": "The receiver answered 410."}
            session.execute(update(Webhook).values(values))
        for rest in ("test", f"deliveries/{sent['id']}/redeliver"):
            response = client.post(f"{made['links']['self']}/{rest}")
            assert response.status_code == 409
            assert "disabled" in response.json()["detail"]

    def test_a_delivery_is_found_under_its_own_webhook_only(self, client: TestClient) -> None:
        one, other = make(client), make(client)
        sent = client.post(f"{one['links']['self']}/test").json()
        path = f"{other['links']['deliveries']}/{sent['id']}/redeliver"
        assert client.post(path).status_code == 404


def test_a_webhook_is_deleted_with_its_deliveries(client: TestClient) -> None:
    made = make(client)
    client.post(f"{made['links']['self']}/test")
    assert client.delete(made["links"]["self"]).status_code == 204
    assert client.get(made["links"]["self"]).status_code == 404
    assert client.get(made["links"]["deliveries"]).status_code == 404


def test_there_are_only_so_many(client: TestClient) -> None:
    for _ in range(20):
        make(client)
    response = client.post("/v1/webhooks", json={"url": URL})
    assert response.status_code == 409
    assert "Delete one" in response.json()["detail"]
