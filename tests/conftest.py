"""Settings that every test shares."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: without network they would wait and try again

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
