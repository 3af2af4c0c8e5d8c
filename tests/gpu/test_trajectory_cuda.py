"""What waits in host memory on a GPU: the same bits, and nothing waits for them."""

import numpy as np
import pytest
import torch

from fastgrpo.rollout.trajectory import keep_rows, take_rows

pytestmark = pytest.mark.gpu


def test_rows_go_to_the_host_and_back_without_waiting():
    x = torch.randn(6, 3, 5, device="cuda")
    kept = torch.empty(4, 3, 5, pin_memory=True)
    index = torch.tensor([5, 0, 2, 2], device="cuda")
    chosen = torch.tensor([3, 1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep_rows(kept, x, index)
        back = take_rows(kept, np.array([3, 1]), chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(back, x[[2, 0]])
