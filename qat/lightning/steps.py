"""Running a LightningModule's own step on training batches, without leaving a trace.

The user's `validation_step` (or `training_step`) knows how to call the model, whatever its batches look like; nothing
has to be told to us.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins.precision import DoublePrecision, HalfPrecision, Precision
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from torchmetrics import Metric

from qat.errors import UserError
from qat.lightning.compiled import eagerly
from qat.lightning.manual import dry_run
from qat.modes import evaluating
from qat.quantizers import Quantizer, learned_by

CALIBRATION_SEED = 0
WITHOUT_TRAINER: dict[torch.dtype, Callable[[], Precision]] = {
    torch.float64: DoublePrecision,
    torch.float16: partial(HalfPrecision, "16-true"),
    torch.bfloat16: partial(HalfPrecision, "bf16-true"),
}


def step_of(module: pl.LightningModule, first: str = "validation_step") -> Callable[[Any], Any]:
    """The module's own step, as a function of a batch: `first` if it has that, or else another."""
    by_hand = not module.automatic_optimization
    last_two = ("test_step", "training_step") if by_hand else ("training_step", "test_step")
    name = next((n for n in (first, "validation_step", *last_two) if is_overridden(n, module)), None)
    if name is None:
        return lambda batch: module(batch)
    method = getattr(module, name)
    positional = [
        p
        for p in inspect.signature(method).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    # batch_idx, dataloader_idx, under whatever name
    indices = [0] * sum(p.default is p.empty for p in positional[1:])
    if name == "training_step" and by_hand:
        return lambda batch: dry_run(module, lambda: method(batch, *indices))
    return lambda batch: method(batch, *indices)


@contextmanager
def no_trace(module: pl.LightningModule, moving: Collection[nn.Module] = ()) -> Iterator[None]:
    """Steps that run inside log nothing and leave buffers (but those of quantizers, and new ones), lists and random
    numbers as they were, and metrics empty; numbers and other objects among the module's attributes are not looked at.

    Args:
        module: Whose steps they are.
        moving: Modules whose buffers are to stay as the steps leave them.
    """
    trainer = module._trainer
    loggers = [] if trainer is None else trainer.loggers
    lists = [(values, list(values)) for values in module.__dict__.values() if type(values) is list]
    module.__dict__["log"] = lambda *args, **kwargs: None
    if trainer is not None and loggers:
        trainer.loggers = [DummyLogger()]
    _reset_metrics(module)  # what an evaluation by the trainer left was made in inference mode: nobody may write to it
    try:
        with _same_buffers(module, moving), evaluating(module), isolate_rng(), torch.no_grad():
            torch.manual_seed(CALIBRATION_SEED)
            yield
    finally:
        del module.__dict__["log"]
        if trainer is not None and loggers:
            trainer.loggers = loggers
        for values, before in lists:  # many steps collect their outputs for the epoch's end
            values[:] = before
        _reset_metrics(module)


def _reset_metrics(module: nn.Module) -> None:
    with torch.inference_mode(False):
        for child in module.modules():
            if isinstance(child, Metric):
                child.reset()


@contextmanager
def _same_buffers(module: nn.Module, moving: Collection[nn.Module]) -> Iterator[None]:
    """Afterwards every buffer that a step has written to has the values that it had. One that it has put another tensor
    in place of stays new: a cache, of whose size the module has kept a number beside it.
    """
    left = {id(m) for m in moving}  # by id: metrics compare as what they will compute
    holders = [m for m in module.modules() if not isinstance(m, Quantizer) and id(m) not in left]
    kept = [(m._buffers, name, buffer, _values(buffer)) for m in holders for name, buffer in m._buffers.items()]
    try:
        yield
    finally:
        for buffers, name, buffer, values in kept:
            if buffer is None or values is None or buffers.get(name) is not buffer:
                continue
            if not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)


def _values(buffer: Tensor | None) -> Tensor | None:
    """A copy, of a tensor that has values and can be compared."""
    if buffer is None or is_lazy(buffer) or buffer.is_meta or buffer.layout is not torch.strided:
        return None
    return buffer.detach().clone()


@contextmanager
def at_home(module: pl.LightningModule) -> Iterator[None]:
    """While it lasts, `module.device` says where its parameters are: from `setup` on, Lightning names the device that
    the module will be moved to, and puts new tensors there while a model configures itself.
    """
    home = next((p.device for p in module.parameters() if p.device.type != "meta"), module.device)
    lightning: list[Any] = [m for m in module.modules() if isinstance(m, pl.LightningModule)]
    before = [m._device for m in lightning]
    default = torch.get_default_device()
    try:
        for child in lightning:
            child._device = home
        with nullcontext() if default in (home, torch.device("cpu")) else home:
            yield
    finally:
        for child, device in zip(lightning, before, strict=True):
            child._device = device


Source = Callable[[], Any]
"""Makes a fresh training dataloader (or a collection of them)."""


def trainer_source(trainer: pl.Trainer) -> Source:
    """The trainer's own training data.

    Raises:
        UserError: (when called) if it was given none.
    """

    def source() -> Any:
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None and trainer.state.fn != "fit":
            datamodule.setup("fit")
        if not trainer.fit_loop._data_source.is_defined():
            raise UserError(
                "no training data to calibrate on: pass a datamodule, call trainer.fit first, "
                "or start from a checkpoint that is quantized already"
            )
        return trainer.fit_loop._data_source.dataloader()

    return source


def attach(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Gives the trainer what `trainer_source` looks for, as `trainer.fit(module, data)` does."""
    trainer.state.fn = TrainerFn.FITTING
    trainer._data_connector.attach_datamodule(module, data)


def batches(source: Source, samples: int) -> Iterator[Any]:
    """Training batches until `samples` samples have come; the same ones in every process."""
    loader = source()
    if not isinstance(loader, DataLoader):
        loader = (item[0] for item in iter(CombinedLoader(loader, "min_size")))
    seen = 0
    for batch in loader:
        yield batch
        seen += batch_size(batch)
        if seen >= samples:
            return
    if not seen:
        raise UserError("there is no training batch to look at: the train_dataloader is empty")


def batch_size(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except Exception:  # what counts as a batch is the user's; one batch then counts as one sample
        return 1


def run_steps(module: pl.LightningModule, source: Source, samples: int, title: str | None = None) -> Callable[[], Any]:
    """A function that runs the step on training batches of `samples` samples, with a progress bar under `title`."""

    def run() -> None:
        step = step_of(module)
        with no_trace(module), precision(module), eagerly(), at_home(module):
            for batch in track(
                batches(source, samples), description=title or "", transient=True, disable=title is None
            ):
                step(to_module(module, batch))

    return run


class _Unconverted(Precision):
    """Stands in for a precision that converts the module and its input, while the module has another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def convert_input(self, data: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(self.dtype) if x.is_floating_point() else x, data)


def precision_plugin(module: pl.LightningModule) -> Precision:
    """The trainer's precision, once the module has been converted to it (probing comes before); that of its own
    parameters where there is no trainer, as of a copy.
    """
    if module._trainer is None:
        own = _type_of(module, torch.float32)
        return WITHOUT_TRAINER.get(own, Precision)()
    plugin = module._trainer.precision_plugin
    with plugin.forward_context():
        prescribed = torch.get_default_dtype()
    now = _type_of(module, prescribed)
    if now == prescribed:
        return plugin
    converts = plugin.convert_input(torch.empty(0, dtype=now)).dtype == prescribed
    return _Unconverted(now) if converts else Precision()


def _type_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The type of the module's floating-point parameters; quantizers' stay in float32 whatever becomes of others."""
    own = learned_by(module)
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and id(p) not in own), otherwise)


def precision(module: pl.LightningModule) -> AbstractContextManager[Any]:
    """The arithmetic that the trainer prescribes (autocast, say)."""
    return precision_plugin(module).forward_context()


def to_module(module: pl.LightningModule, batch: Any) -> Any:
    """The batch as the trainer would hand it to a step: in its precision, on the module's device, by way of the hooks
    that Lightning lets change a batch.
    """
    batch = module._on_before_batch_transfer(precision_plugin(module).convert_input(batch))
    return module._apply_batch_transfer_handler(batch, device=module.device)


def example_input(module: pl.LightningModule, source: Source) -> Tensor:
    """The input that the module's forward is given in its own step: one tensor of at least two samples.

    Raises:
        UserError: if the step never calls the module's forward, or with anything but one tensor.
    """
    seen: list[tuple[Any, ...]] = []
    with (
        module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True),
        torch.random.fork_rng(devices=[]),
    ):
        run_steps(module, source, samples=2)()
    if not seen:
        raise UserError(f"{type(module).__name__}: its step never calls self(x), so there is no input to export with")
    args, kwargs = seen[0]
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        raise UserError(
            f"{type(module).__name__}: export needs a forward of one tensor, "
            f"its step passes {len(args)} arguments and {list(kwargs)}; export=packed and export=none take any"
        )
    x = args[0].detach().cpu()
    return x if len(x) > 1 else x.repeat(2, *[1] * (x.ndim - 1))


@contextmanager
def described_input(module: pl.LightningModule) -> Iterator[list[dict[str, Any]]]:
    """Collects the shape of one sample and the type of every tensor that the module's forward is given meanwhile."""
    found: list[dict[str, Any]] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim:
            found.append({"shape": list(args[0].shape[1:]), "dtype": str(args[0].dtype).removeprefix("torch.")})

    with module.register_forward_pre_hook(look, with_kwargs=True):
        yield found
