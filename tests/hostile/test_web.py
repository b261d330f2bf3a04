"""Datasets behind https://: fetched from public addresses only, whatever names and servers say.

127.0.0.1 stands for a public address here, by an operator's leave; 127.0.0.2 for one inside.
"""

import gzip
import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from app.references import parse_dataset_reference
from app.settings import Settings
from app.webhooks.calls import Call, Caller
from tests.hostile.conftest import FileServer, resolve_elsewhere
from tests.hostile.names import NameServer
from tests.webhooks.conftest import networks
from tests.webhooks.receiver import receiving
from workers.sources import fetched
from workers.sources.errors import SourceError
from workers.sources.local import ResolvedDataset
from workers.sources.web import Web

TABLE = b"text,label\ngood,a\nbad,b\n"
Serve = Callable[..., FileServer]
Fetch = Callable[..., ResolvedDataset]


@pytest.fixture
def files(serve: Serve, names: NameServer) -> FileServer:
    """What a stranger serves at a public address."""
    names.say("files.test", ["127.0.0.1"])
    names.say("inside.test", ["127.0.0.2"])
    server = serve()
    server.answers["/train.csv"] = (200, {}, TABLE)
    return server


@pytest.fixture
def inside(serve: Serve, files: FileServer) -> FileServer:
    """What only this machine may reach, at the same port."""
    server = serve("127.0.0.2", files.port)
    server.answers["/train.csv"] = (200, {}, b"secret,label\n1,2\n")
    return server


@pytest.fixture
def fetch(certificate: Path, tmp_path: Path) -> Fetch:
    """Resolve a reference as a worker does."""

    def fetch(url: str, *, allowed: str = "127.0.0.1/32") -> ResolvedDataset:
        web = Web(
            is_allowed=True,
            networks=networks(allowed) if allowed else (),
            ca_file=certificate,
        )
        return resolve_elsewhere(url, tmp_path, web=web)

    return fetch


def refusal(fetch: Fetch, url: str, **options: object) -> SourceError:
    with pytest.raises(SourceError) as caught:
        fetch(url, **options)
    return caught.value


def test_a_file_is_kept_under_its_digest(fetch: Fetch, files: FileServer) -> None:
    first = fetch(f"https://files.test:{files.port}/train.csv")
    assert first.path.read_bytes() == TABLE
    assert first.revision == hashlib.sha256(TABLE).hexdigest()
    assert first.path.name == f"{first.revision}.csv"
    files.answers["/train.csv?key=%2B1"] = (200, {}, TABLE + b"x,a\n")
    assert fetch(f"https://files.test:{files.port}/train.csv?key=%2B1").revision != first.revision
    assert first.path.read_bytes() == TABLE
    assert [path.name for path in first.path.parent.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "0x7f000001", "2130706433", "017700000001", "0", "localhost"),
        *("[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "169.254.169.254", "10.0.0.1"),
        "inside.test",
    ],
)
def test_numbers_and_names_of_it_are_not_called(
    fetch: Fetch, files: FileServer, inside: FileServer, host: str
) -> None:
    error = refusal(fetch, f"https://{host}:{files.port}/train.csv", allowed="")
    assert error.code == "not_permitted"
    assert "WINNOW_FETCH_NETWORKS" in error.message
    assert not error.transient
    assert files.asked == inside.asked == []


def test_a_name_that_moves_inside_after_the_check_is_called_where_it_was_checked(
    fetch: Fetch, files: FileServer, inside: FileServer, names: NameServer
) -> None:
    """DNS rebinding: the second question would be answered with an address inside."""
    names.say("files.test", ["127.0.0.1"], ["127.0.0.2"])
    assert fetch(f"https://files.test:{files.port}/train.csv").path.read_bytes() == TABLE
    assert names.questions == ["files.test"]
    assert inside.asked == []
    error = refusal(fetch, f"https://files.test:{files.port}/train.csv")
    assert error.code == "not_permitted"
    assert inside.asked == []


def test_a_name_with_one_address_inside_is_not_called(
    fetch: Fetch, files: FileServer, inside: FileServer, names: NameServer
) -> None:
    names.say("files.test", ["127.0.0.1", "127.0.0.2"])
    assert refusal(fetch, f"https://files.test:{files.port}/train.csv").code == "not_permitted"
    assert files.asked == inside.asked == []


class TestRedirects:
    def send_on(self, files: FileServer, where: str, status: int = 302) -> str:
        files.answers["/start.csv"] = (status, {"Location": where}, b"")
        return f"https://files.test:{files.port}/start.csv"

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_one_to_a_public_address_is_followed(
        self, fetch: Fetch, files: FileServer, names: NameServer, status: int
    ) -> None:
        names.say("other.test", ["127.0.0.1"])
        url = self.send_on(files, f"https://other.test:{files.port}/train.csv", status)
        assert fetch(url).path.read_bytes() == TABLE
        assert files.asked == ["files.test/start.csv", "other.test/train.csv"]

    @pytest.mark.parametrize("host", ["inside.test", "127.0.0.2", "[::ffff:127.0.0.2]", "0x7f.2"])
    def test_one_to_an_address_inside_is_not(
        self, fetch: Fetch, files: FileServer, inside: FileServer, host: str
    ) -> None:
        url = self.send_on(files, f"https://{host}:{inside.port}/train.csv")
        assert refusal(fetch, url).code == "not_permitted"
        assert inside.asked == []

    def test_one_to_plain_http_is_not(self, fetch: Fetch, files: FileServer, serve: Serve) -> None:
        plain = serve(tls=False)
        error = refusal(fetch, self.send_on(files, f"http://files.test:{plain.port}/train.csv"))
        assert error.code == "not_permitted"
        assert "without encryption" in error.message
        assert plain.asked == []

    @pytest.mark.parametrize("where", ["file:///etc/passwd", "gopher://127.0.0.1/", "//["])
    def test_one_to_something_else_is_not(
        self, fetch: Fetch, files: FileServer, where: str
    ) -> None:
        assert refusal(fetch, self.send_on(files, where)).code in {
            "source_unreachable",
            "source_error",
        }

    def test_a_ring_ends(self, fetch: Fetch, files: FileServer) -> None:
        error = refusal(fetch, self.send_on(files, "/start.csv"))
        assert "too many redirects" in error.message
        assert len(files.asked) == 6


class TestAnswers:
    def test_more_than_the_limit_is_refused_while_it_comes(
        self, fetch: Fetch, files: FileServer, tmp_path: Path
    ) -> None:
        files.answers["/train.csv"] = (200, {}, b"x" * 10_000_000)
        error = refusal(fetch, f"https://files.test:{files.port}/train.csv")
        assert (error.code, "10,000 bytes" in error.message) == ("too_large", True)
        assert list((tmp_path / "cache" / "datasets").iterdir()) == []

    def test_what_drips_is_given_up(
        self, fetch: Fetch, files: FileServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetched, "_GRACE_SECONDS", -1.0)
        error = refusal(fetch, f"https://files.test:{files.port}/train.csv")
        assert (error.code, error.transient) == ("source_unreachable", True)

    @pytest.mark.parametrize(
        ("status", "code", "transient"),
        [
            (404, "not_found", False),
            (410, "not_found", False),
            (401, "not_permitted", False),
            (403, "not_permitted", False),
            (206, "source_error", False),
            (429, "source_error", True),
            (503, "source_error", True),
        ],
    )
    def test_every_other_status_is_told(
        self, fetch: Fetch, files: FileServer, status: int, code: str, transient: bool
    ) -> None:
        files.answers["/train.csv"] = (status, {}, b"")
        error = refusal(fetch, f"https://files.test:{files.port}/train.csv")
        assert (error.code, error.transient) == (code, transient)
        assert str(status) in error.message

    def test_what_comes_compressed_is_refused(self, fetch: Fetch, files: FileServer) -> None:
        body = gzip.compress(TABLE)
        files.answers["/train.csv"] = (200, {"Content-Encoding": "gzip"}, body)
        error = refusal(fetch, f"https://files.test:{files.port}/train.csv")
        assert error.code == "unsupported_dataset"

    def test_a_page_is_no_table(self, fetch: Fetch, files: FileServer) -> None:
        files.answers["/data"] = (200, {}, b"<!doctype html>")
        error = refusal(fetch, f"https://files.test:{files.port}/data")
        assert error.code == "unsupported_dataset"

    def test_a_certificate_of_another_name_is_refused(
        self, fetch: Fetch, files: FileServer, names: NameServer
    ) -> None:
        names.say("stranger.test", ["127.0.0.1"])
        error = refusal(fetch, f"https://stranger.test:{files.port}/train.csv")
        assert error.code == "source_unreachable"
        assert files.asked == []

    def test_nobody_there_and_no_such_name_are_worth_another_try(
        self, fetch: Fetch, files: FileServer
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for host in (f"files.test:{port}", f"nobody.test:{port}"):
            error = refusal(fetch, f"https://{host}/train.csv")
            assert (error.code, error.transient) == ("source_unreachable", True)


def test_a_server_that_takes_none_says_so(tmp_path: Path) -> None:
    reference = parse_dataset_reference("https://example.com/train.csv")
    with pytest.raises(SourceError, match="WINNOW_HTTPS_DATASETS"):
        Web().fetch(reference, cache_dir=tmp_path, max_bytes=1)  # type: ignore[arg-type]


def test_a_webhook_whose_name_moves_inside_is_called_where_it_was_checked(
    settings: Settings, names: NameServer
) -> None:
    with receiving() as public:
        names.say("files.test", ["127.0.0.1"], ["127.0.0.2"])
        strict = settings.model_copy(
            update={"webhook_plain_http": True, "webhook_networks": networks("127.0.0.1/32")}
        )
        url = f"http://files.test:{public.port}/hook"
        secret = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
        call = Call("msg_1", url, {"type": "test"}, [secret])
        assert Caller(strict).call(call).error is None
        assert names.questions == ["files.test"]
        assert "only public ones are" in (Caller(strict).call(call).error or "")
        assert len(public.received) == 1
