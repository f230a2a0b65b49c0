"""Writing a `torch.export` program without traces of the machine, and reading one without unpickling anything that
could run code.

A `.pt2` file is a zip of JSON and tensors, but its format also has room for pickled objects, which `torch.export.load`
unpickles unasked: objects among the constants, and weights or sample inputs that the weights-only reader refuses. None
of them is in a file of ours, so they are refused, and the weights-only reader is the only one.
"""

import zipfile
from pathlib import Path, PurePosixPath

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import constants

from qat.errors import UserError, first_line
from qat.process import environment

PICKLED = tuple(value for name, value in vars(constants).items() if name.endswith("_OBJ_FILENAME_PREFIX"))
"""How the names of pickled objects in the archive begin; newer versions of torch know more kinds of them."""
SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable with which `torch.load` is weights-only whatever its caller says."""


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes a `.pt2` file; `program` loses what says nothing to a runtime: the lines of source code, with their paths,
    that its nodes came from, which are a quarter of a small model's file, and the values of its example inputs, which
    are training data, and which torch would store with all of the batch that they are part of."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        for key in ("stack_trace", "torch_fn"):
            node.meta.pop(key, None)
    assert program.example_inputs is not None
    inputs, keywords = program.example_inputs
    program.example_inputs = tuple(torch.zeros_like(x) for x in inputs), keywords
    torch.export.save(program, path)


def load_program(path: Path) -> ExportedProgram:
    """Loads a `.pt2` file.

    Raises:
        UserError: if it holds pickled objects, or torch refuses it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise UserError(f"{path}: is damaged or no program of torch.export") from None
    if pickled := next((name for name in names if PurePosixPath(name).name.startswith(PICKLED)), None):
        raise UserError(f"{path}: holds a pickled object ({pickled}), and loading it could run any code")
    try:
        with environment(SWITCH, "1"):
            return torch.export.load(str(path))
    except Exception as error:  # whatever its readers stumble over
        raise UserError(f"{path}: torch refuses it: {first_line(error)}") from None
