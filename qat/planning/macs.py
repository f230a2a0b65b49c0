"""Multiply-accumulates: of a layer, and of a function from the shapes of its operands.

Counts are for the whole recorded batch: a function sees batch and heads folded into one axis, so only the whole can be
counted call by call; the audit divides by the number of samples.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qat.planning.functions import EXPERTS, FUNCTIONS, first_tensor

Shape = tuple[int, ...]


def layer_macs(layer: Any, output: Shape, input: Shape = ()) -> int:
    """Elements of the output times the fan-in of each (of a transposed convolution: elements of the input times what
    each is spread over); 0 for what does not multiply.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(layer, nn.Embedding | nn.EmbeddingBag) or weight.ndim < 2:
        return 0
    spreads = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return math.prod(input if spreads else output) * math.prod(weight.shape[1:])


def function_macs(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[int]:
    """The count of each product in a call: two of attention (query with key, probabilities with value), else one."""
    result, known = first_tensor(output), FUNCTIONS.get(function)
    if function is F.bilinear and result is not None:
        return [result.numel() * args[0].shape[-1] * args[1].shape[-1]]
    operands = None if known is None else known.operands(args, kwargs)
    if known is None or operands is None or result is None:
        return [0]
    shapes = [tuple(operand.shape) for operand in operands]
    if known.kind == "attention":
        rows, keys = result.numel() // result.shape[-1], shapes[1][-2]
        return [rows * keys * shapes[0][-1], rows * keys * shapes[2][-1]]
    if known.kind == "einsum":
        return [einsum_macs(args[0], shapes)]
    if known.kind in ("linear", "matmul", EXPERTS):
        return [result.numel() * shapes[0][-1]]
    if known.kind.startswith("conv"):
        positions = shapes[0] if "transpose" in known.kind else result.shape
        return [math.prod(positions) * math.prod(shapes[1][1:])]
    return [0]


def einsum_macs(equation: str, shapes: list[Shape]) -> int:
    """Multiply-accumulates of an einsum, which contracts from left to right: each step costs the product of all indices
    that it involves.
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = [_indices(term, len(shape)) for term, shape in zip(inputs.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):  # one that is broadcast has size 1 in one of the operands
            sizes[index] = max(size, sizes.get(index, 1))
    every = [index for term in terms for index in term]
    implied = {i for i in every if every.count(i) == 1 or not i.isalpha()}
    wanted = {i for i in every if not i.isalpha() or i in output} if "->" in equation else implied
    total, left = 0, set(terms[0])
    for position, term in enumerate(terms[1:], 1):
        total += math.prod(sizes[i] for i in left | set(term))
        left = (left | set(term)) & wanted.union(*terms[position + 1 :])
    return total


def _indices(term: str, rank: int) -> list[str]:
    """The indices of an operand; those behind `...` are numbered from the right, as they broadcast."""
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return [*before, *(str(n) for n in range(count, 0, -1)), *after]
