"""HTTP: what this server can compute."""

from fastapi import APIRouter

from app.catalogue import AGGREGATIONS, ESTIMATORS, Aggregation, Estimator
from app.dependencies import TenantDep

router = APIRouter(prefix="/v1", tags=["catalogue"])


@router.get("/estimators", summary="List estimators")
def list_estimators(_tenant: TenantDep) -> list[Estimator]:
    """List how influence can be estimated: when to use what, parameters, cost and needs."""
    return list(ESTIMATORS.values())


@router.get("/aggregations", summary="List aggregations")
def list_aggregations(_tenant: TenantDep) -> list[Aggregation]:
    """List how influence over layers and validation samples becomes one score."""
    return list(AGGREGATIONS.values())
