"""`model.tflite`: the integer model for LiteRT (TensorFlow Lite), written straight from its integers.

LiteRT's own converter (litert-torch) is not used: it wants float weights, which it quantizes again, keeps the weight of
a layer that no grid follows as floats, and needs 700 MB of packages whose requirements exclude those of ours. The
schema of the file comes with the runtime.

An int8 operation needs its result on a grid, so a layer that none follows (as a rule the last) is computed in float
from its codes. With optimizations, XNNPACK computes what it can and rounds as training does; without, LiteRT's own
kernels do, which round twice: to a few bits more than the code has, and then to the code. Where the first rounding
makes a tie, the second goes up (5 of 8,192 codes of a layer; on a grid of 4 bits each is worth 17 steps of 8 bits).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from qat.errors import UserError, first_line
from qat.export.int8_program import int8_program, int8_refusal
from qat.export.litert.builder import CHANNELS_FIRST, serialize
from qat.export.litert.file import TfliteFile
from qat.export.litert.lower import Lowering
from qat.export.litert.ops import HANDLERS
from qat.export.target import Target, unrunnable
from qat.export.verify import Verdict, count_kernels
from qat.planning.plan import Plan


class LiteRtRunner:
    """A loaded `.tflite` file.

    Args:
        path: The file.
        optimize: With XNNPACK's kernels, or LiteRT's own.
        threads: Threads; 0 lets LiteRT choose.

    Raises:
        UserError: if LiteRT refuses it.
    """

    def __init__(self, path: Path, *, optimize: bool = True, threads: int = 0) -> None:
        self.path, self.optimize, self.threads = path, optimize, threads
        self._interpreter = self._open(path.read_bytes(), optimize)

    def _open(self, content: bytes, optimize: bool) -> Any:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType  # pyright: ignore[reportMissingImports]

        kernels = OpResolverType.BUILTIN if optimize else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            return Interpreter(
                model_content=content, num_threads=self.threads or None, experimental_op_resolver_type=kernels
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: litert refuses it: {first_line(error)}") from None

    def _run(self, interpreter: Any, x: np.ndarray) -> None:
        [entry] = interpreter.get_input_details()
        try:
            interpreter.resize_tensor_input(entry["index"], x.shape, strict=True)
            interpreter.allocate_tensors()
            interpreter.set_tensor(entry["index"], x)
            interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise unrunnable(self.path, x, first_line(error)) from None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Runs one batch.

        Raises:
            UserError: if the file does not take such a batch.
        """
        self._run(self._interpreter, x)
        return self._interpreter.get_tensor(self._interpreter.get_output_details()[0]["index"])

    def layer_outputs(self, x: np.ndarray, only: str | None = None) -> dict[str, np.ndarray]:
        file = TfliteFile(self.path)
        operators = {name: each for name, each in file.operators().items() if only in (None, name)}
        shown = {name: file.expose(operator) for name, operator in operators.items()}
        own = [index for index in shown.values() if index not in file.graph.outputs]
        file.graph.outputs = [*file.graph.outputs, *own]
        # A layer whose output is seen is computed in float; for what lies between them all, the more exact kernels.
        interpreter = self._open(serialize(file.model), self.optimize or only is None)
        self._run(interpreter, x)
        values = {name: interpreter.get_tensor(index) for name, index in shown.items()}
        return {name: v.transpose(CHANNELS_FIRST) if v.ndim == 4 else v for name, v in values.items()}

    def float_layers(self) -> list[str] | None:
        file = TfliteFile(self.path)
        return [name for name, operator in file.operators().items() if not file.is_integer(operator)]


@dataclass(frozen=True)
class LiteRtTarget(Target):
    """A file for LiteRT's interpreter.

    Attributes:
        int4: Whether weights of up to 4 bits take 4 bits. XNNPACK has no such convolution, and leaves them to LiteRT's
            own kernels.
    """

    int4: bool = False
    runner = LiteRtRunner
    file = "model.tflite"
    package = "ai_edge_litert"
    extra = "litert"
    optimizes = True

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        if plan.round_bias == "never":
            return "its biases are float, and LiteRT's int8 kernels add int32 ones; train with quant.round_bias=eval"
        return int8_refusal(plan, "LiteRT")

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        program = int8_program(model, example, float_bias=False)
        (folder / self.file).write_bytes(Lowering(program, model, HANDLERS, self.int4).run())

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        return TfliteFile(path).codes()

    def check_kernels(self, verdict: Verdict, converted: nn.Module, runner: LiteRtRunner) -> None:
        file = TfliteFile(runner.path)
        count_kernels(verdict, converted, file.integer_nodes(), without=file.unfollowed(), what="products in int8")
