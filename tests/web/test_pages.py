"""The pages as a browser gets them: what they tell, how they escape it, where they lead."""

import re
from collections.abc import Callable
from html import unescape
from itertools import chain

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState
from app.db import transaction
from app.settings import Settings
from app.web.routes import router
from tests.factories import (
    CSV_TABLE,
    make_audit,
    make_ended_audit,
    make_finished_audit,
    make_ranking,
    request_body,
)
from tests.web.published import publish_audit, review_texts

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>')


def texts_of(html: str) -> str:
    """Return what a reader sees, roughly: no tags, one space between words."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def ranks_of(html: str) -> list[int]:
    return [int(rank) for rank in re.findall(r'data-rank="(\d+)"', html)]


def linked(html: str, rel: str) -> str | None:
    found = re.search(rf'<a href="([^"]+)" rel="{rel}"', html)
    return unescape(found[1]).partition("#")[0] if found else None


class TestTheList:
    def test_tells_of_every_audit(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        upload = client.post("/v1/datasets", files={"file": ("my texts.csv", CSV_TABLE)}).json()
        make_audit(engine, train={"reference": upload["reference"]})
        make_finished_audit(engine, settings)
        make_ended_audit(engine, AuditState.FAILED)
        text = texts_of(client.get("/").text)
        assert "my texts.csv org/model@main queued" in text
        assert "org/texts@main org/model@main succeeded 10 20%" in text
        assert "failed" in text

    def test_is_paged_by_key(self, client: TestClient, engine: Engine) -> None:
        made = [make_audit(engine).id for _ in range(65)]
        seen, path = [], "/"
        while path:
            html = client.get(path).text
            seen += re.findall(r'<tr role="row" data-audit="(\w+)"', html)
            path = linked(html, "next") or ""
        assert seen == made[::-1]

    def test_of_nobody_invites(self, client: TestClient) -> None:
        assert "No audits yet" in client.get("/").text


class TestAnAuditsPage:
    def test_while_it_runs_shows_where_it_stands(self, client: TestClient, engine: Engine) -> None:
        audit = make_audit(engine)
        with transaction(engine) as session:
            row = session.get_one(Audit, audit.id)
            row.state, row.stage, row.progress = AuditState.COMPUTING, "gradients", 0.42
            row.samples_per_second, row.eta_seconds = 120.0, 75.0
        text = texts_of(client.get(f"/audits/{audit.id}").text)
        for told in ("computing", "42 %", "gradients", "120", "1 min 15 s"):
            assert told in text

    def test_that_failed_says_what_to_change(self, client: TestClient, engine: Engine) -> None:
        audit = make_ended_audit(engine, AuditState.FAILED, message="The model has no head.")
        text = texts_of(client.get(f"/audits/{audit.id}").text)
        assert "The model has no head." in text
        assert "model.reference" in text

    def test_that_was_cancelled_says_so(self, client: TestClient, engine: Engine) -> None:
        audit = make_ended_audit(engine, AuditState.CANCELLED)
        assert "was cancelled" in client.get(f"/audits/{audit.id}").text

    def test_shows_what_was_chosen_and_how_much_is_wrong(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = publish_audit(engine, settings, texts=review_texts(120))
        text = texts_of(client.get(f"/audits/{audit.id}").text)
        assert "gauss_newton , all, rank" in text
        assert "400 planted probes" in text
        assert "at 90% confidence" in text

    def test_shows_another_ranking(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        ranking = make_ranking(engine, audit, settings=settings)
        html = client.get(f"/audits/{audit.id}?ranking={ranking.id}").text
        assert ranks_of(html) == list(range(10))
        assert re.findall(r'<tr [^>]*data-index="(\d+)"', html) == [str(i) for i in range(10)]
        assert linked(html, "next") is None

    def test_of_a_language_model_shows_prompts_and_completions(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        texts = review_texts(80)
        audit = publish_audit(
            engine,
            settings,
            texts=texts,
            completions=[f"completion of {i}" for i in range(80)],
            validation=request_body()["validation"],
        )
        for path in ("", "/overview", "/samples/3?part=true", "/samples/3"):
            response = client.get(f"/audits/{audit.id}{path}")
            assert response.status_code == 200
            assert path == "/overview" or "completion of 3" in response.text
        assert client.get(f"/v1/audits/{audit.id}/report.html").status_code == 200

    def test_that_does_not_exist_is_a_page_too(self, client: TestClient) -> None:
        response = client.get("/audits/aud_none")
        assert response.status_code == 404
        assert "There is no audit" in response.text
        assert response.headers["content-type"].startswith("text/html")

    def test_of_an_index_out_of_range_is_a_page_too(self, client: TestClient) -> None:
        response = client.get("/audits/aud_none/samples/x")
        assert response.status_code == 422
        assert response.headers["content-type"].startswith("text/html")


class TestTheTable:
    def test_is_walked_forth_and_back(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = publish_audit(engine, settings, texts=review_texts(230))
        path: str | None = f"/audits/{audit.id}?label=positive"
        pages, last = [], ""
        while path:
            last = path
            html = client.get(path).text
            pages.append(ranks_of(html))
            path = linked(html, "next")
        assert len(pages) == 3
        walked = list(chain(*pages))
        assert walked == sorted(walked)
        back: list[list[int]] = []
        path = last
        while path:
            html = client.get(path).text
            back.insert(0, ranks_of(html))
            path = linked(html, "prev")
        assert back == pages

    def test_begins_where_the_address_says(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = publish_audit(engine, settings, texts=review_texts(120))
        assert ranks_of(client.get(f"/audits/{audit.id}?from_rank=80").text) == list(range(80, 120))
        # before the second page there is less than a page, so the first one is meant
        assert ranks_of(client.get(f"/audits/{audit.id}?before_rank=20").text) == list(range(50))

    def test_keeps_filters_in_every_link(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = publish_audit(engine, settings, texts=review_texts(230))
        query = "label=negative&search=the&decision=none"
        html = client.get(f"/audits/{audit.id}?{query}").text
        following = linked(html, "next")
        assert following is not None
        assert all(part in following for part in query.split("&"))
        assert "<option selected>negative</option>" in html

    def test_tells_of_a_filter_that_cannot_be_used(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        html = client.get(f"/audits/{audit.id}?min_score=high&label=pos&flagged=").text
        assert re.search(r'id="f-min_score"[^>]*aria-invalid="true"', html)
        assert 'id="e-min_score"' in html
        assert len(ranks_of(html)) == 5

    def test_without_a_match_says_so(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        assert "No sample matches" in client.get(f"/audits/{audit.id}?search=zebra").text


class TestThePictures:
    def test_the_cut_counts_what_the_filter_selects(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = publish_audit(engine, settings, texts=review_texts(150))
        html = client.get(f"/audits/{audit.id}/overview").text
        edges, below = (
            [float(number) for number in unescape(found[1])[1:-1].split(",")]
            for name in ("edges", "below")
            if (found := re.search(rf'data-{name}="([^"]+)"', html))
        )
        assert below[-1] == 150
        for place in (0, 7, 60, 120, len(below) - 1):
            found = client.get(
                f"/v1/audits/{audit.id}/suspects/summary?max_score={edges[place + 1]}"
            ).json()
            assert found["num_matching"] == below[place]

    def test_the_matrix_leads_to_its_samples(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = publish_audit(engine, settings, texts=review_texts(150))
        html = client.get(f"/audits/{audit.id}/overview").text
        cells = re.findall(r'<a href="(\?label=[^"#]+)#suspects">([\d,]+)</a>', html)
        assert len(cells) == 4
        for query, number in cells:
            found = client.get(f"/v1/audits/{audit.id}/suspects/summary{unescape(query)}").json()
            assert found["num_matching"] == int(number)

    def test_known_noise_is_drawn(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = publish_audit(engine, settings, texts=review_texts(200))
        text = texts_of(client.get(f"/audits/{audit.id}/overview").text)
        detection = audit.summary["detection"]
        for percent in (10, 20, 30):
            assert f"NDR@{percent} {detection[f'ndr_{percent}']:.3f}" in text
        assert "AUC-NDR by the known noise" in text

    def test_without_known_noise_the_probes_say_what_is_better(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = publish_audit(engine, settings, texts=review_texts(120), knows_noise=False)
        text = texts_of(client.get(f"/audits/{audit.id}/overview").text)
        assert "AUC-NDR by planted probes" in text
        assert "0.930 chosen" in text
        assert "Agreement with the ranking" in text
        assert "NDR@10" not in text

    def test_the_factories_smallest_audit_is_drawn(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        """It has no suggestions, no choice and no estimate, as audits of earlier versions."""
        audit = make_finished_audit(engine, settings)
        for path in ("", "/overview", "/samples/0", "/review"):
            assert client.get(f"/audits/{audit.id}{path}").status_code == 200


@pytest.fixture
def hostile(engine: Engine, settings: Settings) -> Audit:
    """An audit whose texts and labels would run, if they were not escaped."""
    return publish_audit(engine, settings, texts=[*HOSTILE] * 40, labels=HOSTILE)


@pytest.mark.parametrize(
    "path",
    [
        "/audits/{id}",
        "/audits/{id}?search=%3Cscript%3Ealert(1)%3C/script%3E&label=%22%3E%3Cimg%20src=x%3E",
        "/audits/{id}/overview",
        "/audits/{id}/samples/0",
        "/audits/{id}/samples/1?part=true",
        "/v1/audits/{id}/report.html",
    ],
)
def test_texts_and_labels_are_escaped(client: TestClient, hostile: Audit, path: str) -> None:
    html = client.get(path.format(id=hostile.id)).text
    assert "alert(1)" in unescape(html)
    assert "<script>alert" not in html
    assert "<img" not in html


def test_what_a_person_says_is_escaped(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings)
    body = {"action": "edit", "label": "pos", "indices": [9], "reviewer": HOSTILE[0]}
    assert client.post(f"/v1/audits/{audit.id}/decisions", json=body).status_code == 201
    for path in ("", "/review"):
        assert "<script>alert" not in client.get(f"/audits/{audit.id}{path}").text


def test_names_of_uploads_are_escaped(client: TestClient, engine: Engine) -> None:
    name = "<script>alert(1)</script>.csv"
    upload = client.post("/v1/datasets", files={"file": (name, CSV_TABLE)}).json()
    audit = make_audit(engine, train={"reference": upload["reference"]})
    for path in ("/", f"/audits/{audit.id}"):
        html = client.get(path).text
        assert "alert(1)" in html
        assert "<script>alert" not in html


def test_every_page_forbids_what_it_does_not_need(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings)
    paths = ["/", "/sign-in", "/audits/aud_none"]
    paths += [f"/audits/{audit.id}{rest}" for rest in ("", "/overview", "/review", "/samples/0")]
    for path in paths:
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "unsafe" not in policy, path
        for directive in ("default-src 'none'", "frame-ancestors 'none'", "script-src 'self'"):
            assert directive in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_no_page_carries_what_its_policy_forbids(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    audit = publish_audit(engine, settings, texts=review_texts(60))
    for path in ("/", *(f"/audits/{audit.id}{rest}" for rest in ("", "/overview", "/samples/0"))):
        html = client.get(path).text
        assert not re.search(r"<[^>]+\s(style|on\w+)=", html), path
        assert "<style" not in html
        assert not re.search(r"<script(?! src=\"/static/)", html)
        assert not re.search(r'(src|href)="(https?:)?//', html)


def test_a_stranger_finds_nothing_on_any_page(
    new_client: Callable[[str], TestClient], engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings)
    stranger = new_client("stranger")
    assert audit.id not in stranger.get("/").text
    paths = [route.path_format for route in router.routes if isinstance(route, APIRoute)]
    about_an_audit = [path for path in paths if "{audit_id}" in path]
    assert len(about_an_audit) >= 4
    assert {"/", "/sign-in", "/sign-out"} >= set(paths) - set(about_an_audit)
    for path in about_an_audit:
        answer = stranger.get(path.format(audit_id=audit.id, index=0))
        assert answer.status_code == 404, path
        assert "sample 0" not in answer.text


def test_counts_are_kept_by_ranking(client: TestClient, engine: Engine, settings: Settings) -> None:
    """Pictures of one ranking are never those of another."""
    audit = make_finished_audit(engine, settings)
    ranking = make_ranking(engine, audit, settings=settings)
    own = client.get(f"/audits/{audit.id}/overview").text
    other = client.get(f"/audits/{audit.id}/overview?ranking={ranking.id}").text
    assert own != other
    assert client.get(f"/audits/{audit.id}/overview").text == own
    with Session(engine) as session:
        assert session.get_one(Audit, audit.id).num_decided == 0
