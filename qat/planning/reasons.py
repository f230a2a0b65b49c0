"""Why a part of a model stays float, in words; `qat.planning.audit` puts them beside everything else it knows."""

from collections.abc import Iterator

from torch import nn

from qat.layers import MIXINS, Composite, Site, mixin_for, original_class
from qat.layers.adapted import inside_adapters
from qat.planning.addressable import computed, described, has_weight, is_complex, is_norm, places, type_of
from qat.planning.plan import Plan, grids_of
from qat.planning.recording import Call, Recording
from qat.policies.networks import policy_of
from qat.quantizers import Quantizer, learned_by

FOLDS = "folds into "
FLOAT_CODES = "computed in float: "
ADAPTER = "an adapter, which stays float until it is merged (qat.merge_adapters)"
NOT_REACHED = "its forward is never called"
NORMALISES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
NAMES = {"add": "sum", "sub": "difference"}
NO_KERNEL = ("einsum", "Bilinear", "ConvTranspose", "conv_transpose")
"""Kinds that an exported file computes in float on the values of its codes."""
NOT_IN_F = ("matmul", "einsum", "attention")


class Reasons:
    """Reads the policy's decisions again and asks the recording who ran, and who took which parameter.

    Attributes:
        calls: The calls of everything that a policy can address.
        modules: The calls of layers, by name.
        parameters: The model's own by id. They outlive the recording, so ids still tell which calls took them.
    """

    def __init__(self, model: nn.Module, plan: Plan, recording: Recording) -> None:
        self.model, self.plan, self.recording = model, plan, recording
        self.calls = places(model, recording)
        self.adapters = set(inside_adapters(model))
        self.decisions = policy_of(plan.policy).resolve(described(self.calls))
        self.modules: dict[str, list[Call]] = {}
        for call in recording.modules:
            self.modules.setdefault(call.name, []).append(call)
        scales = learned_by(model)
        self.parameters = {id(p): p for p in model.parameters() if id(p) not in scales}
        computing = [c for c in recording.functions if not c.site]
        self.taken_by = {key[0]: c for c in computing for key in c.inputs if key[0] in self.parameters}

    def of_layer(self, name: str, module: nn.Module) -> str | None:
        """`None` if `module`, one of `layers`, is integer throughout."""
        if name in self.calls:
            return self.of_place(name)
        if name in self.adapters:
            return ADAPTER
        if is_norm(module):
            return self._norm(name)
        if mixin_for(module) is not None:
            return self._unreached(name, module)
        return self._no_twin(module)

    def of_place(self, name: str) -> str | None:
        """Why a layer or site stays float that could be quantized: what of it is left float, and by which rule."""
        call = self.calls[name][0]
        weighted = call.weight or has_weight(call.what)
        parts = (["weight"] if weighted else []) + (["act"] if call.operands else [])
        left = [p for p in parts if self.decisions[name][p][0] is None]
        if not left:
            kind = call.kind or type_name(call.what)
            if call.weight and self._scales_along_the_sum(name):
                return "its weight has the scales of a layer that it is tied to, which run along the sum"
            if kind.startswith(NO_KERNEL):
                return f"ONNX Runtime has no integer kernel for {kind}"
            return self._float_codes(name)
        what = "it" if left == parts else "its weight" if left == ["weight"] else "its input"
        by = sorted({self.decisions[name][p][1] for p in left})
        who = " and ".join("policy" if b == "default" else f"rule '{b}'" for b in by)
        return f"{who} {'leaves' if len(by) == 1 else 'leave'} {what} float"

    def _float_codes(self, name: str) -> str | None:
        weight, chains = grids_of(self.plan, name)
        read = [*([weight] if weight else []), *(chain[-1] for chain in chains)]
        formats = dict.fromkeys(spec.format for spec in read if not spec.integer)
        return f"{FLOAT_CODES}{' and '.join(formats)} codes are no integers" if formats else None

    def _scales_along_the_sum(self, site: str) -> bool:
        """Whether a product reads a tied weight whose channels are not the product's own."""
        weight = self.plan.parameters[site]
        owner = weight.weight
        if owner is None or owner in self.plan.parameters or weight.stacked:
            return False
        axis = mixin_for(self.calls[owner][0].what).channel_axis  # pyright: ignore[reportOptionalMemberAccess]
        return self.plan.weights[owner].granularity == "channel" and axis != weight.axis

    def of_site(self, call: Call) -> str | None:
        if call.site in self.calls:
            return self.of_place(call.site)
        if call.constant:
            return "computed from no data: the same for every input"
        if call.name in self.adapters:
            return ADAPTER
        if call.infinite:
            return "one side is a constant that holds infinity (a mask), for which there is no grid"
        if call.parameter is None:
            return "mean over other axes than an image's"
        what = "a vector of parameters" if call.vector else "a parameter"
        return f"one side of the {NAMES.get(call.kind or '', 'product')} is {what}"

    def of_function(self, call: Call) -> str:
        kind = call.kind or ""
        if call.parameter:
            return f"functional use of a weight ({_spelled(kind)})"
        return f"{kind} in the forward of {self._owner(call.name)}"

    def of_parameter(self, name: str) -> str:
        return f"parameter of {self._owner(name.rpartition('.')[0])} itself, in no layer"

    def _owner(self, name: str) -> str:
        return f"'{name}'" if name else type_name(self.model)

    def _norm(self, name: str) -> str:
        into = next((layer for layer, norm in self.plan.batch_norms.items() if norm == name), None)
        if into is not None:
            return f"{FOLDS}{into}"
        return f"kept in float: {self._why_kept(name)}" if name in self.modules else NOT_REACHED

    def _why_kept(self, name: str) -> str:
        call, *more = self.modules[name]
        before = next((c for c in self.recording.modules if c.output and c.output in call.inputs), None)
        if before is None or not has_weight(before.what):
            return "follows no layer it can fold into"
        if more:
            return f"it runs {1 + len(more)} times"
        if (times := len(self.modules[before.name])) > 1:
            return f"'{before.name}' before it runs {times} times, and one bias cannot hold all that follows"
        if self.recording.readers[call.inputs[0]] > 1:
            return f"others read the output of '{before.name}', too"
        return f"cannot fold into '{before.name}'"

    def _unreached(self, name: str, module: nn.Module) -> str:
        if name in self.modules:
            return (
                "its weight is complex"
                if is_complex(module)
                else f"{computed(module)} is computed by pruning or a hook"
            )
        user = self._user(module)
        return f"functional use of its weight ({_spelled(user.kind)})" if user else NOT_REACHED

    def _no_twin(self, module: nn.Module) -> str:
        cls, user = original_class(module), self._user(module)
        base = next((m.serves.__name__ for m in MIXINS if issubclass(cls, m.serves)), None)
        if base is not None:
            return f"subclass of {base} with a forward of its own"
        if user is not None and not _is_torchs(cls):
            return f"functional use of a weight ({_spelled(user.kind)})"
        return f"no quantized version of {cls.__name__}"

    def _user(self, module: nn.Module) -> Call | None:
        """A function call that took one of the module's parameters."""
        return next((self.taken_by[id(p)] for p in module.parameters() if id(p) in self.taken_by), None)


def layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's layers that have parameters or arithmetic, each once; those with a twin are not entered, but for
    the layers that one made of several holds (`attn.out_proj`).
    """
    inside: set[nn.Module] = set()
    for name, module in root.named_modules():
        mixin = mixin_for(module)
        if isinstance(module, Composite):  # its parts are listed instead
            continue
        if module in inside:
            continue
        if isinstance(module, Site | Quantizer) or mixin is not None:
            inside.update(m for m in module.modules() if m is not module)
        if mixin is not None and issubclass(mixin, Composite):
            inside.difference_update(m for m in module.children() if mixin_for(m) is not None)
        if not isinstance(module, Site | Quantizer) and _is_listed(module, is_root=not name):
            yield name, module


def _is_listed(module: nn.Module, is_root: bool) -> bool:
    if mixin_for(module) is not None or isinstance(module, NORMALISES):
        return True
    owns = any(p is not None for p in module._parameters.values())
    is_container = is_root or any(not isinstance(child, Site) for child in module.children())
    return owns and (not is_container or _is_torchs(original_class(module)))


def type_name(module: nn.Module) -> str:
    return type_of(module).__name__


def _is_torchs(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.")


def _spelled(kind: str | None) -> str:
    return f"{kind}" if kind in NOT_IN_F else f"F.{kind}"
