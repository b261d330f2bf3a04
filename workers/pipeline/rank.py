"""Another ranking of an audit that has ended, from the influence that it computed."""

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.audits.folders import audit_folder
from app.audits.models import Audit, Ranking
from app.settings import Settings
from app.shared_files import remove_folder
from app.work.claims import Claim, LeaseLost
from workers.influence.layer_groups import UnknownLayers
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.failures import AuditRefused
from workers.pipeline.findings import Findings
from workers.pipeline.publish import copy_ranking, write_files
from workers.pipeline.ranking import make_ranking


def rank(context: StageContext) -> StageOutput:
    """Rank the training samples again and publish: files first, then rows and state together.

    Raises:
        AuditRefused: the influence files are missing, or the model has no such layers.
    """
    ranking_id, artifacts = context.claim.ranking_id, context.artifacts
    assert ranking_id is not None  # noqa: S101  every unit of this stage is a ranking's
    try:
        findings = Findings.open(context)
        made = make_ranking(
            context, findings, findings.scorer(context), estimators=None, aggregations=[]
        )
    except (FileNotFoundError, KeyError) as error:
        raise AuditRefused(
            "influence_missing",
            "The influence files of this audit are gone from the data directory, or of an earlier "
            "version of the service. Submit the audit again with this ranking.",
        ) from error
    except UnknownLayers as error:
        raise AuditRefused("unknown_layers", str(error), field="layers") from error
    context.hold.keep_alive()
    files = write_files(made.rows, artifacts.results(ranking_id))
    context.hold.keep_alive()

    def write(session: Session) -> None:
        # held until the rows are there, so that nobody deletes the ranking in between
        there = select(Ranking.id).where(Ranking.id == ranking_id)
        if session.scalars(there.with_for_update(read=True, key_share=True)).first() is None:
            raise LeaseLost(ranking_id)
        copy_ranking(session, ranking_id=ranking_id, ranked=made.rows)

    return StageOutput(columns={"summary": {**made.summary, "files": files}}, write=write)


def remove_if_deleted(engine: Engine, settings: Settings, claim: Claim) -> None:
    """Remove the files that a worker wrote for a ranking that was deleted meanwhile."""
    assert claim.ranking_id is not None  # noqa: S101  as above
    folder = audit_folder(settings.data_dir, claim.audit_id)
    with Session(engine) as session:
        if session.get(Ranking, claim.ranking_id) is not None:
            return
        is_alone = session.get(Audit, claim.audit_id) is None
    if not is_alone:
        folder /= Ranking.folder_of(claim.ranking_id)
    remove_folder(folder)
