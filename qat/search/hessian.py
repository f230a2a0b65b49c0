"""The trace of the loss's Hessian with respect to each weight and each layer's input, without ever building it.

Hutchinson's estimator: for random v of independent +1 and -1 (Rademacher), E[v' H v] = tr(H), and H v is the gradient
of g'v, where g is the gradient of the loss (HAWQ-V2, Dong et al., arXiv 1911.03852, section 3.2 for weights and 3.3 for
activations). One random vector covers all tensors at once: for the block H_ii of tensor i, E[v_i' (H v)_i] = tr(H_ii),
since the other blocks' terms have mean zero. That costs one double backward pass for the whole model where HAWQ-V2's
layer-wise passes cost one for each layer, at some variance.

An input is perturbed where its first reader takes it: the Hessian is that of the loss in a tensor of zeros added there.
For a mean loss over a batch of B samples, its trace times the mean squared error of the grid is the same as for a
weight: twice the expected increase of the mean loss.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qat.copies import copied
from qat.errors import UserError, first_line
from qat.insert import apply_plan
from qat.layers import Composite, mixin_for
from qat.planning.plan import Plan, PlannedLayer

SEED = 0


def traces(
    model: nn.Module,
    tensors: Mapping[str, list[str]],
    losses: Callable[[nn.Module], Iterator[tuple[Tensor, int]]],
    probes: int,
) -> dict[str, float]:
    """Estimates the traces.

    Args:
        model: The float model, in evaluation mode; it is left as it is.
        tensors: Name of a weight (`conv1.weight`) or input -> the layers that read it.
        losses: Runs the model over batches with gradients; the mean loss and the number of samples of each.
        probes: Random vectors per batch.

    Returns:
        The trace of each, averaged over probes and samples.

    Raises:
        UserError: if an operation of the model has no second derivative.
    """
    model = copied(model)
    weights = {t: w for t, readers in tensors.items() if (w := _weight(model, t, readers)) is not None}
    inputs = {t: readers for t, readers in tensors.items() if t not in weights}
    _let_call(model, {reader.rpartition(".")[0] for readers in inputs.values() for reader in readers})
    generator = torch.Generator().manual_seed(SEED)
    totals, samples = dict.fromkeys(tensors, 0.0), 0
    for weight in weights.values():
        weight.requires_grad_(True)
    # Fused attention has a first derivative only.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _perturbed(model, inputs) as zeros:
        for loss, count in losses(model):
            found = {**weights, **zeros}
            for tensor, value in _batch_traces(loss, found, probes, generator).items():
                totals[tensor] += value * count
            samples += count
            zeros.clear()
    return {tensor: total / max(1, samples) for tensor, total in totals.items()}


def _weight(model: nn.Module, tensor: str, readers: list[str]) -> nn.Parameter | None:
    weight = model.get_submodule(readers[0])._parameters.get("weight")
    return weight if tensor.endswith(".weight") else None


def _let_call(model: nn.Module, owners: Iterable[str]) -> None:
    """Lets layers call those of their children whose weights alone they read (`MultiheadAttention`'s `out_proj`), as
    their twins without grids do: an input that no hook sees would have no trace."""
    parts: dict[str, PlannedLayer] = {}
    for owner in owners:
        layer = model.get_submodule(owner)
        if (mixin := mixin_for(layer)) is not None and issubclass(mixin, Composite):
            parts |= {f"{owner}.{part}".lstrip("."): PlannedLayer(None, []) for part in mixin.parts(layer)}
    if parts:
        apply_plan(model, Plan(layers=parts))


@contextmanager
def _perturbed(model: nn.Module, inputs: Mapping[str, list[str]]) -> Iterator[dict[str, Tensor]]:
    """Adds a tensor of zeros to each input as it passes; those of the last pass are in the dict."""
    zeros: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            zero = zeros.get(name)
            if zero is None or zero.shape != x.shape:  # the first reader's; another may see it reshaped
                zero = torch.zeros_like(x, requires_grad=True)
                zeros.setdefault(name, zero)
            return (x + zero, *args[1:])

        return hook

    with ExitStack() as hooks:
        for name, readers in inputs.items():
            for reader in readers:
                hooks.enter_context(model.get_submodule(reader).register_forward_pre_hook(adding(name)))
        yield zeros


def _batch_traces(
    loss: Tensor, tensors: Mapping[str, Tensor], probes: int, generator: torch.Generator
) -> dict[str, float]:
    points = list(tensors.values())
    try:
        gradients = torch.autograd.grad(loss, points, create_graph=True, materialize_grads=True)
        sums = [0.0] * len(points)
        for _ in range(probes):
            signs = [_rademacher(p, generator) for p in points]
            along = torch.stack([(g * v).sum() for g, v in zip(gradients, signs, strict=True)]).sum()
            if not along.requires_grad:  # a loss that is linear in everything
                break
            products = torch.autograd.grad(along, points, retain_graph=True, materialize_grads=True)
            for i, (hv, v) in enumerate(zip(products, signs, strict=True)):
                sums[i] += (hv * v).sum().item() / probes
    except RuntimeError as error:
        raise UserError(
            f"the Hessian's trace cannot be estimated ({first_line(error)}); leave it out with search.probes=0"
        ) from None
    return dict(zip(tensors, sums, strict=True))


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.float32)
    return (signs * 2 - 1).to(like)
