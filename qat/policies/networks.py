"""Policies for parts of a model: a GAN's generator at 4 bits and its discriminator at 8, or one of two networks alone.

`NetworkPolicies` answers what a `QuantPolicy` does, and is none itself: it has no rules of its own. It hands every
layer and site to the policy of the network that it is in, under its name *within* that network. So a policy is the same
whether its network stands alone or inside a larger model, and `@first` is the network's first layer. What is in no
network stays float.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qat.errors import UserError, nearest
from qat.grid.spec import QuantSpec
from qat.policies.policy import QuantPolicy
from qat.policies.rules import ROLES, Place

KEY = "modules"
"""The only key of its settings: `{modules: {generator: {weight: ..., act: ...}}}`."""


class NetworkPolicies:
    """One policy per network.

    Args:
        networks: Path of a submodule -> its policy.

    Raises:
        UserError: if one network lies within another, whose layers would then have two policies, or has such policies.
    """

    def __init__(self, networks: "Mapping[str, Policy]") -> None:
        self.networks: dict[str, QuantPolicy] = {}
        for path, policy in networks.items():
            if not isinstance(policy, QuantPolicy):
                raise UserError(f"module={path}: its policy has networks of its own, {', '.join(policy.networks)}")
            self.networks[path] = policy
            if around := [p for p in networks if path != p and _inside(path, p)]:
                raise UserError(f"module={path}: lies within '{around[0]}', which has a policy of its own")
        self.settings: dict[str, Any] = {KEY: {path: policy.settings for path, policy in self.networks.items()}}
        self.required_coverage = {path: policy.required_coverage[""] for path, policy in self.networks.items()}
        self.concat: str = self._agreed("concat")
        self.engine: str | None = self._agreed("engine")
        self.round_bias: str = self._agreed("round_bias")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "quant") -> "NetworkPolicies":
        """Builds it from plain containers; see `QuantPolicy.from_dict`."""
        for key in settings:
            if key != KEY:
                raise UserError(f"{where}.{key}: no such setting beside {KEY}; each network has its own")
        networks = settings[KEY]
        if not isinstance(networks, Mapping) or not networks:
            raise UserError(f"{where}.{KEY}={networks!r}: must map the path of each network to its policy")
        return cls({str(n): QuantPolicy.from_dict(policy, f"{where}.{KEY}.{n}") for n, policy in networks.items()})

    def _agreed(self, key: str) -> Any:
        if len(ways := {getattr(policy, key) for policy in self.networks.values()}) > 1:
            raise UserError(f"{key}: the networks of one model share a setting, theirs differ; set the same in each")
        return ways.pop()

    def covers(self, name: str) -> bool:
        return any(_inside(name, path) for path in self.networks)

    @property
    def is_off(self) -> bool:
        return all(policy.is_off for policy in self.networks.values())

    def resolve(self, places: Sequence[Place]) -> dict[str, dict[str, tuple[QuantSpec | None, str]]]:
        decided: dict[str, dict[str, tuple[QuantSpec | None, str]]] = {
            place.name: dict.fromkeys(ROLES, (None, "default")) for place in places
        }
        for path, policy in self.networks.items():
            inner = {p.name[len(path) + 1 :]: p for p in places if p.name != path and _inside(p.name, path)}
            if not inner:
                parents = [p.name.rsplit(".", n)[0] for p in places for n in range(1, p.name.count(".") + 1)]
                raise UserError(
                    f"module={path}: the step ran no layer in it that can be quantized{nearest(path, parents)}"
                )
            own = policy.resolve([replace(p, name=name) for name, p in inner.items()])
            decided.update((p.name, own[name]) for name, p in inner.items())
        return decided


Policy = QuantPolicy | NetworkPolicies
"""A policy for a whole model, or policies for networks in it."""


def policy_of(settings: Mapping[str, Any], where: str = "quant") -> Policy:
    """The policy of these settings: of a whole model, or of networks in it if they have `modules`.

    Raises:
        UserError: see `QuantPolicy.from_dict`.
    """
    several = isinstance(settings, Mapping) and KEY in settings
    return NetworkPolicies.from_dict(settings, where) if several else QuantPolicy.from_dict(settings, where)


def _inside(name: str, path: str) -> bool:
    return f"{name}.".startswith(f"{path}.")
