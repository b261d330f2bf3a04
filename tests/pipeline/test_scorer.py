"""Scores from made-up files: every kind of estimator, whatever the shards and blocks."""

import itertools
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app import storage
from app.audits.schemas import Configuration
from tests.influence import aggregation_oracles
from tests.pipeline.score_files import LAYOUT, NUM_TRAIN, NUM_VALIDATION, ScoreFiles
from workers.influence.aggregation import AGGREGATIONS
from workers.influence.errors import InsufficientMemory, NonFiniteInfluence
from workers.influence.estimators import ESTIMATORS
from workers.influence.layer_groups import UnknownLayers
from workers.pipeline import artifacts, column_source
from workers.pipeline.artifacts import TensorFile, write_tensors
from workers.pipeline.rank_tiles import RankTiles

BANDS = {"00": (0, 1), "01": (2,), "03": (3,)}
MODULES = {"all": (0, 1, 2, 3, 4), **BANDS, "CL": (4,)}
GROUPS: dict[str, dict[str, tuple[int, ...]]] = {
    "grad_dot": {**MODULES, "WE": (5,), "01-03,WE": (2, 3, 5)},
    "self_influence": {**MODULES, "WE": (5,), "01-03,WE": (2, 3, 5)},
    "datainf": {**MODULES, "01-03,CL": (2, 3, 4)},
    "tracin": {**MODULES, "00,03": (0, 1, 3)},
    "outlier_gradient": {**MODULES, "00-03": (0, 1, 2, 3)},
    "tracin_we": {"WE": (0,)},
    "repsim": {"all": (0, 1, 2, 3), "00": (0,), "01": (1,), "03": (3,), "01-02": (1, 2)},
}
OPTIONS = {"vote_fraction": 0.3, "trim_fraction": 0.2, "common_share": 0.6}


@pytest.mark.parametrize(
    ("estimator", "aggregation"), list(itertools.product(GROUPS, AGGREGATIONS))
)
@pytest.mark.parametrize("correct_only", [False, True])
def test_scores_equal_those_of_loops_over_the_estimators_own_rows(
    tmp_path: Path, estimator: str, aggregation: str, correct_only: bool
) -> None:
    """Some samples of both sets are not finite: nothing of them counts, and they stand first."""
    files = ScoreFiles(tmp_path, non_finite=[2, 7], non_finite_validation=[2])
    found = files.scores(
        estimator,
        aggregation,
        layers=list(GROUPS[estimator])[-1],
        correct_only=correct_only,
        **OPTIONS,
    )
    assert set(found) == set(GROUPS[estimator])
    for group, rows in GROUPS[estimator].items():
        expected = aggregation_oracles.aggregate(
            files.columns(estimator, rows, correct_only=correct_only), aggregation, **OPTIONS
        )
        score_T = found[group]
        assert score_T[files.is_finite_T].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        lowest = score_T[files.is_finite_T].min()
        assert bool((score_T[~files.is_finite_T] < lowest).all())
        assert score_T.argsort(stable=True)[:2].tolist() == [2, 7]


def test_baselines_put_broken_samples_first_too(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path, non_finite=[11, 4], estimators=[])
    for name in ("loss", "random", "oracle"):
        score_T = files.scores(name, "rank")["all"]
        assert score_T.argsort(stable=True)[:2].tolist() == [4, 11]
    whole = ScoreFiles(tmp_path / "whole", estimators=[])
    assert torch.equal(whole.scores("loss", "rank")["all"], -whole.loss_T)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    cuts=st.lists(st.integers(1, NUM_TRAIN - 1), max_size=4, unique=True).map(sorted),
    block_bytes=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    reading=st.tuples(st.sampled_from([0, 8, 10**6]), st.integers(1, 300)),
    non_finite=st.sets(st.integers(0, NUM_TRAIN - 1), max_size=4),
)
def test_neither_shards_nor_blocks_change_a_bit(
    cuts: list[int],
    block_bytes: tuple[int, int],
    reading: tuple[int, int],
    non_finite: set[int],
) -> None:
    """Of any aggregation of an estimator that adds up checkpoints, of both kinds of blocks."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as m:
        broken = sorted(non_finite)
        options: dict[str, Any] = {"non_finite": broken, "estimators": ["tracin"]}
        whole = ScoreFiles(Path(folder) / "whole", cuts=(), **options)
        cut = ScoreFiles(Path(folder) / "cut", cuts=cuts, **options)
        expected = [whole.scores("tracin", name) for name in AGGREGATIONS]
        m.setattr(column_source, "BLOCK_BYTES", block_bytes[0])
        m.setattr(column_source, "SAMPLE_BLOCK_BYTES", block_bytes[1])
        m.setattr(artifacts, "_WORTH_A_SEEK", reading[0])
        m.setattr(artifacts, "_READ_BYTES", reading[1])
        for name, scores in zip(AGGREGATIONS, expected, strict=True):
            found = cut.scores("tracin", name)
            for group, score_T in scores.items():
                assert torch.equal(found[group], score_T)


def test_the_table_has_every_configuration(tmp_path: Path) -> None:
    """Every estimator × its layer groups × the asked aggregations and the ranking's own."""
    files = ScoreFiles(tmp_path)
    names = [*GROUPS, "loss"]
    scored = files.scorer().score_all(
        [ESTIMATORS[name] for name in names],
        aggregations=["mean", "median"],
        ranking=Configuration(estimator="grad_dot", aggregation="vote", layers="00,WE"),
    )
    found = {
        (item["estimator"], item["layer_group"], item["aggregation"], item["correct_only"])
        for item in scored.configurations
    }
    # who lacks the ranking's layers just has no such row: only grad_dot and self_influence have WE
    groups = {name: [*list(rows)[:-1]] for name, rows in GROUPS.items()}
    groups["tracin_we"] = ["WE"]
    for name in ("grad_dot", "self_influence"):
        groups[name] += ["00,WE"]
    pairwise = {"grad_dot", "datainf", "tracin", "tracin_we", "repsim"}
    assert found == {("loss", "all", None, False)} | {
        (name, group, aggregation, correct_only)
        for name, rows in groups.items()
        for group in rows
        for aggregation in ("mean", "median", "vote")
        for correct_only in ((False, True) if name in pairwise else (False,))
    }
    assert len(found) == len(scored.configurations)
    assert all(0 <= item["detection"]["auc_ndr"] <= 1 for item in scored.configurations)
    assert scored.warnings == []


def test_configurations_have_the_detection_of_their_own_scores(tmp_path: Path) -> None:
    """Asked together or one by one."""
    files = ScoreFiles(tmp_path, non_finite=[3])
    ranking = Configuration(estimator="grad_dot")
    together = files.scorer().score_all(
        [ESTIMATORS["grad_dot"]], aggregations=list(AGGREGATIONS), ranking=ranking
    )
    for name in AGGREGATIONS:
        alone = files.scorer().score_all(
            [ESTIMATORS["grad_dot"]],
            aggregations=[],
            ranking=Configuration(estimator="grad_dot", aggregation=name),
        )
        assert alone.configurations == [
            item for item in together.configurations if item["aggregation"] == name
        ]


def test_layers_that_the_rankings_estimator_lacks_are_named(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path)
    for estimator, layers in (("datainf", "WE"), ("repsim", "CL"), ("grad_dot", "02")):
        with pytest.raises(UnknownLayers, match=layers):
            files.scores(estimator, "rank", layers=layers)


def test_without_word_embeddings_only_their_own_estimators_have_the_group(tmp_path: Path) -> None:
    """The module is there for tracin_we; grad_dot does not look at it."""
    files = ScoreFiles(
        tmp_path, estimators=["datainf", "tracin_we"], layout={**LAYOUT, "word_embedding": None}
    )
    assert set(files.scores("self_influence", "rank")) == set(MODULES)
    assert set(files.scores("tracin_we", "rank", layers="WE")) == {"WE"}


def test_influence_that_breaks_by_itself_is_an_error(tmp_path: Path) -> None:
    """Named by the rows of the training file, though one before them is left out."""
    files = ScoreFiles(tmp_path, non_finite=[0], estimators=["grad_dot"])
    for shard, index in enumerate(files.shards):
        influence = files.influence["grad_dot"][..., index].clone()
        influence[1, 2, index == 8] = math.nan
        write_tensors(files.artifacts.influence("grad_dot", shard), {"influence": influence})
    for name in ("mean", "median", "common_set"):
        with pytest.raises(NonFiniteInfluence, match="by grad_dot") as caught:
            files.scores("grad_dot", name)
        assert caught.value.positions == (8,)


def test_correct_only_that_would_leave_nothing_is_told(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path, non_finite_validation=[0, 2, 4])
    scored = files.scorer().score_all(
        [ESTIMATORS["grad_dot"]],
        aggregations=[],
        ranking=Configuration(estimator="grad_dot", correct_only=True),
    )
    assert "no validation sample correctly" in scored.warnings[0]
    fair = files.scores("grad_dot", "rank", correct_only=False)
    assert torch.equal(scored.group_scores["all"], fair["all"])


class TestMemory:
    """What is read at once is bounded by the block, not by modules × validation × training."""

    @pytest.fixture
    def sizes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        sizes: list[int] = []
        for kind, name in ((TensorFile, "rows"), (TensorFile, "columns")):
            whole = getattr(kind, name)

            def spy(self: Any, key: str, *rest: Any, _whole: Any = whole, **more: Any) -> Tensor:
                tensor: Tensor = _whole(self, key, *rest, **more)
                if key == "influence":
                    sizes.append(tensor.nbytes)
                return tensor

            monkeypatch.setattr(kind, name, spy)
        read = RankTiles.read

        def spy_tiles(self: RankTiles) -> Any:
            for index_B, rank_KB in read(self):
                sizes.append(rank_KB.nbytes)
                yield index_B, rank_KB

        monkeypatch.setattr(RankTiles, "read", spy_tiles)
        return sizes

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_no_read_is_larger_than_a_block(
        self,
        tmp_path: Path,
        sizes: list[int],
        monkeypatch: pytest.MonkeyPatch,
        aggregation: str,
    ) -> None:
        """Though a module's influence is 10 blocks, and all of it 60."""
        files = ScoreFiles(
            tmp_path, estimators=["grad_dot"], num_train=400, num_validation=100, cuts=(200,)
        )
        block_bytes = 4 * 400 * 10
        monkeypatch.setattr(column_source, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(column_source, "SAMPLE_BLOCK_BYTES", block_bytes)
        files.scores("grad_dot", aggregation)
        assert block_bytes // 2 <= max(sizes) <= block_bytes
        assert sum(sizes) >= 4 * 6 * 100 * 400


class TestScratch:
    def test_nothing_stays(self, tmp_path: Path) -> None:
        """Neither of a pass that ended well nor of one that was stopped in the middle."""
        files = ScoreFiles(tmp_path, estimators=["grad_dot"])
        before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        files.scores("grad_dot", "common_set")

        class Stopped(Exception):
            pass

        def stop(done: int, total: int) -> None:
            if done > total // 4:
                raise Stopped

        with pytest.raises(Stopped):
            files.scorer(tick=stop).score_all(
                [ESTIMATORS["grad_dot"]],
                aggregations=["common_set"],
                ranking=Configuration(estimator="grad_dot"),
            )
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before

    def test_a_full_disk_is_told_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(OSError, match="No space left"):  # full for everybody: it is waited for
            RankTiles(tmp_path, num_columns=10, num_train=10)
        monkeypatch.setattr(storage, "LEAST_FREE_BYTES", 100)
        with pytest.raises(InsufficientMemory, match="Leave common_set out"):
            RankTiles(tmp_path, num_columns=10, num_train=10)

    def test_a_column_that_was_not_written_is_noticed(self, tmp_path: Path) -> None:
        with RankTiles(tmp_path, num_columns=2, num_train=3) as tiles:
            tiles.write(0, torch.zeros(1, 3, dtype=torch.int32))
            with pytest.raises(EOFError, match="not all columns"):
                list(tiles.read())


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    ends=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    seek=st.sampled_from([0, 10**6]),
    read_bytes=st.integers(1, 100),
)
def test_columns_of_a_file_are_those_of_the_tensor(
    shape: list[int], ends: tuple[int, int], seek: int, read_bytes: int
) -> None:
    """Read by seeking or by reading on."""
    value = torch.arange(math.prod(shape)).view(shape)
    columns = slice(min(ends), max(ends))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "_WORTH_A_SEEK", seek)
        patch.setattr(artifacts, "_READ_BYTES", read_bytes)
        path = Path(folder) / "file.safetensors"
        write_tensors(path, {"before": torch.zeros(3), "value": value, "z": torch.ones(4)})
        assert torch.equal(TensorFile(path).columns("value", columns), value[..., columns])


def test_related_samples_are_numbered_as_in_the_validation_file(tmp_path: Path) -> None:
    """Where a validation sample is left out, the later ones keep their numbers."""
    files = ScoreFiles(tmp_path, non_finite=[5], non_finite_validation=[1])
    for estimator, layers in (("grad_dot", "01"), ("repsim", "01-02"), ("tracin_we", "WE")):
        related = files.scorer().find_related(ESTIMATORS[estimator], layers=layers)
        assert related is not None
        rows = GROUPS[estimator].get(layers, (2,))
        mean_VT = files.influence[estimator][list(rows)].double().mean(dim=0).float()
        for sample in range(NUM_TRAIN):
            kept = [j for j in range(NUM_VALIDATION) if j != 1]
            harmed = related.harmed_KT[:, sample].tolist()
            if sample == 5:
                assert harmed == kept
                assert related.harm_KT[:, sample].tolist() == [0.0] * 4
                continue
            assert harmed == sorted(kept, key=lambda j: float(mean_VT[j, sample]))
            torch.testing.assert_close(
                related.harm_KT[:, sample], mean_VT[harmed, sample], rtol=1e-5, atol=1e-6
            )
    for name in ("self_influence", "outlier_gradient", "loss"):
        assert files.scorer().find_related(ESTIMATORS[name], layers="all") is None


def test_what_follows_the_scores_tells_of_no_progress(tmp_path: Path) -> None:
    """Nobody is told of the end before there is one, or sent back."""
    files = ScoreFiles(tmp_path, estimators=["grad_dot"])
    told: list[float] = []
    scorer = files.scorer(tick=lambda done, total: told.append(done / total))
    estimator, ranking = ESTIMATORS["grad_dot"], Configuration(estimator="grad_dot")
    scorer.score_rankings(estimator, [ranking])
    assert set(told) == {0.0}
    scorer.score_all([estimator], aggregations=["mean"], ranking=ranking)
    scorer.find_related(estimator, layers="all")
    assert told == sorted(told)
    assert told[-1] == 1.0
