"""Idempotency keys: the same key with the same body is the same answer (SERVICE.md, section 1)."""

import hashlib
import json
from dataclasses import dataclass

from pydantic import BaseModel
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.audits.models import IdempotencyKey
from app.errors import Conflict, InvalidRequest


@dataclass(frozen=True)
class KeyedCall:
    """A call that makes something, with a key of the caller's.

    Attributes:
        tenant: whose call it is; keys of others do not count.
        route: method and path, with the ids in it.
        key: the header's value.
        digest: of the body.
        thing: what the call makes, as errors name it.
    """

    tenant: str
    route: str
    key: str
    digest: str
    thing: str

    @classmethod
    def of(cls, body: BaseModel, *, tenant: str, route: str, key: str, thing: str) -> "KeyedCall":
        """Return a call with the SHA-256 of what its body says.

        Spaces and the order of fields do not count.
        """
        said = body.model_dump(mode="json", exclude_unset=True)
        canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
        return cls(tenant, route, key, hashlib.sha256(canonical.encode()).hexdigest(), thing)

    def claim(self, session: Session, answer_id: str) -> bool:
        """Bind the key to what is being made, in the caller's transaction.

        A twin that is in another transaction is waited for.

        Returns:
            Whether the key was free.
        """
        row = insert(IdempotencyKey).values(
            tenant=self.tenant,
            route=self.route,
            key=self.key,
            body_sha256=self.digest,
            answer_id=answer_id,
        )
        claimed = session.execute(row.on_conflict_do_nothing().returning(IdempotencyKey.key))
        return claimed.first() is not None

    def first_answer(self, session: Session) -> str | None:
        """Return the id of what the key was given for before; None for a key that is new.

        Raises:
            InvalidRequest: the key came with another body.
        """
        bound = session.get(IdempotencyKey, (self.tenant, self.route, self.key))
        if bound is None:
            return None
        if bound.body_sha256 != self.digest:
            raise InvalidRequest.at(
                "header.Idempotency-Key",
                "This key came with another body before. Send the body as it was, or a new key for "
                f"a new {self.thing}.",
            )
        return bound.answer_id

    def is_gone(self, answer_id: str) -> Conflict:
        """Return the error for a key whose answer was deleted."""
        return Conflict(
            f"This key's {self.thing}, {answer_id}, was deleted. Send a new key for a new "
            f"{self.thing}."
        )
