"""A reviewer's desk: decisions over HTTP, in the words of the tests."""

from typing import Any

from fastapi.testclient import TestClient

from app.audits.models import Audit


class Desk:
    """Where one reviewer works on one audit."""

    def __init__(self, client: TestClient, audit: Audit, reviewer: str | None = None) -> None:
        self.client = client
        self.path = f"/v1/audits/{audit.id}"
        self.reviewer = {"reviewer": reviewer} if reviewer else {}

    def post(self, action: str, *, headers: dict[str, str] | None = None, **body: Any) -> Any:
        body = {"action": action, **self.reviewer, **body}
        return self.client.post(f"{self.path}/decisions", json=body, headers=headers)

    def decide(self, action: str, *indices: int, **body: Any) -> dict[str, Any]:
        named = {"indices": list(indices)} if indices else {}
        response = self.post(action, **{**named, **body})
        assert response.status_code == 201, response.text
        batch: dict[str, Any] = response.json()
        return batch

    def undo(self, batch: dict[str, Any]) -> dict[str, Any]:
        response = self.client.post(
            f"{self.path}/decisions/{batch['id']}/undo", json=self.reviewer or None
        )
        assert response.status_code == 200, response.text
        undone: dict[str, Any] = response.json()
        return undone

    def suspects(self, **query: Any) -> list[dict[str, Any]]:
        response = self.client.get(f"{self.path}/suspects", params={"limit": 1000, **query})
        assert response.status_code == 200, response.text
        data: list[dict[str, Any]] = response.json()["data"]
        return data

    def decided(self) -> dict[int, tuple[str, str | None]]:
        """Return action and label of every decided sample, by index."""
        return {
            of["index"]: (of["decision"]["action"], of["decision"]["label"])
            for of in self.suspects(decision="any")
        }

    def audit(self) -> dict[str, Any]:
        audit: dict[str, Any] = self.client.get(self.path).json()
        return audit
