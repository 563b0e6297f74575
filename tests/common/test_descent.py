from __future__ import annotations

import subprocess
import sys

import torch
from choral.descent import Descent, Optimizer
from torch import nn
from torch.nn.functional import mse_loss


def _trained(make: object) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Linear(2, 2))  # the last is never used
    optimizer: Optimizer = make(model.parameters(), 0.03)  # type: ignore[operator]
    for _ in range(20):
        optimizer.zero_grad()
        x = torch.randn(7, 5)
        mse_loss(model[:3](x), x.sum(dim=1, keepdim=True)).backward()
        optimizer.step()
    return list(model.parameters())


def test_it_is_sgd_to_the_bit() -> None:
    theirs = _trained(lambda parameters, learning_rate: torch.optim.SGD(parameters, lr=learning_rate))
    assert all(torch.equal(mine, other) for mine, other in zip(_trained(Descent), theirs, strict=True))


def test_it_does_without_torchs_compiler() -> None:
    program = """if True:
        import sys, torch
        from choral.descent import Descent
        parameter = torch.nn.Parameter(torch.ones(2))
        descent = Descent([parameter], 0.5)
        descent.zero_grad()
        parameter.sum().backward()
        descent.step()
        print(parameter.tolist(), "torch._dynamo" in sys.modules)
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[0.5, 0.5] False"
