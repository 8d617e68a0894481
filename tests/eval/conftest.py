"""What these tests get beside the seed: one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Models here are tiny, and a second thread on a core that another process has makes a step ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
