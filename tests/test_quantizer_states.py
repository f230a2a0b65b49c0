"""States of quantizers never change: what is in a checkpoint has the same keys, types, shapes and meaning for ever.

`quantizer_states.json` holds, for each quantizer as a weight `[4, 8]` and as an activation, a state that was saved when
the class was added, and what the class made of a fixed tensor with it. A new class gets its entry by

    python tests/test_quantizer_states.py

which leaves those that are there as they are. Where a test here fails, checkpoints of users would load wrongly, or not
at all: change the class, not the file.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat import quantizers
from qat.errors import UserError
from qat.files import atomic
from qat.grid.spec import QuantSpec

FILE = Path(__file__).with_name("quantizer_states.json")
SHAPE = torch.Size((4, 8))
X = ((torch.arange(32) * 11 % 32 - 15.5) / 8).view(SHAPE) * torch.tensor([[1.0], [0.5], [2.0], [0.25]])
"""Exact in every arithmetic."""
SPECS = {  # each quantizer takes the first that suits it
    "weight": [
        {"bits": 4, "granularity": "channel"},
        {"bits": 2, "format": "midrise", "granularity": "channel"},
    ],
    "activation": [{"bits": 4, "symmetric": False}, {"bits": 4}, {"bits": 2, "format": "midrise"}],
}
CASES = [f"{name} {role}" for name in quantizers.names() for role in SPECS]
STORED: dict[str, Any] = json.loads(FILE.read_text())


def create(name: str, role: str, settings: dict[str, Any]) -> quantizers.Quantizer:
    spec = QuantSpec(**settings, quantizer=name).resolved(nonnegative=False, weight=role == "weight")
    return quantizers.create(spec, SHAPE if role == "weight" else None)


def behaviour(quantizer: quantizers.Quantizer) -> dict[str, Any]:
    """What evaluation makes of a tensor, and then training, in which some grids move."""
    measured = {"evaluation": _numbers(quantizer.eval()(X))}
    x = X.clone().requires_grad_()
    y = quantizer.train()(x)
    (y * X).sum().backward()
    assert x.grad is not None
    return measured | {"training": _numbers(y), "gradient": float((x.grad * X).sum())}


def entry(case: str) -> dict[str, Any] | None:
    """A new entry, of a state unlike a fresh one; `None` if the quantizer has no such role."""
    name, role = case.split()
    for settings in SPECS[role]:
        try:
            quantizer = create(name, role, settings)
        except UserError:
            continue
        quantizer.calibrate(X)
        behaviour(quantizer)  # some grids move
        for parameter in quantizer.parameters():
            parameter.data -= 0.01 * parameter.grad
        state = {key: [str(t.dtype), list(t.shape), _numbers(t)] for key, t in quantizer.state_dict().items()}
        new = {"spec": settings, "state": state, **behaviour(quantizer)}
        return {key: value for key, value in new.items() if key != "training" or value != new["evaluation"]}
    return None


def _numbers(x: Tensor) -> list[Any]:
    """Its numbers, each in the fewest digits that give it back."""
    flat = x.detach().flatten()
    return [float(str(n)) for n in flat.numpy()] if flat.is_floating_point() else flat.tolist()


def _tensor(dtype: str, shape: list[int], numbers: list[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=getattr(torch, dtype.removeprefix("torch."))).view(shape)


@pytest.mark.parametrize("case", CASES)
def test_a_state_of_a_former_version_loads_and_means_the_same(case):
    if case not in STORED:
        assert entry(case) is None, "it is new: python tests/test_quantizer_states.py adds its state"
        return
    stored = {"training": STORED[case]["evaluation"], **STORED[case]}
    quantizer = create(*case.split(), stored.pop("spec"))
    state = {key: _tensor(*saved) for key, saved in stored.pop("state").items()}
    now = quantizer.state_dict()
    assert {key: (t.dtype, t.shape) for key, t in now.items()} == {key: (t.dtype, t.shape) for key, t in state.items()}
    quantizer.load_state_dict(state)
    found = behaviour(quantizer)
    assert found.keys() == stored.keys()
    for what, numbers in found.items():
        assert numbers == pytest.approx(stored[what], rel=1e-5), what


def test_no_quantizer_of_a_former_version_is_gone():
    assert STORED.keys() <= set(CASES)


if __name__ == "__main__":
    known = STORED | {case: new for case in CASES if case not in STORED and (new := entry(case))}
    lines = [f"{json.dumps(case)}: {json.dumps(known[case], separators=(',', ':'))}" for case in sorted(known)]
    with atomic(FILE) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
