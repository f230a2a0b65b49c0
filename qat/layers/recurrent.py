"""Recurrent layers: `LSTM`, `GRU`, `RNN` and their cells, with every matrix and every state on its own grid.

Per layer and direction there are two parts, `ih_l0` and `hh_l0` (and `hr_l0` where an LSTM projects its state), named
after the parameters they read. The state of a layer is one tensor: its next step and the layer above read it on one
grid, in both directions. Sums of gates, sigmoid and tanh and the cell state stay float, as in integer LSTMs with 16-bit
cells.

Where no state is quantized, torch's fused kernels run on the quantized weights; otherwise the twin steps through time
itself, since a state has to be rounded before the next step reads it. Weights are rounded once for all steps.

Shapes: T steps, N sequences, F features, G gates; a packed batch has its rows `[R, F]` step by step,
`sizes[t]` of them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from qat.layers.parts import BoundPart, Composite, Part, RoundedPart, Watch, part_call
from qat.layers.twin import ours
from qat.planning.recording import Call, Key

State = Any
"""A tuple: `(h,)`, or `(h, c)` of an LSTM."""
Linear = Part | RoundedPart


def lstm_step(gates: Tensor, hh: Linear, state: State, hr: Linear | None = None) -> State:
    """One step from `gates = W_ih x + b_ih`; Hochreiter & Schmidhuber 1997, with projection as of Sak et al. 2014."""
    h, c = state
    i, f, g, o = (gates + hh(h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if hr is None else hr(h)), c


def gru_step(gates: Tensor, hh: Linear, state: State) -> State:
    """One step of a gated recurrent unit (Cho et al. 2014), which carries its state on the grid, too."""
    h = hh.quantized_input(state[0])
    r_x, z_x, n_x = gates.chunk(3, -1)
    r_h, z_h, n_h = hh.linear(h).chunk(3, -1)
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (n + (z_x + z_h).sigmoid() * (h - n),)


def rnn_step(gates: Tensor, hh: Linear, state: State, nonlinearity: str = "tanh") -> State:
    """One step of an Elman network."""
    y = gates + hh(state[0])
    return (y.relu() if nonlinearity == "relu" else y.tanh(),)


class _Recurrent(Composite):
    """Base class of the three sequence layers; subclasses know one step, and the fused kernel."""

    fused: Any

    @classmethod
    def parts(cls, layer: Any) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for name in (n.removeprefix("weight_") for n in layer._flat_weights_names if n.startswith("weight_")):
            bias = f"bias_{name}" if layer.bias and not name.startswith("hr") else None
            parts[name] = BoundPart(layer, f"weight_{name}", bias)
        return parts

    @classmethod
    def calls(cls, layer: Any, name: str, watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
        input, hx = arguments(*args, **kwargs)
        tensor = input.data if isinstance(input, PackedSequence) else input
        nonnegative = getattr(layer, "nonlinearity", "") == "relu" and hx is None
        read: Key = watch.key(tensor)
        calls, states = [], [watch.fresh(nonnegative) for _ in range(layer.num_layers)]
        rows = math.prod(tensor.shape[:-1])  # all steps of all sequences
        for part_name, part in cls.parts(layer).items():
            kind, index = part_name[:2], int(part_name[4:].removesuffix("_reverse"))
            below = states[index - 1] if index else read
            key = {"ih": below, "hh": states[index]}.get(kind) or watch.fresh()
            calls.append(part_call(f"{name}.{part_name}", part, key, (rows, len(part.weight))))
        return calls

    def drop_parameter(self, name: str) -> None:
        super().drop_parameter(name)
        self._flat_weights: list[Any] = []

    def step(self, gates: Tensor, state: State, hh: Linear, hr: Linear | None) -> State:
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:
        with ours():
            return self._packed(input, hx) if isinstance(input, PackedSequence) else self._padded(input, hx)

    def _padded(self, input: Tensor, hx: Any) -> Any:
        this: Any = self
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched, swap = input.dim() == 3, this.batch_first and input.dim() == 3
        x = (input.transpose(0, 1) if swap else input) if batched else input.unsqueeze(1)
        state = self._state(x, hx if batched else _each(hx, lambda h: h.unsqueeze(1)), x.shape[1])
        y, state = self._layers(x, state, None)
        if not batched:
            return y.squeeze(1), _given(tuple(s.squeeze(1) for s in state))
        return (y.transpose(0, 1) if swap else y), _given(state)

    def _packed(self, input: PackedSequence, hx: Any) -> Any:
        this: Any = self
        x, sizes, order, back = input
        hx = None if hx is None else this.permute_hidden(hx, order)
        y, state = self._layers(x, self._state(x, hx, int(sizes[0])), sizes)
        return PackedSequence(y, sizes, order, back), this.permute_hidden(_given(state), back)

    def _state(self, x: Tensor, hx: Any, batch: int) -> State:
        """The initial state, `[layers * directions, N, features]` each."""
        this: Any = self
        count, widths = this.num_layers * (1 + this.bidirectional), [this.proj_size or this.hidden_size]
        if isinstance(self, nn.LSTM):
            widths.append(this.hidden_size)
        if hx is None:
            return tuple(x.new_zeros(count, batch, width) for width in widths)
        state = hx if isinstance(hx, tuple) else (hx,)
        for given, width in zip(state, widths, strict=True):
            this.check_hidden_size(given, (count, batch, width))
        return state

    def _layers(self, x: Tensor, state: State, sizes: Tensor | None) -> tuple[Tensor, State]:
        this: Any = self
        if (first := self._one_input_grid()) is not None:
            return self._fused(first.quantized_input(x), state, sizes)
        ends: list[State] = []
        for layer in range(this.num_layers):
            outputs = []
            for suffix in (f"l{layer}", f"l{layer}_reverse")[: 1 + this.bidirectional]:
                start = tuple(s[len(ends)] for s in state)
                output, end = self._sweep(self.part(f"ih_{suffix}")(x), start, sizes, suffix)
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, -1) if this.bidirectional else outputs[0]
            if layer < this.num_layers - 1:
                x = F.dropout(x, this.dropout, this.training)
        return x, tuple(torch.stack(s) for s in zip(*ends, strict=True))

    def _sweep(self, gates: Tensor, state: State, sizes: Tensor | None, suffix: str) -> tuple[Tensor, State]:
        """One direction of one layer: all outputs, and the last state."""
        steps = gates.unbind(0) if sizes is None else gates.split(sizes.tolist())
        direction = -1 if suffix.endswith("_reverse") else 1
        # Once for all steps: neither weights nor their grids change meanwhile.
        hh, hr = self.part(f"hh_{suffix}").rounded(), self._modules.get(f"hr_{suffix}")
        hr = hr.rounded() if isinstance(hr, Part) else None
        outputs = []
        for step in steps[::direction]:
            # Sequences come longest first; those that are over, or not begun yet from their end, keep their state.
            new = self.step(step, state if sizes is None else tuple(s[: len(step)] for s in state), hh, hr)
            outputs.append(new[0])
            state = new if sizes is None else tuple(
                torch.cat([n, s[len(n) :]]) for n, s in zip(new, state, strict=True)
            )  # fmt: skip
        return (torch.stack if sizes is None else torch.cat)(outputs[::direction]), state

    def _one_input_grid(self) -> Part | None:
        """The first part, if its input is all that is quantized besides weights (or nothing is)."""
        grids = {name: part.input_quantizer for name, part in self._named_parts()}
        first = [grid for name, grid in grids.items() if name in ("ih_l0", "ih_l0_reverse")]
        states = [grid for name, grid in grids.items() if name not in ("ih_l0", "ih_l0_reverse")]
        plain = all(grid is None for grid in states) and all(grid is first[0] for grid in first)
        return self.part("ih_l0") if plain else None

    def _named_parts(self) -> list[tuple[str, Part]]:
        return [(n, m) for n, m in self._modules.items() if isinstance(m, Part)]

    def _fused(self, x: Tensor, state: State, sizes: Tensor | None) -> tuple[Tensor, State]:
        this: Any = self
        flat = []
        for layer in range(this.num_layers):
            for suffix in (f"l{layer}", f"l{layer}_reverse")[: 1 + this.bidirectional]:
                ih, hh = self.part(f"ih_{suffix}"), self.part(f"hh_{suffix}")
                flat += [ih.quantized_weight(), hh.quantized_weight()]
                if this.bias:
                    flat += [ih.quantized_bias(), hh.quantized_bias()]
                flat += [self.part(f"hr_{suffix}").quantized_weight()] if this.proj_size else []
        states = list(state) if len(state) > 1 else state[0]
        options = this.bias, this.num_layers, float(this.dropout), this.training, this.bidirectional
        kernel = self._kernel()
        arguments = (x, states, flat, *options, False) if sizes is None else (x, sizes, states, flat, *options)
        y, *ends = kernel(*arguments)
        return y, tuple(ends)

    def _kernel(self) -> Any:
        return type(self).fused


def arguments(input: Any, hx: Any = None) -> tuple[Any, Any]:
    """The arguments of a call, however it names them."""
    return input, hx


def _each(hx: Any, function: Any) -> Any:
    return tuple(function(h) for h in hx) if isinstance(hx, tuple) else hx if hx is None else function(hx)


def _given(state: State) -> Any:
    """As torch returns states: a pair for an LSTM, a tensor for the others."""
    return state if len(state) > 1 else state[0]


class QuantLSTM(_Recurrent):
    serves = nn.LSTM
    fused = staticmethod(_VF.lstm)

    def step(self, gates: Tensor, state: State, hh: Linear, hr: Linear | None) -> State:
        return lstm_step(gates, hh, state, hr)


class QuantGRU(_Recurrent):
    serves = nn.GRU
    fused = staticmethod(_VF.gru)

    def step(self, gates: Tensor, state: State, hh: Linear, hr: Linear | None) -> State:
        return gru_step(gates, hh, state)


class QuantRNN(_Recurrent):
    serves = nn.RNN
    nonlinearity: str

    def step(self, gates: Tensor, state: State, hh: Linear, hr: Linear | None) -> State:
        return rnn_step(gates, hh, state, self.nonlinearity)

    def _kernel(self) -> Any:
        return _VF.rnn_relu if self.nonlinearity == "relu" else _VF.rnn_tanh
