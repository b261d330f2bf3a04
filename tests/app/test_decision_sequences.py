"""Any sequence of decisions and undos leaves what a model of a few lines says."""

from dataclasses import dataclass, field
from typing import Any

from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from app.settings import Settings
from tests.factories import make_finished_audit, suggest_labels

NUM_SAMPLES = 6
SUGGESTED = {0: "neg", 2: "neg", 3: "pos", 4: "neg", 5: "pos"}  # by index; 1 has none
GIVEN = {index: "pos" if index % 2 == 0 else "neg" for index in range(NUM_SAMPLES)}

some_indices = st.lists(st.integers(0, NUM_SAMPLES - 1), min_size=1, max_size=4)
a_filter = st.fixed_dictionaries(
    {},
    optional={
        "label": st.sampled_from(["pos", "neg"]),
        "decision": st.lists(
            st.sampled_from(["none", "any", "accept", "keep", "drop", "edit"]),
            min_size=1,
            max_size=6,
        ),
    },
)
a_target = st.one_of(
    st.fixed_dictionaries({"indices": some_indices}), st.fixed_dictionaries({"filter": a_filter})
)
an_action = st.sampled_from(["accept", "keep", "drop", "edit", "clear"])
a_step = st.one_of(st.tuples(an_action, a_target), st.tuples(st.just("undo"), st.integers(0, 9)))


@dataclass
class Model:
    """Batches in their order; what stands on a sample is the last that was not undone."""

    batches: list[dict[int, tuple[str, str | None] | None]] = field(default_factory=list)
    undone: set[int] = field(default_factory=set)

    def stands(self, index: int) -> tuple[str, str | None] | None:
        for number in reversed(range(len(self.batches))):
            if number not in self.undone and index in self.batches[number]:
                return self.batches[number][index]
        return None

    def state(self) -> dict[int, tuple[str, str | None]]:
        standing = {index: self.stands(index) for index in range(NUM_SAMPLES)}
        return {index: found for index, found in standing.items() if found is not None}

    def matches(self, index: int, said: dict[str, Any]) -> bool:
        standing = self.stands(index)
        states = said.get("decision")
        return said.get("label") in (None, GIVEN[index]) and (
            states is None
            or ("none" if standing is None else standing[0]) in states
            or ("any" in states and standing is not None)
        )

    def targets(self, target: dict[str, Any]) -> set[int]:
        if "indices" in target:
            return set(target["indices"])
        return {index for index in range(NUM_SAMPLES) if self.matches(index, target["filter"])}

    def decide(self, action: str, target: dict[str, Any]) -> int:
        """Store a batch and return how many decisions are others than before."""
        label = "pos" if action == "edit" else None
        batch: dict[int, tuple[str, str | None] | None] = {}
        for index in self.targets(target):
            if action == "accept":
                if index in SUGGESTED:
                    batch[index] = (action, SUGGESTED[index])
            elif action == "clear":
                if self.stands(index) is not None:
                    batch[index] = None
            else:
                batch[index] = (action, label)
        num_changed = sum(self.stands(index) != decision for index, decision in batch.items())
        self.batches.append(batch)
        return num_changed

    def undo(self, number: int) -> int:
        """Take a batch back and return how many of its samples were decided again since."""
        later = [
            batch
            for place, batch in enumerate(self.batches)
            if place > number and place not in self.undone
        ]
        self.undone.add(number)
        return sum(any(index in batch for batch in later) for index in self.batches[number])


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(a_step, max_size=10))
def test_what_stands_is_the_last_batch_that_was_not_undone(
    client: TestClient, engine: Engine, settings: Settings, steps: list[tuple[str, Any]]
) -> None:
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE audits CASCADE"))
    audit = make_finished_audit(engine, settings, num_train=NUM_SAMPLES)
    suggest_labels(engine, audit.summary["ranking_id"])
    path = f"/v1/audits/{audit.id}"
    model, version = Model(), 0
    ids: list[str] = []
    for action, argument in steps:
        if action == "undo":
            if not ids:
                continue
            number = argument % len(ids)
            response = client.post(f"{path}/decisions/{ids[number]}/undo")
            if number in model.undone:
                assert response.status_code == 409
                continue
            assert response.json()["num_skipped"] == model.undo(number)
        else:
            target = argument
            has_none = action == "accept" and not model.targets(target) <= SUGGESTED.keys()
            label = {"label": "pos"} if action == "edit" else {}
            response = client.post(f"{path}/decisions", json={"action": action, **target, **label})
            if has_none and "indices" in target:
                assert response.status_code == 422
                continue
            assert response.status_code == 201, response.text
            assert response.json()["num_samples"] == len(model.targets(target))
            assert response.json()["num_changed"] == model.decide(action, target)
            ids.append(response.json()["id"])
        version += 1
        page = client.get(f"{path}/suspects").json()["data"]
        state = {
            row["index"]: (row["decision"]["action"], row["decision"]["label"])
            for row in page
            if row["decision"]
        }
        assert state == model.state()
        stored = client.get(path).json()
        assert (stored["decision_version"], stored["num_decided"]) == (version, len(state))
