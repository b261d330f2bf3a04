import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the engine would run on here: the same tests hold on both."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
