"""What routes ask for: the database, the queue, the settings, the caller."""

from typing import Annotated, cast

from celery import Celery
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Engine

from app.db import of_tenant
from app.errors import NotAuthenticated
from app.jobs import Sender
from app.keys.cookie import KEY_COOKIE, refuse_other_sites
from app.keys.service import Caller, caller_of
from app.live.watcher import Watcher
from app.settings import Settings

DEFAULT_TENANT = "default"

_bearer = HTTPBearer(
    auto_error=False, description="An API key of `winnow keys create`, as a bearer token."
)


def _engine(request: Request) -> Engine:
    return cast("Engine", request.app.state.engine)


def _celery(request: Request) -> Celery:
    return cast("Celery", request.app.state.celery)


def _sender(request: Request) -> Sender:
    return cast("Sender", request.app.state.sender)


def _watcher(request: Request) -> Watcher:
    return cast("Watcher", request.app.state.watcher)


def _settings(request: Request) -> Settings:
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
    if not settings.require_keys:
        return Caller(DEFAULT_TENANT)
    secret = credentials.credentials if credentials else request.cookies.get(KEY_COOKIE)
    if secret is None:
        raise NotAuthenticated("Send your API key as 'Authorization: Bearer wnw_…'.")
    if credentials is None:
        refuse_other_sites(request)
    caller = caller_of(engine, secret)
    if caller is None:
        raise NotAuthenticated(
            "This API key is unknown, revoked or over its date. `winnow keys create` makes one."
        )
    return caller


CallerDep = Annotated[Caller, Depends(_caller)]


def _tenant(caller: CallerDep) -> str:
    return caller.tenant


TenantDep = Annotated[str, Depends(_tenant)]
"""Whose things count: every query on audits, datasets and rankings is limited to this tenant."""


def _tenants_engine(engine: ServiceEngineDep, tenant: TenantDep) -> Engine:
    return of_tenant(engine, tenant)


EngineDep = Annotated[Engine, Depends(_tenants_engine)]
"""The database as the caller's tenant has it, whatever a query forgets to say."""
