"""What the service offers."""

from winnow.results.base import Result


class Parameter(Result):
    """A number that a request may set, between `minimum` and `maximum`."""

    name: str
    minimum: float
    maximum: float
    default: float
    is_whole: bool
    description: str


class Estimator(Result):
    """One estimator that the service offers: what it does, when to use it, what it needs.

    `cost` is its time relative to that of grad_dot; `needs` and `tasks` say which audits it is for.
    """

    name: str
    kind: str
    formula: str
    description: str
    parameters: list[Parameter]
    cost: float
    cost_class: str
    needs: list[str]
    has_layers: bool
    tasks: list[str]


class Aggregation(Result):
    """One aggregation that the service offers."""

    name: str
    formula: str
    description: str
    parameters: list[Parameter]


class Alive(Result):
    """The service answers."""

    status: str
    version: str


class Check(Result):
    """One part that the service needs; `detail` says what to do when it is not right."""

    ok: bool
    detail: str


class Readiness(Result):
    """Whether audits can be submitted and will be worked on."""

    ready: bool
    checks: dict[str, Check]
