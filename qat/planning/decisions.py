"""What a plan is made from: one recorded pass of a model, the places in it that a policy can address, and what the
policy decides for each.
"""

from dataclasses import dataclass

from torch import nn

from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.planning.addressable import described, places
from qat.planning.recording import Call, Recording
from qat.policies.networks import Policy


@dataclass(frozen=True)
class Decisions:
    """The decisions of a policy on a model.

    Attributes:
        model: The model.
        recording: A pass of it.
        calls: The layers and sites that the policy can address, in execution order, each with its calls.
        specs: For each of these: what the policy decided of its `weight` and of its inputs (`act`), `None` for float.
    """

    model: nn.Module
    recording: Recording
    calls: dict[str, list[Call]]
    specs: dict[str, dict[str, QuantSpec | None]]

    def weight(self, place: str) -> QuantSpec | None:
        return self.specs[place]["weight"]

    def act(self, place: str) -> QuantSpec | None:
        return self.specs[place]["act"]


def decide(model: nn.Module, policy: Policy, recording: Recording) -> Decisions:
    """Asks the policy.

    Raises:
        UserError: if there is nothing to decide, or if a rule matches nothing.
    """
    calls = places(model, recording)
    if not calls:
        raise UserError(
            f"{type(model).__name__} has no layer that can be quantized: "
            "the probe batch passed no Linear, Conv, Embedding, LSTM or the like"
        )
    decided = policy.resolve(described(calls))
    specs = {name: {role: spec for role, (spec, _) in roles.items()} for name, roles in decided.items()}
    return Decisions(model, recording, calls, specs)
