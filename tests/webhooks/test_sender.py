"""The sender: what is owed reaches a real receiver, through failures and restarts."""

import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine, text

from app.db import transaction
from app.settings import Settings
from app.webhooks import sender as sender_module
from app.webhooks.deliveries import claim_due
from app.webhooks.models import Webhook, WebhookDelivery
from app.webhooks.sender import WebhookSender
from tests.factories import make_audit
from tests.webhooks.receiver import Receiver, receiving
from tests.webhooks.test_deliveries import make_due, owe
from tests.webhooks.test_outbox import cancel, make_webhook, owed

Start = Callable[[], WebhookSender]


@pytest.fixture
def start(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts senders that look often."""
    monkeypatch.setattr(sender_module, "LOOK_SECONDS", 0.02)
    started: list[WebhookSender] = []

    def start() -> WebhookSender:
        sender = WebhookSender(engine, settings)
        sender.start()
        started.append(sender)
        return sender

    yield start
    for sender in started:
        sender.stop()
        assert not sender.is_alive()


@pytest.fixture
def webhook(engine: Engine, receiver: Receiver) -> Webhook:
    return make_webhook(engine, url=receiver.url)


def wait_until_over(engine: Engine) -> list[WebhookDelivery]:
    end = time.monotonic() + 20
    while any(delivery.state == "pending" for delivery in owed(engine)):
        assert time.monotonic() < end, owed(engine)
        time.sleep(0.02)
    return owed(engine)


def test_an_end_reaches_the_receiver(
    engine: Engine, webhook: Webhook, receiver: Receiver, start: Start
) -> None:
    start()
    audit = make_audit(engine)
    cancel(engine, audit.id)
    (received,) = receiver.wait_for(1)
    message = received.verify(webhook.secret)
    assert (message["type"], message["data"]["id"]) == ("audit.cancelled", audit.id)
    (delivery,) = wait_until_over(engine)
    assert (delivery.state, delivery.id, delivery.attempts) == ("succeeded", received.id, 1)


def test_a_receiver_in_trouble_gets_it_at_the_third_try_under_the_same_id(
    engine: Engine, webhook: Webhook, receiver: Receiver, start: Start
) -> None:
    receiver.statuses = [500, 500, 200]
    start()
    cancel(engine, make_audit(engine).id)
    received = receiver.wait_for(3)
    (delivery,) = wait_until_over(engine)
    assert {each.id for each in received} == {delivery.id}
    assert len({each.body for each in received}) == 1
    assert [entry["status_code"] for entry in delivery.history] == [500, 500, 200]
    assert [entry["attempt"] for entry in delivery.history] == [1, 2, 3]
    assert delivery.error is None
    for each in received:
        each.verify(webhook.secret)


def test_what_a_killed_process_had_claimed_is_sent_by_the_next(
    engine: Engine, webhook: Webhook, receiver: Receiver, start: Start
) -> None:
    owe(engine, webhook)
    (lost,) = claim_due(engine, limit=1)  # and the process dies
    make_due(engine, lease_until=None)
    start()
    assert receiver.wait_for(1)[0].id == lost.delivery_id


def test_two_processes_send_each_message_once(
    engine: Engine, webhook: Webhook, receiver: Receiver, start: Start
) -> None:
    ids = owe(engine, webhook, 10)
    others = [make_webhook(engine, url=receiver.url) for _ in range(5)]
    for other in others:
        ids += owe(engine, other, 2)
    start()
    start()
    wait_until_over(engine)
    assert sorted(each.id for each in receiver.received) == sorted(ids)


def test_a_slow_receiver_holds_up_nobody_else(
    engine: Engine, webhook: Webhook, receiver: Receiver, start: Start
) -> None:
    owe(engine, webhook, 5)
    receiver.drips = True
    with receiving() as quick:
        start()
        receiver.wait_for(1)
        owe(engine, make_webhook(engine, url=quick.url))
        quick.wait_for(1, seconds=5)
    assert len(receiver.received) == 1


def test_a_stop_breaks_off_and_the_next_start_sends(
    engine: Engine, webhook: Webhook, receiver: Receiver, start: Start
) -> None:
    owe(engine, webhook)
    receiver.drips = True
    sender = start()
    receiver.wait_for(1)
    began = time.monotonic()
    sender.stop()
    assert time.monotonic() - began < 3
    (delivery,) = owed(engine)
    assert (delivery.state, delivery.tries_left, delivery.history) == ("pending", 8, [])
    receiver.drips = False
    start()
    assert len({each.id for each in receiver.wait_for(2)}) == 1


def test_it_goes_on_when_the_database_is_back(
    engine: Engine, webhook: Webhook, receiver: Receiver, start: Start
) -> None:
    owe(engine, webhook)
    with transaction(engine) as session:
        session.execute(text("ALTER TABLE webhook_deliveries RENAME TO away"))
    start()
    time.sleep(0.2)
    with transaction(engine) as session:
        session.execute(text("ALTER TABLE away RENAME TO webhook_deliveries"))
    receiver.wait_for(1)
    wait_until_over(engine)
