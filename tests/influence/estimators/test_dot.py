import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.influence.estimators.grad_cosine import GradCosine
from workers.influence.estimators.grad_dot import GradDot
from workers.influence.estimators.self_influence import SelfInfluence


def gradients(num: int, *, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(num, 10, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 1000), exponent=st.integers(-15, 15))
def test_cosine_and_dot_equal_their_definition(seed: int, exponent: int) -> None:
    """One pair at a time, and tiny or huge gradients do not under- or overflow the cosine."""
    validation_Vd = gradients(3, seed=seed, scale=10.0**exponent)
    train_Bd = gradients(4, seed=seed + 1)
    dot_VB = validation_Vd @ train_Bd.T
    norms = {
        "validation_norm_V": validation_Vd.norm(dim=1),
        "train_norm_B": train_Bd.norm(dim=1),
    }
    assert torch.equal(GradDot().influence(dot_VB=dot_VB, **norms), dot_VB)
    cosine_VB = GradCosine().influence(dot_VB=dot_VB, **norms)
    for j in range(3):
        for i in range(4):
            v, g = validation_Vd[j].double(), train_Bd[i].double()
            expected = float(v @ g / (v.norm() * g.norm()))
            assert abs(float(cosine_VB[j, i]) - expected) < 1e-5


def test_zero_gradients_have_zero_cosine() -> None:
    cosine_VB = GradCosine().influence(
        dot_VB=torch.tensor([[0.0, 0.0], [0.0, 3.0]]),
        validation_norm_V=torch.tensor([0.0, 3.0]),
        train_norm_B=torch.tensor([0.0, 1.0]),
    )
    assert cosine_VB.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_the_largest_gradient_is_the_most_suspect_by_self_influence() -> None:
    influence_1B = SelfInfluence().influence(squared_norm_B=torch.tensor([1.0, 9.0, 4.0]))
    assert influence_1B.tolist() == [[-1.0, -9.0, -4.0]]
