"""What routes ask for: the database, the queue, the settings, the caller."""

from collections.abc import Iterator, Mapping
from typing import Annotated, cast

from celery import Celery
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Engine

from app.db import of_tenant
from app.errors import MissingScope, NotAuthenticated, NotPermitted, RateExceeded
from app.jobs import Sender
from app.keys.cookie import KEY_COOKIE, refuse_other_sites
from app.keys.scopes import NoSuchArea, scope_of
from app.keys.service import Caller, caller_of
from app.limits.rates import Rates
from app.limits.uploads import UploadSlots
from app.live.watcher import Watcher
from app.middleware import ANSWER_HEADERS
from app.settings import Settings
from app.trail.service import Actor, acting

DEFAULT_TENANT = "default"
NO_KEY = "local"  # who acts where no keys are used
EXPIRY_HEADER = "Winnow-Key-Expires"

_bearer = HTTPBearer(
    auto_error=False, description="An API key of `winnow keys create`, as a bearer token."
)


# These take no time; a plain function would cost a trip to a thread at every call.
async def _engine(request: Request) -> Engine:
    return cast("Engine", request.app.state.engine)


async def _celery(request: Request) -> Celery:
    return cast("Celery", request.app.state.celery)


async def _sender(request: Request) -> Sender:
    return cast("Sender", request.app.state.sender)


async def _watcher(request: Request) -> Watcher:
    return cast("Watcher", request.app.state.watcher)


async def _settings(request: Request) -> Settings:
    return cast("Settings", request.app.state.settings)


ServiceEngineDep = Annotated[Engine, Depends(_engine)]
"""The whole database: for what concerns no tenant."""
CeleryDep = Annotated[Celery, Depends(_celery)]
SenderDep = Annotated[Sender, Depends(_sender)]
WatcherDep = Annotated[Watcher, Depends(_watcher)]
SettingsDep = Annotated[Settings, Depends(_settings)]


def _caller(
    request: Request,
    engine: ServiceEngineDep,
    settings: SettingsDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """Let a caller in: by its key, not too often, and to what the key's scopes open."""
    caller = Caller(DEFAULT_TENANT)
    if settings.require_keys:
        secret = credentials.credentials if credentials else request.cookies.get(KEY_COOKIE)
        caller = _known_caller(request, engine, secret, is_cookie=credentials is None)
    request.state.caller = caller
    if caller.expires_at is not None and caller.is_ending:
        _answer_with(request, {EXPIRY_HEADER: caller.expires_at.isoformat(timespec="seconds")})
    _check_rate(request, settings, caller)
    if settings.require_keys:
        _check_scope(request, caller)
    return caller


def _known_caller(
    request: Request, engine: Engine, secret: str | None, *, is_cookie: bool
) -> Caller:
    if secret is None:
        raise NotAuthenticated("Send your API key as 'Authorization: Bearer wnw_…'.")
    if is_cookie:
        refuse_other_sites(request)
    caller = caller_of(engine, secret)
    if caller is None:
        raise NotAuthenticated(
            "This API key is unknown, revoked or over its date. `winnow keys create` makes one."
        )
    return caller


def _check_rate(request: Request, settings: Settings, caller: Caller) -> None:
    own = caller.requests_per_minute
    per_minute = settings.requests_per_minute if own is None else own
    if not per_minute:
        return
    rates = cast("Rates", request.app.state.rates)
    rate = rates.count(caller.key_id or caller.tenant, per_minute)
    _answer_with(request, rate.headers)
    if rate.is_over:
        raise RateExceeded(
            f"This key may make {rate.limit} requests a minute (WINNOW_REQUESTS_PER_MINUTE, or "
            f"what was set for the key or its tenant). Try again in {rate.seconds} s.",
            limit=rate.limit,
            headers={"Retry-After": str(rate.seconds)},
        )


def _check_scope(request: Request, caller: Caller) -> None:
    try:
        scope = scope_of(request.method, request.scope["path"])
    except NoSuchArea as error:
        raise NotPermitted("No key opens this path.") from error
    if scope is not None and scope not in caller.scopes:
        raise MissingScope(
            f"The key {caller.key_name!r} lacks the scope {scope}, which this call needs. "
            "`winnow keys create --scopes` makes one that has it.",
            scope=scope.value,
        )


def _answer_with(request: Request, headers: Mapping[str, str]) -> None:
    """Let the answer carry headers, whatever it will be."""
    kept = request.scope["state"].setdefault(ANSWER_HEADERS, [])
    kept += [(name.lower().encode(), value.encode()) for name, value in headers.items()]


CallerDep = Annotated[Caller, Depends(_caller)]


async def _tenant(caller: CallerDep) -> str:
    return caller.tenant


TenantDep = Annotated[str, Depends(_tenant)]
"""Whose things count: every query on audits, datasets and rankings is limited to this tenant."""


def engine_of(request: Request, engine: Engine, caller: Caller) -> Engine:
    """Return the database as a caller's tenant has it; it knows who acts in which request."""
    actor = Actor(caller.key_name or NO_KEY, caller.key_id, request.state.request_id)
    return acting(of_tenant(engine, caller.tenant), actor)


async def _engine_of(request: Request, engine: ServiceEngineDep, caller: CallerDep) -> Engine:
    return engine_of(request, engine, caller)


EngineDep = Annotated[Engine, Depends(_engine_of)]
"""The database as the caller's tenant has it, whatever a query forgets to say."""


def upload_slot(request: Request, tenant: TenantDep) -> Iterator[None]:
    """Hold one of the places for uploads while a route runs."""
    slots = cast("UploadSlots", request.app.state.upload_slots)
    with slots.taken(tenant):
        yield
