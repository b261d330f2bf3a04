"""What the pages show of a ranking beside its samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.audits import repository
from app.audits.assemble import ranking_path
from app.audits.models import Audit, Ranking, RankingState
from app.audits.service import Results
from app.decisions import repository as decisions
from app.decisions.answers import PrecisionAt
from app.decisions.models import DecisionBatch
from app.decisions.service import precision

MAX_RANKINGS = 100
SHOWN_BATCHES = 20


@dataclass(frozen=True)
class RankingView:
    """A finished ranking: where its parts are, and what was decided on its samples.

    Attributes:
        rankings: of the audit, those that have results.
        batches: of decisions, the newest first; at most SHOWN_BATCHES.
        precision: where something is decided.
    """

    audit: Audit
    ranking: Ranking
    rankings: Sequence[Ranking]
    batches: Sequence[DecisionBatch]
    precision: Sequence[PrecisionAt]

    @property
    def api_path(self) -> str:
        """Where the API has the ranking."""
        return ranking_path(self.ranking)

    @property
    def group_places(self) -> list[int]:
        """Which of a sample's ranks a line shows: those of single blocks and of the head."""
        order = self.ranking.summary["group_order"]
        single = [place for place, name in enumerate(order) if name.isdigit() or name == "CL"]
        return single if len(single) > 1 else list(range(len(order)))

    @property
    def group_names(self) -> list[str]:
        """The layer groups of those ranks."""
        order = self.ranking.summary["group_order"]
        return [order[place] for place in self.group_places]

    def shown_ranks(self, group_ranks: Sequence[int]) -> list[int]:
        """Return those of a sample's ranks."""
        return [group_ranks[place] for place in self.group_places]


def view_of(results: Results) -> RankingView:
    """Return what the page shows of a ranking."""
    session, audit = results.session, results.audit
    rankings = repository.list_rankings(session, audit.tenant, audit.id, limit=MAX_RANKINGS)
    batches = decisions.list_batches(
        session, audit.tenant, audit.id, limit=SHOWN_BATCHES, before_version=None
    )
    return RankingView(
        audit=audit,
        ranking=results.ranking,
        rankings=[each for each in rankings if each.state == RankingState.SUCCEEDED],
        batches=batches[:SHOWN_BATCHES],
        precision=[each for each in precision(results).at if each.num_decided],
    )
