"""Pages that a step asks of the system anew: next to none, once it has been taken a few times."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch, lightning_ebm as ebm
from torch import nn
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(784, 512), nn.Hardtanh(0.0, 1.0), nn.Linear(512, 10))
x, y = torch.rand(128, 784), torch.arange(128) % 10
learner = ebm.Learner(net, "equilibrium-propagation")
optimizer = torch.optim.Adam(net.parameters())
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.zero_grad()
    learner.backward(lambda: nn.functional.cross_entropy(net(x), y))
    optimizer.step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
@pytest.mark.skipif(any(k.startswith(("MALLOC_", "GLIBC_TUN", "LD_PRE")) for k in os.environ), reason="malloc is set")
def test_what_a_step_lets_go_of_stays_in_the_heap() -> None:
    """Its states and gradients are about 1000 pages; without keep_heap most of them are asked for anew each time."""
    run = [sys.executable, "-c", FAULTS]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300).stdout
    assert float(out) < 50
