"""Verification: does the file compute what training measured?

The fake-quantized model and the exported file see the same batches. Weight codes must be identical; outputs are
compared in steps of an 8-bit grid over the range of the model's outputs (255 steps from the smallest to the largest
seen), since outputs themselves are float. An output that is the same for every sample (a class that a mask holds at
-1e9) counts neither for the range nor in the average: no quantized arithmetic made it, and it would widen the step
until no deviation of the others shows. Infinities have no place in a range; equal ones are equal.

Outputs need not be bitwise equal: the runtime multiplies its integer accumulator by one combined factor where training
divides twice, so a value that falls on the border of two codes can take the other one (measured: 5 in a million per
layer), and what follows carries it on. Single outputs may therefore be steps away; a file that computes something else
is away on the average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from qat.errors import UserError
from qat.integer import IntegerActivation, IntegerLayer, IntegerTensor
from qat.layers import Part, Site, original_class
from qat.layers.accumulator import ACCUMULATED_BITS
from qat.layers.chain import last_grid
from qat.layers.weights import weight_readers
from qat.planning.plan import kind_of


@dataclass
class Comparison:
    """Outputs of two models over a data set, batch by batch."""

    samples: int = 0
    agreeing: int = 0
    deviation: float = 0.0
    total: float = 0.0
    outputs: dict[int, np.ndarray] = field(default_factory=dict)
    """By how many outputs a tensor has (classes; channels of an image): of each, the smallest and the largest of its
    finite values, and their number, as rows."""
    classes: bool = True
    """Whether all outputs are logits of classes."""

    def update(self, expected: np.ndarray, actual: np.ndarray) -> None:
        """Adds a batch (`[N, C]`, `[N, T, C]` or `[N, ...]`) of the fake-quantized model's outputs and the file's.

        Raises:
            UserError: if the shapes differ.
        """
        if expected.shape != actual.shape:
            raise UserError(
                f"outputs have shape {list(actual.shape)} where the trained model's have {list(expected.shape)}"
            )
        if not expected.size:
            return
        self._widen(expected)
        difference = np.zeros(expected.shape)
        np.subtract(expected, actual, out=difference, where=expected != actual, dtype=np.float64)
        # NaN (not inf - inf, which was left out) compares false with everything, and would slip through a maximum.
        difference = np.nan_to_num(np.abs(difference), nan=np.inf, posinf=np.inf)
        self.deviation = max(self.deviation, float(difference.max()))
        self.total += float(difference.sum())
        if expected.ndim in (2, 3) and expected.shape[-1] > 1:  # classes; of a sequence, at each position
            same = (expected.argmax(-1) == actual.argmax(-1)).reshape(-1)
        else:
            self.classes = False
            same = (difference <= self.step).reshape(len(expected), -1).all(1)
        self.samples += same.size
        self.agreeing += int(same.sum())

    def _widen(self, expected: np.ndarray) -> None:
        each = np.moveaxis(expected, 1 if expected.ndim > 3 else -1, 0) if expected.ndim > 1 else expected[None]
        each = each.reshape(len(each), -1)
        seen = self.outputs.setdefault(len(each), np.array([[np.inf], [-np.inf], [0.0]]).repeat(len(each), 1))
        finite = np.isfinite(each)
        seen[0] = np.minimum(seen[0], each.min(1, where=finite, initial=np.inf))
        seen[1] = np.maximum(seen[1], each.max(1, where=finite, initial=-np.inf))
        seen[2] += finite.sum(1)

    def _counted(self) -> np.ndarray:
        """Rows of `outputs` for those that vary; for all that were ever finite if none does (there is one sample)."""
        seen = np.concatenate([np.empty((3, 0)), *self.outputs.values()], 1)
        varies = seen[0] < seen[1]
        return seen[:, varies if varies.any() else seen[2] > 0]

    @property
    def step(self) -> float:
        """Width of a step of the 8-bit grid over the outputs seen so far."""
        low, high, _ = self._counted()
        span = float(high.max(initial=-np.inf) - low.min(initial=np.inf))
        return max(span, 0.0) / 255 or float(np.finfo(np.float32).tiny)

    @property
    def agreement(self) -> float:
        """Share of equal predictions: the same largest class, of each sample or (outputs `[N, T, C]`) of each position
        in it; or every value of a sample within one step where outputs are no classes."""
        return self.agreeing / self.samples if self.samples else 0.0

    @property
    def deviation_steps(self) -> float:
        """Largest deviation in steps; infinite if there were NaNs."""
        return self.deviation / self.step

    @property
    def mean_steps(self) -> float:
        """Mean deviation in steps."""
        return self.total / max(float(self._counted()[2].sum()), 1) / self.step


@dataclass
class Check:
    name: str
    passed: bool
    detail: str


@dataclass
class Verdict:
    """Result of verification; `passed` if every check did."""

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def add(self, name: str, passed: bool, detail: str) -> None:
        self.checks.append(Check(name, bool(passed), detail))

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "checks": [vars(c) for c in self.checks], **self.facts}


def expected_integer_nodes(converted: nn.Module) -> int:
    """Convolutions, linear layers and matrix products whose operands are both integers, of one scale per accumulator
    (groups have several)."""
    return sum(_integer_products(converted).values())


def _integer_products(converted: nn.Module) -> dict[str, int]:
    """How many of them each layer and site has; one that runs several times counts once."""
    return {
        name: _site_products(name, module) if isinstance(module, Site) else int(is_integer_layer(module))
        for name, module in converted.named_modules()
    }


def is_integer_layer(module: nn.Module) -> bool:
    """Whether a layer multiplies integers on both sides, and adds them up in one accumulator of one scale."""
    return (
        isinstance(module, IntegerLayer)
        and issubclass(original_class(module), nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Part)
        and module.integer_weight.group_size is None
        and module.integer_weight.number is None
        and module.integer_weight.bits <= ACCUMULATED_BITS
        and _is_codes(module.input_quantizer)  # pyright: ignore[reportAttributeAccessIssue]
    )


def _site_products(name: str, site: Site) -> int:
    """Integer products of one functional site; the runtime has no integer kernel for an einsum, and one for a
    convolution only where its output is quantized, too.
    """
    kind, weight = kind_of(name), site._modules.get("integer_weight")
    operands = [_is_codes(site._modules[operand]) for operand in site.operands]
    if kind == "attention":
        return int(operands[0] and operands[1]) + int(operands[2] and _is_codes(site.probability_quantizer))
    if isinstance(weight, IntegerTensor):
        return int(kind in ("linear", "matmul") and operands[0] and weight.group_size is None and not weight.number)
    return int(kind == "matmul" and all(operands))


def _is_codes(grid: Any) -> bool:
    last = last_grid(grid)
    return isinstance(last, IntegerActivation) and last.spec.integer and last.spec.width <= ACCUMULATED_BITS


def expected_codes(prepared: nn.Module) -> dict[str, np.ndarray]:
    """The codes of every quantized weight of a model, converted or fake-quantized, by layer."""
    layers = ((name, module) for name, module in prepared.named_modules() if isinstance(module, IntegerLayer))
    found = {name: layer.integer_weight.codes for name, layer in layers}
    found |= {w.name: w.quantizer.quantize(w.tensor) for w in weight_readers(prepared) if w.quantizer.on}
    return {name: codes.numpy() for name, codes in found.items()}


def check_codes(verdict: Verdict, prepared: nn.Module, stored: Mapping[str, np.ndarray]) -> None:
    """Every weight's codes in the file against those of the model that was exported, bit for bit."""
    expected = expected_codes(prepared)
    wrong = [name for name, codes in expected.items() if not _same(stored.get(name), codes)]
    verdict.facts["codes_identical"] = not wrong
    detail = f"of all {len(expected)} layers identical"
    if wrong:
        how = "differ" if wrong[0] in stored else "are missing"
        detail = f"of {len(wrong)} of {len(expected)} layers not those of the model; first, those of '{wrong[0]}' {how}"
    verdict.add("weight codes", not wrong, detail)


def _same(stored: np.ndarray | None, codes: np.ndarray) -> bool:
    return stored is not None and stored.dtype == codes.dtype and np.array_equal(stored, codes)


def count_kernels(
    verdict: Verdict,
    converted: nn.Module,
    found: int,
    *,
    without: int = 0,
    what: str = "convolutions and matrix products",
    floats: Sequence[str] | None = None,
    why: str = "nothing quantizes the output",
) -> None:
    """How many products run on integers, of those whose operands are.

    Args:
        verdict: Gets one check, and the facts of it.
        converted: The converted model.
        found: How many do; a layer that runs several times (the steps of an LSTM) may count as often.
        without: For how many the runtime has no integer kernel.
        what: Name of the products that were counted.
        floats: The layers that are computed in float, if they are known; those that should not be are named.
        why: The runtime has none for those.
    """
    products = _integer_products(converted)
    expected = sum(products.values())
    found = min(found, expected - sum(products.get(name, 0) for name in floats or ()))
    verdict.facts.update(integer_nodes=found, expected_integer_nodes=expected)
    others = {name for name, _ in converted.named_modules()} - {name for name, count in products.items() if count}
    named = [name for name in floats or () if name not in others]
    note = f"; in float: {', '.join(named)}" if named else ""
    passed = found >= expected - without
    if (left := min(expected - found, without)) > 0:
        note += f"; {left} without an integer kernel: {why}"
    if passed and left > 0:
        verdict.facts["no_integer_kernel"] = why
    verdict.add("integer kernels", passed, f"{found} of {expected} {what}{note}")


def check_outputs(
    verdict: Verdict, comparison: Comparison, min_agreement: float, max_mean_steps: float, note: str = ""
) -> None:
    """Predictions and outputs over the data set.

    Args:
        verdict: Gets two checks.
        comparison: The comparison of the file with the fake-quantized model.
        min_agreement, max_mean_steps: See `Target`.
        note: A remark that distinguishes the run (" without optimizations"); its deviations are kept as no facts of the
            file.
    """
    if not note:
        verdict.facts.update(
            agreement=comparison.agreement,
            classes=comparison.classes,
            max_deviation_steps=comparison.deviation_steps,
            mean_deviation_steps=comparison.mean_steps,
            samples=comparison.samples,
        )
    verdict.add(
        f"predictions{note}",
        comparison.agreement >= min_agreement,
        f"{comparison.agreement:.2%} of {comparison.samples} agree (at least {min_agreement:.2%} wanted)",
    )
    detail = (
        f"deviate by {comparison.mean_steps:.3f} steps of the 8-bit output grid on the average "
        f"(at most {max_mean_steps:g} wanted), {comparison.deviation_steps:.2f} at most"
    )
    verdict.add(
        f"outputs{note}",
        comparison.mean_steps <= max_mean_steps,
        detail if np.isfinite(comparison.deviation) else "hold NaN or infinity",
    )


def check_metric(verdict: Verdict, name: str, trained: float, exported: float, max_change: float) -> None:
    """The metric from the file's own predictions against the one from training."""
    verdict.facts["metric"] = exported
    change = abs(exported - trained)
    verdict.add(
        "metric",
        change <= max_change,
        f"{name} {exported:.4f}, fake-quantized {trained:.4f} (at most {max_change:g} apart)",
    )
