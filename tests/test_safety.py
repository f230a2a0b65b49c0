"""No file can run code: pickles are refused or read weights-only, wherever a file is opened."""

import ast
import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import POLICY, Drawn, Shape, lived, quantized

from qat.convert import convert
from qat.errors import UserError
from qat.export.torch.pt2 import PICKLED
from qat.export.torch.target import ProgramRunner, TorchTarget
from qat.files import atomic
from qat.lightning.weights import read_checkpoint

torch.set_num_threads(1)

QAT = Path(__file__).parents[1] / "qat"


def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call in the package: file, name of the function as written, and the call."""
    found = []
    for path in sorted(QAT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((path.relative_to(QAT).as_posix(), ast.unparse(node.func), node))
    return found


def test_every_load_of_the_package_is_weights_only():
    loads = [(f, n, c) for f, n, c in calls() if n.endswith(("torch.load", ".load_from_checkpoint", "trainer.fit"))]
    assert {name for _, name, _ in loads} >= {"torch.load", "trainer.fit"}
    for file, name, call in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True" or ("ckpt_path" not in given and name.endswith("fit")), (file, name)


def test_nothing_else_in_the_package_unpickles():
    forbidden = {
        "pickle.load",
        "pickle.loads",
        "joblib.load",
        "dill.load",
        "cloudpickle.load",
        "yaml.load",
        "marshal.loads",
    }
    assert not [(file, name) for file, name, _ in calls() if name in forbidden]
    assert [file for file, name, _ in calls() if name == "torch.export.load"] == ["export/torch/pt2.py"]
    pickled = [(f, n) for f, n, c in calls() if any(k.arg == "allow_pickle" for k in c.keywords)]
    assert not pickled


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.mkdir, (str(self.mark), 0o700)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    model = lived(Drawn(Shape(kind="linear")))
    plan = quantized(model, model.example(8), POLICY)
    TorchTarget().export(convert(model, plan), plan, model.example(4), path)
    return path


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes]) -> Path:
    """A copy of an archive, member by member."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return target


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def opaque(bomb: Bomb) -> tuple[Callable[[str, bytes], bytes], dict[str, bytes]]:
    """An object among the constants."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("constants_config.json"):
            return content
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        return json.dumps({"config": {"bomb": entry}}).encode()

    return change, {"data/constants/opaque_obj_0": pickle.dumps(bomb)}


def inputs(bomb: Bomb) -> tuple[Callable[[str, bytes], bytes], dict[str, bytes]]:
    """In the place of the sample inputs."""
    return lambda name, content: saved((bomb,)) if "sample_inputs" in name else content, {}


def weights(bomb: Bomb) -> tuple[Callable[[str, bytes], bytes], dict[str, bytes]]:
    """A weight that is to be unpickled."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return content
        config = json.loads(content)
        for entry in config["config"].values():
            entry |= {"path_name": "weight_bomb", "use_pickle": True}
        return json.dumps(config).encode()

    return change, {"data/weights/weight_bomb": saved(bomb)}


@pytest.mark.parametrize("hide", [pytest.param(f, id=f.__name__) for f in (opaque, inputs, weights)])
def test_a_program_with_a_pickle_in_it_is_refused_unopened(hide, program, tmp_path):
    mark = tmp_path / "ran"
    path = rewritten(program, tmp_path / "model.pt2", *hide(Bomb(mark)))
    with pytest.raises(UserError) as caught:
        ProgramRunner(path)
    assert not mark.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("hide", [pytest.param(f, id=f.__name__) for f in (opaque, inputs, weights)])
def test_torch_itself_would_have_run_it(hide, program, tmp_path):
    """Or the test above shows nothing."""
    if hide is opaque and "opaque_obj_" not in PICKLED:
        pytest.skip("torch reads no such objects before version 2.13")
    mark = tmp_path / "ran"
    path = rewritten(program, tmp_path / "model.pt2", *hide(Bomb(mark)))
    with contextlib.suppress(Exception):
        torch.export.load(str(path))
    assert mark.exists()


def test_a_program_does_not_say_where_on_a_machine_it_was_written(program):
    assert str(QAT).encode() not in program.read_bytes() and b"stack_trace" not in program.read_bytes()


def test_an_archive_that_was_only_rewritten_is_loaded(program, tmp_path):
    path = rewritten(program, tmp_path / "model.pt2", lambda name, content: content, {})
    assert ProgramRunner(path)(torch.zeros(2, 12).numpy()).shape == (2, 5)


def test_a_checkpoint_with_a_pickle_in_it_is_refused_unopened(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"state_dict": {}, "bomb": Bomb(mark)}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="loading them could run any code"):
        read_checkpoint(tmp_path / "model.ckpt")
    assert not mark.exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk is full"), atomic(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
