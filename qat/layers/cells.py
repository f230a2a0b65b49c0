"""Recurrent cells: one step of `qat.layers.recurrent`, with the loop in the user's hands.

A cell has two parts, `ih` and `hh`. Called several times in one forward, it keeps one grid for its input and one for
its state.
"""

from typing import Any

from torch import Tensor, nn

from qat.layers.parts import BoundPart, Composite, Part, Watch, part_call
from qat.layers.recurrent import State, arguments, gru_step, lstm_step, rnn_step
from qat.layers.twin import ours
from qat.planning.recording import Call


class _Cell(Composite):
    hidden_size: int

    @classmethod
    def parts(cls, layer: Any) -> dict[str, Part]:
        return {n: BoundPart(layer, f"weight_{n}", f"bias_{n}" if layer.bias else None) for n in ("ih", "hh")}

    @classmethod
    def calls(cls, layer: Any, name: str, watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
        input, hx = arguments(*args, **kwargs)
        h = hx[0] if isinstance(hx, tuple) else hx
        keys = watch.key(input), watch.fresh() if h is None else watch.key(h)
        batch = len(input) if input.dim() == 2 else 1
        return [
            part_call(f"{name}.{part_name}", part, key, (batch, len(part.weight)))
            for key, (part_name, part) in zip(keys, cls.parts(layer).items(), strict=True)
        ]

    def step(self, gates: Tensor, state: State) -> State:
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        with ours():
            count = 2 if isinstance(self, nn.LSTMCell) else 1
            if hx is None:
                hx = tuple(input.new_zeros(*input.shape[:-1], self.hidden_size) for _ in range(count))
            state = self.step(self.part("ih")(input), hx if isinstance(hx, tuple) else (hx,))
            return state if count > 1 else state[0]


class QuantLSTMCell(_Cell):
    serves = nn.LSTMCell

    def step(self, gates: Tensor, state: State) -> State:
        return lstm_step(gates, self.part("hh"), state)


class QuantGRUCell(_Cell):
    serves = nn.GRUCell

    def step(self, gates: Tensor, state: State) -> State:
        return gru_step(gates, self.part("hh"), state)


class QuantRNNCell(_Cell):
    serves = nn.RNNCell
    nonlinearity: str

    def step(self, gates: Tensor, state: State) -> State:
        return rnn_step(gates, self.part("hh"), state, self.nonlinearity)
