"""One thread for the tests of the documentation."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny sizes gain nothing from threads, and lose where other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
