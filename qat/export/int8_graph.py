"""The graph of an int8 program (`qat.export.int8_program`): the operations that it is written in, the passes that make
one quantization of a tensor of many, and what back ends read off it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import fx
from torch.export import ExportedProgram

OPS: Any = torch.ops.quantized_decomposed
ATEN: Any = torch.ops.aten
QUANTIZE, DEQUANTIZE = OPS.quantize_per_tensor.default, OPS.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = OPS.dequantize_per_channel.default
CONVOLUTIONS = (ATEN.conv1d.default, ATEN.conv2d.default)
PRODUCTS = (*CONVOLUTIONS, ATEN.linear.default, ATEN.matmul.default, ATEN.bmm.default)
IDENTITIES = ATEN.dropout.default, ATEN.contiguous.default, ATEN.clone.default, ATEN.alias.default
CLIPS = {ATEN.relu.default: (0.0, math.inf), ATEN.relu6.default: (0.0, 6.0), ATEN.hardtanh.default: (-1.0, 1.0)}
"""Clips, and their limits where a node names no others."""
MOVES = (
    *(ATEN.max_pool1d.default, ATEN.max_pool2d.default, ATEN.flatten.using_ints, ATEN.view.default),
    *(ATEN.reshape.default, ATEN.permute.default, ATEN.transpose.int, ATEN.squeeze.dim, ATEN.unsqueeze.default),
    *(ATEN.slice.Tensor, ATEN.pad.default, ATEN.constant_pad_nd.default),
)
"""Operations that pick values, or add zeros, which every grid of an activation has: they commute with quantization."""


def settle(graph: fx.Graph) -> None:
    """Leaves each tensor quantized once per grid, right behind the layer that computes it."""
    _drop_identities(graph)
    _merge(graph)
    while _quantize_early(graph):
        _merge(graph)


def _drop_identities(graph: fx.Graph) -> None:
    """Takes out what changes nothing in evaluation, so that a layer's reader is next to it."""
    for target in IDENTITIES:
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _quantize_early(graph: fx.Graph) -> bool:
    """Quantizes (and clips) in front of what only moves values, so that the layer before it sees its grid; returns
    whether there was anything to do."""
    moved = False
    for quantize in reversed(graph.find_nodes(op="call_function", target=QUANTIZE)):
        clips, move, grid = [], quantize.args[0], quantize.args[1:]
        while move.target in CLIPS and len(move.users) == 1:
            clips.insert(0, move)
            move = move.args[0]
        if not _moves(move) or len(move.users) > 1 or move.args[0].target is DEQUANTIZE:
            continue
        source: Any = move.args[0]
        at, moved = source, True
        with graph.inserting_before(move):
            for target, rest in [*((c.target, c.args[1:]) for c in clips), (QUANTIZE, grid), (DEQUANTIZE, grid)]:
                at = graph.call_function(target, (at, *rest))
                at.meta["val"] = source.meta["val"].to(grid[-1]) if target is QUANTIZE else source.meta["val"]
        move.args, quantize.args = (at, *move.args[1:]), (move, *grid)
    graph.eliminate_dead_code()
    return moved


def _moves(node: fx.Node) -> bool:
    """Whether an operation picks values or adds zeros."""
    padding = node.target in (ATEN.pad.default, ATEN.constant_pad_nd.default)
    return node.target in MOVES and not (padding and any(each not in ("constant", None, 0) for each in node.args[2:]))


def _merge(graph: fx.Graph) -> None:
    """Quantizes a tensor once per grid, and makes one clip of a narrow grid's and the model's own in front of it:
    runtimes look for one behind a product."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (QUANTIZE, ATEN.hardtanh.default):
            continue
        if node.target is ATEN.hardtanh.default:
            _clip_once(node)
        key = node.target, node.args
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            continue
        seen[key] = node
    graph.eliminate_dead_code()


def _clip_once(clip: fx.Node) -> None:
    """Gives a clip the limits of the one that it reads, too; not where nothing, or one number, lies within both."""
    source: Any = clip.args[0]
    if source.target not in CLIPS:
        return
    (low, high), (least, most) = limits_of(clip), limits_of(source)
    if max(low, least) < min(high, most):
        clip.args = source.args[0], max(low, least), min(high, most)


def limits_of(clip: fx.Node) -> tuple[float, float]:
    """The limits of one of `CLIPS`."""
    given: Any = clip.args[1:]
    low, high = (*given, *CLIPS[clip.target][len(given) :])
    return low, high


def float_products(program: ExportedProgram, kinds: Sequence[Any] | None = None) -> list[str]:
    """The layers whose integer product has no grid behind it, by name: int8 kernels return int8 alone.

    Args:
        program: See `int8_program`.
        kinds: Only products of constant codes of these kinds; all of them, if `None`.
    """
    return [
        name
        for node in program.graph.nodes
        if node.target in (kinds or PRODUCTS) and (name := layer_of(node)) is not None and not _becomes_codes(node)
        if all(_from_codes(operand) for operand in node.args[(0 if kinds is None else 1) : 2])
    ]


def layer_of(node: fx.Node) -> str | None:
    """The module that a node's operation belongs to; of one that torch added, that of a node beside it."""
    for near in (node, *node.users, *node.all_input_nodes):
        paths = [path for path, _ in (near.meta.get("nn_module_stack") or {}).values() if path.startswith("model")]
        if paths:
            return paths[-1].removeprefix("model.")
    return None


def _from_codes(node: Any) -> bool:
    while node.target in MOVES or node.target in IDENTITIES:
        node = node.args[0]
    return node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS)


def _becomes_codes(node: fx.Node) -> bool:
    if len(node.users) != 1:
        return False
    (reader,) = node.users
    if reader.target in CLIPS:
        return _becomes_codes(reader)
    return reader.target is QUANTIZE
