"""Deliveries: held by one sender at a time, tried again with growing pauses, never forgotten."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from app.db import transaction
from app.webhooks.calls import Outcome
from app.webhooks.deliveries import ClaimedDelivery, claim_due, give_back, record
from app.webhooks.models import MAX_TRIES, DeliveryState, Webhook, WebhookDelivery
from app.webhooks.outbox import new_delivery
from tests.factories import long_ago
from tests.webhooks.test_outbox import make_webhook, owed

BROKEN = Outcome(500, "The receiver answered 500.", 0.1)
DONE = Outcome(204, None, 0.1)
GONE = Outcome(410, "The receiver answered 410.", 0.1)


@pytest.fixture
def webhook(engine: Engine) -> Webhook:
    return make_webhook(engine)


def owe(engine: Engine, webhook: Webhook, count: int = 1) -> list[str]:
    made = [new_delivery(webhook.id, "webhook.test", {"n": number}) for number in range(count)]
    with transaction(engine) as session:
        session.add_all(made)
        return [delivery.id for delivery in made]


def take(engine: Engine) -> ClaimedDelivery:
    (claimed,) = claim_due(engine, limit=4)
    return claimed


def note(engine: Engine, claimed: ClaimedDelivery, outcome: Outcome) -> WebhookDelivery:
    record(engine, claimed, outcome, retry_seconds=8)
    with Session(engine) as session:
        return session.get_one(WebhookDelivery, claimed.delivery_id)


def make_due(engine: Engine, **values: object) -> None:
    """Let the next attempt of all that is owed be due, or change it otherwise."""
    with transaction(engine) as session:
        session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.state == DeliveryState.PENDING)
            .values(values or {"next_attempt_at": long_ago()})
        )


def test_success_ends_it(engine: Engine, webhook: Webhook) -> None:
    owe(engine, webhook)
    delivery = note(engine, take(engine), DONE)
    assert (delivery.state, delivery.status_code, delivery.error) == ("succeeded", 204, None)
    assert delivery.finished_at is not None
    assert claim_due(engine, limit=4) == []


def test_tries_go_on_for_about_a_day_under_one_id(engine: Engine, webhook: Webhook) -> None:
    (delivery_id,) = owe(engine, webhook)
    pauses = []
    for attempt in range(1, MAX_TRIES + 1):
        claimed = take(engine)
        assert claimed.call.message_id == delivery_id
        delivery = note(engine, claimed, BROKEN)
        assert (delivery.attempts, len(delivery.history)) == (attempt, attempt)
        if delivery.next_attempt_at is not None:
            pauses.append((delivery.next_attempt_at - datetime.now(UTC)).total_seconds())
        assert claim_due(engine, limit=4) == []
        make_due(engine)
    assert (delivery.state, delivery.next_attempt_at) == ("failed", None)
    assert len(pauses) == MAX_TRIES - 1
    assert 5 < pauses[0] < 10
    assert all(later > earlier for earlier, later in itertools.pairwise(pauses))
    assert 18 < sum(pauses) / 3600 < 30


def test_410_disables_the_webhook_and_drops_what_it_is_owed(
    engine: Engine, webhook: Webhook
) -> None:
    owe(engine, webhook, 3)
    delivery = note(engine, take(engine), GONE)
    assert (delivery.state, delivery.status_code) == ("failed", 410)
    with Session(engine) as session:
        row = session.get_one(Webhook, webhook.id)
    assert row.disabled_at is not None
    assert row.disabled_reason == "The receiver answered 410 Gone."
    assert {each.state for each in owed(engine)} == {"failed"}
    assert claim_due(engine, limit=4) == []


def test_of_many_senders_one_gets_it(engine: Engine) -> None:
    """Several API processes look at once; each message is sent once."""
    for _ in range(5):
        owe(engine, make_webhook(engine))
    together = threading.Barrier(4)

    def look(_number: int) -> list[str]:
        together.wait()
        return [claimed.delivery_id for claimed in claim_due(engine, limit=5)]

    with ThreadPoolExecutor(4) as pool:
        found = [each for part in pool.map(look, range(4)) for each in part]
    assert len(found) == len(set(found))
    found += [claimed.delivery_id for claimed in claim_due(engine, limit=5)]
    assert sorted(found) == [each.id for each in owed(engine)]


def test_a_webhook_gets_one_message_at_a_time_the_oldest_first(engine: Engine) -> None:
    """So a receiver that is slow or gone holds up nobody else."""
    busy, other = make_webhook(engine), make_webhook(engine)
    first, second = owe(engine, busy, 2)
    (third,) = owe(engine, other)
    with transaction(engine) as session:
        session.get_one(WebhookDelivery, first).next_attempt_at = long_ago()
    claims = claim_due(engine, limit=10)
    assert {claimed.delivery_id for claimed in claims} == {first, third}
    assert claim_due(engine, limit=10) == []
    for claimed in claims:
        note(engine, claimed, DONE)
    assert take(engine).delivery_id == second


class TestASenderThatDies:
    @pytest.fixture
    def lost(self, engine: Engine, webhook: Webhook) -> ClaimedDelivery:
        owe(engine, webhook)
        claimed = take(engine)
        assert claim_due(engine, limit=4) == []
        make_due(engine, lease_until=long_ago())
        return claimed

    def test_its_message_is_sent_by_another_under_the_same_id(
        self, engine: Engine, lost: ClaimedDelivery
    ) -> None:
        again = take(engine)
        assert again.call == lost.call
        assert (lost.attempt, again.attempt) == (1, 2)

    def test_what_it_tells_later_counts_no_more(
        self, engine: Engine, lost: ClaimedDelivery
    ) -> None:
        again = take(engine)
        assert note(engine, lost, GONE).state == "pending"
        give_back(engine, lost)
        assert claim_due(engine, limit=4) == []
        assert note(engine, again, DONE).state == "succeeded"
        assert note(engine, lost, BROKEN).state == "succeeded"

    def test_a_message_that_kills_its_senders_is_not_sent_for_ever(
        self, engine: Engine, lost: ClaimedDelivery
    ) -> None:
        for _ in range(MAX_TRIES):
            last = take(engine)
            make_due(engine, lease_until=long_ago())
        assert note(engine, last, BROKEN).state == "failed"


def test_an_attempt_that_is_broken_off_does_not_count(engine: Engine, webhook: Webhook) -> None:
    owe(engine, webhook)
    give_back(engine, take(engine))
    (delivery,) = owed(engine)
    assert delivery.tries_left == MAX_TRIES
    assert take(engine).attempt == 2


def test_the_old_secret_signs_too_until_its_time_is_over(engine: Engine) -> None:
    until = datetime.now(UTC) + timedelta(hours=1)
    rotated = make_webhook(engine, previous_secret="whsec_b2xk", previous_secret_until=until)
    owe(engine, rotated)
    assert take(engine).call.secrets == [rotated.secret, "whsec_b2xk"]
    with transaction(engine) as session:
        session.execute(update(Webhook).values(previous_secret_until=long_ago()))
    make_due(engine, lease_until=None)
    assert take(engine).call.secrets == [rotated.secret]
