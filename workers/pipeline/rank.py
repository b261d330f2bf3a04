"""Another ranking of an audit that has ended, from the influence that it computed."""

import shutil

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.audits.folders import audit_folder
from app.audits.models import Audit, Ranking
from app.settings import Settings
from app.work.repository import Claim, LeaseLost
from workers.influence.layer_groups import UnknownLayers
from workers.pipeline.aggregate import choose_validation, name_groups
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.estimating import ranking_estimator_of
from workers.pipeline.failures import AuditRefused
from workers.pipeline.layout import ModelLayout
from workers.pipeline.prepare import Prepared
from workers.pipeline.publish import RankedSet, copy_ranking, write_files
from workers.pipeline.samples import SampleSet
from workers.pipeline.scores import Scored, Scorer, detection
from workers.pipeline.training_facts import TrainingFacts


def rank(context: StageContext) -> StageOutput:
    """Rank the training samples again and publish: files first, then rows and state together.

    Raises:
        AuditRefused: the influence files are missing, or the model has no such layers.
    """
    ranking_id, artifacts = context.claim.ranking_id, context.artifacts
    assert ranking_id is not None  # noqa: S101  every unit of this stage is a ranking's
    ranking = context.request.ranking
    try:
        ranked, scored = _score(context)
    except (FileNotFoundError, KeyError) as error:
        raise AuditRefused(
            "influence_missing",
            "The influence files of this audit are gone from the data directory, or of an earlier "
            "version of the service. Submit the audit again with this ranking.",
        ) from error
    except UnknownLayers as error:
        raise AuditRefused("unknown_layers", str(error), field="layers") from error
    context.hold.keep_alive()
    files = write_files(ranked, artifacts.results(ranking_id))
    context.hold.keep_alive()

    def write(session: Session) -> None:
        # held until the rows are there, so that nobody deletes the ranking in between
        there = select(Ranking.id).where(Ranking.id == ranking_id)
        if session.scalars(there.with_for_update(read=True, key_share=True)).first() is None:
            raise LeaseLost(ranking_id)
        copy_ranking(session, ranking_id=ranking_id, ranked=ranked)

    summary = {
        "num_flagged": ranked.num_flagged,
        "files": files,
        "detection": detection(scored.group_scores[ranking.layers], ranked.samples.is_noisy_T),
        "warnings": scored.warnings,
        "group_order": list(scored.group_scores),
        **name_groups(ModelLayout.read(artifacts.modules), scored.configurations),
        "configurations": scored.configurations,
    }
    return StageOutput(columns={"summary": summary}, write=write)


def _score(context: StageContext) -> tuple[RankedSet, Scored]:
    artifacts, request = context.artifacts, context.request
    train = SampleSet(artifacts.train)
    validation = SampleSet(artifacts.validation) if request.validation else None
    validation_facts = read_tensors(artifacts.validation_facts) if validation else {}
    facts = TrainingFacts(artifacts, context.provenance["num_shards"])
    scorer = Scorer(
        artifacts,
        facts,
        layout=ModelLayout.read(artifacts.modules),
        validation=choose_validation(validation, validation_facts),
        num_checkpoints=context.provenance.get("num_checkpoints", 0),
        is_noisy_T=train.is_noisy_T,
        seed=request.seed,
        tick=context.hold.step,
    )
    estimator = ranking_estimator_of(context)
    scored = scorer.score_all([estimator], aggregations=[], ranking=request.ranking, is_alone=True)
    ranked = RankedSet(
        samples=train,
        facts=facts,
        labels=[str(label) for label in Prepared.read(artifacts.prepared).labels],
        group_scores=scored.group_scores,
        layers=request.ranking.layers,
        num_flagged=request.flag.number(len(train)),
        related=scorer.find_related(estimator, layers=request.ranking.layers),
    )
    return ranked, scored


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
    shutil.rmtree(folder, ignore_errors=True)
