"""The calls about webhooks."""

from collections.abc import AsyncGenerator

from winnow.calls.base import Calls, path_of
from winnow.requests import WebhookRequest
from winnow.results import Delivery, NewWebhook, Page, Webhook


class WebhookCalls(Calls):
    """Be told when audits, rankings and experiments end; messages follow Standard Webhooks."""

    async def create(
        self, url: str, *, events: list[str] | None = None, description: str | None = None
    ) -> NewWebhook:
        """Make a webhook; the answer alone has its secret.

        Not sent again when the answer is lost: that would be a second webhook.

        Args:
            url: https, at a public address.
            events: what to be told of; everything by default.
            description: for people.
        """
        body = WebhookRequest(url=url, events=events, description=description).body()
        return await self._post_once(NewWebhook, path_of("webhooks"), body)

    def list(self, *, page_size: int = 100) -> AsyncGenerator[Webhook, None]:
        """Yield your webhooks, the newest first."""
        return self._pages(Page[Webhook], path_of("webhooks"), {"limit": page_size})

    async def get(self, webhook_id: str) -> Webhook:
        """Return a webhook, without its secret."""
        return await self._connection.ask(Webhook, "GET", path_of("webhooks", webhook_id))

    async def delete(self, webhook_id: str) -> None:
        """Remove a webhook with its deliveries."""
        await self._delete(path_of("webhooks", webhook_id))

    async def rotate(self, webhook_id: str) -> NewWebhook:
        """Return the webhook with a new secret; for a day the one before signs too."""
        return await self._post_once(NewWebhook, path_of("webhooks", webhook_id, "rotate"))

    async def test(self, webhook_id: str) -> Delivery:
        """Send a message of type webhook.test; the list of deliveries tells how it went."""
        return await self._post_once(Delivery, path_of("webhooks", webhook_id, "test"))

    def deliveries(
        self, webhook_id: str, *, page_size: int = 100
    ) -> AsyncGenerator[Delivery, None]:
        """Yield what a webhook was told, or will be, the newest first."""
        path = path_of("webhooks", webhook_id, "deliveries")
        return self._pages(Page[Delivery], path, {"limit": page_size})

    async def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send a message again, under the same `webhook-id`."""
        path = path_of("webhooks", webhook_id, "deliveries", delivery_id, "redeliver")
        return await self._post_once(Delivery, path)
