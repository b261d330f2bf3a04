"""Who did what, by the client and the command."""

from winnow import Client

from tests.client.conftest import Winnow
from tests.factories import request_body


def test_the_client_yields_it_page_by_page_and_narrowed(client: Client) -> None:
    audits = [client.submit(request_body()) for _ in range(3)]
    client.cancel(audits[0].id)
    entries = list(client.trail(page_size=2))
    assert [entry.action for entry in entries] == [
        *("audit.cancel", "audit.submit", "audit.submit", "audit.submit", "key.create")
    ]
    assert {entry.actor for entry in entries[:-1]} == {"test"}
    of_one = list(client.trail(object_id=audits[0].id))
    assert [entry.action for entry in of_one] == ["audit.cancel", "audit.submit"]
    assert [entry.object_id for entry in client.trail(action="audit.cancel")] == [audits[0].id]


def test_the_command_lists_it(winnow: Winnow, client: Client) -> None:
    audit = client.submit(request_body())
    shown = winnow("trail", "--object", audit.id)
    assert shown.exit_code == 0
    (line,) = shown.stdout.splitlines()
    assert line.endswith(f"test  audit.submit  {audit.id}")
    assert '"action": "audit.submit"' in winnow("trail", "--limit", "1", "--json").stdout
