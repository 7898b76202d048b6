"""Settings that every test shares."""

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
