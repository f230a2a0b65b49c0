"""Gradient checkpointing: the second forward neither observes nor counts again; gradients are those of one forward."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from tiny_module import MINMAX, POLICY, Tiny, loader, quantizer_state, same, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.errors import UserError
from qat.lightning import TrackOscillations

WAYS = [
    pytest.param(None, id="without"),
    pytest.param(False, id="non-reentrant"),
    pytest.param(True, id="reentrant"),
]


class Block(nn.Module):
    """A residual block; its addition is a site of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class Checkpointed(Tiny):
    """Recomputes its block, if told in which way."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__(norm=False)
        self.net = nn.ModuleDict({"stem": nn.Conv2d(1, 4, 3, padding=1), "block": Block(), "head": nn.Linear(4, 3)})
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.net["stem"](x))
        if self.reentrant is None:
            x = self.net["block"](x)
        else:
            x = checkpoint(self.net["block"], x, use_reentrant=self.reentrant)
        return self.net["head"](x.mean((2, 3)))


def _trained(reentrant: bool | None, policy: dict[str, Any], tmp_path: Any) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    net, seen, oscillations = Checkpointed(reentrant), {}, TrackOscillations(momentum=0.1)

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 0:
                seen["gradients"] = {n: p.grad.clone() for n, p in pl_module.named_parameters()}

    trainer(tmp_path, Look(), oscillations, policy=policy, max_epochs=2).fit(net, loader())
    seen["ranges"], seen["weights"] = quantizer_state(net), dict(net.state_dict())
    seen["flips"] = {name: state.frequency for name, state in oscillations.weights.items()}
    return seen


ANNEALED = {role: {"bits": 4, "quantizer": "dsq", "options": {"steps": 10}} for role in ("weight", "act")}


@pytest.mark.parametrize(
    "policy", [pytest.param(POLICY, id="lsq"), pytest.param(MINMAX, id="minmax"), pytest.param(ANNEALED, id="dsq")]
)
@pytest.mark.parametrize("reentrant", WAYS[1:])
def test_recomputing_a_block_changes_no_gradient_range_or_count(reentrant, policy, tmp_path):
    once, twice = _trained(None, policy, tmp_path), _trained(reentrant, policy, tmp_path)
    for what in ("gradients", "ranges", "weights", "flips"):
        assert same(once[what], twice[what]), what
    assert once["flips"] and all(gradient.any() for gradient in once["gradients"].values())


class Partly(nn.Module):
    """Checkpoints the middle of its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def middle(self, x):
        return x + self.second(x)

    def forward(self, x):
        return checkpoint(self.middle, self.first(x), use_reentrant=True)


def test_a_reentrant_checkpoint_around_a_site_of_the_forward_it_is_in_is_refused():
    model, x = Partly(), torch.randn(8, 4)
    qat.quantize(model, {"weight": {"bits": 8}, "act": {"bits": 8}}, x)
    with torch.no_grad():
        model(x)
    with pytest.raises(UserError, match=r"add_0' lies in a part .* set use_reentrant=False"):
        model(x)
