"""`instantiate` reports every mistake of a config node under the key the user wrote, before the target is called."""

import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional, Union

import pytest
from omegaconf import OmegaConf

from qat.annotations import accepts
from qat.cli import main
from qat.config.instantiate import allowed_patterns, instantiate, locate
from qat.config.typecheck import check_type
from qat.errors import UserError

CALLS: list[str] = []


class Layer:
    def __init__(
        self,
        bits: int,
        rate: float = 0.1,
        mode: Literal["sum", "mean"] = "sum",
        name: str | None = None,
        sizes: "Sequence[int]" = (1,),
        frozen: bool = False,
        inner: object = None,
    ) -> None:
        CALLS.append("Layer")
        self.given = {"bits": bits, "rate": rate, "mode": mode, "name": name, "sizes": sizes, "frozen": frozen}
        self.inner = inner


class Keyed:
    def __init__(self, bits: int) -> None:
        raise UserError(f"quant.bits={bits}: expected fewer")


class Open:
    def __init__(self, **kwargs: object) -> None:
        self.kwargs = kwargs


class Strict:
    def __init__(self, bits: int) -> None:
        if bits > 16:
            raise UserError(f"bits={bits} is more than 16")
        raise ZeroDivisionError("a bug")


@dataclass(frozen=True)
class Spec:
    bits: int
    scale: "float | None" = None


def add(a: int, b: int = 2) -> int:
    return a + b


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """A package of the user's, trusted through QAT_TARGETS."""
    module = types.ModuleType("own_parts")
    for thing in (Layer, Keyed, Open, Strict, Spec, add):
        setattr(module, thing.__name__, thing)
        monkeypatch.setattr(thing, "__module__", "own_parts")
    vars(module).update(Optional=Optional, Literal=Literal, Sequence=Sequence)
    monkeypatch.setitem(sys.modules, "own_parts", module)
    monkeypatch.setenv("QAT_TARGETS", "own_parts, another")
    CALLS.clear()


def _node(target: str, **keys: object) -> dict[str, object]:
    return {"_target_": f"own_parts.{target}", **keys}


def test_a_node_becomes_its_object_with_plain_containers():
    layer = instantiate(OmegaConf.create(_node("Layer", bits=4, rate=1, sizes=[1, 2], mode="mean")))
    assert layer.given == {"bits": 4, "rate": 1, "mode": "mean", "name": None, "sizes": [1, 2], "frozen": False}
    assert type(layer.given["sizes"]) is list


def test_nested_nodes_and_lists_are_built_too():
    outer = instantiate(_node("Layer", bits=2, inner=_node("Open", a=[_node("Spec", bits=3)])))
    assert outer.inner.kwargs == {"a": [Spec(3)]}


def test_arguments_from_code_take_precedence_and_count_as_given():
    assert instantiate(_node("add", b=1), a=4, b=3) == 7


def test_a_partial_may_lack_arguments():
    assert instantiate(_node("add", b=5, _partial_=True))(1) == 6


def test_positional_arguments_count_as_given():
    assert instantiate(_node("add", _args_=[1])) == 3


def test_a_node_without_a_target_is_a_plain_container():
    assert instantiate(OmegaConf.create({"a": [1, {"b": 2}]})) == {"a": [1, {"b": 2}]}


def test_a_null_node_is_none():
    assert instantiate(OmegaConf.create({"logger": None})) == {"logger": None}


@pytest.mark.parametrize(
    ("node", "said"),
    [
        pytest.param(
            _node("Layer", bits=2, rat=1), "model.net.rat: Layer has no parameter 'rat'; did you mean 'rate'?", id="key"
        ),
        pytest.param(_node("Layer"), "model.net.bits: missing; Layer cannot do without 'bits'", id="missing"),
        pytest.param(_node("Layer", bits="???"), "model.net.bits: needs a value", id="mandatory"),
        pytest.param(_node("Layer", bits="4"), "model.net.bits='4': Layer wants int", id="str-for-int"),
        pytest.param(_node("Layer", bits=True), "model.net.bits=True: Layer wants int", id="bool-for-int"),
        pytest.param(_node("Layer", bits=4.0), "model.net.bits=4.0: Layer wants int", id="float-for-int"),
        pytest.param(_node("Layer", bits=4, frozen=1), "model.net.frozen=1: Layer wants bool", id="int-for-bool"),
        pytest.param(
            _node("Layer", bits=4, name=3), "model.net.name=3: Layer wants str or None", id="int-for-optional-str"
        ),
        pytest.param(_node("Layer", bits=4, rate=None), "model.net.rate=None: Layer wants float", id="none-for-float"),
        pytest.param(
            _node("Layer", bits=4, mode="meen"),
            "model.net.mode='meen': Layer wants 'sum' or 'mean'; did you mean 'mean'?",
            id="literal",
        ),
        pytest.param(
            _node("Layer", bits=4, sizes=[1, "2"]), "model.net.sizes=[1, '2']: Layer wants Sequence[int]", id="items"
        ),
        pytest.param(
            _node("Spec", bits=4, scale="x"), "model.net.scale='x': Spec wants float or None", id="string-annotation"
        ),
        pytest.param(_node("add", a=1, c=2), "model.net.c: add has no parameter 'c'", id="function"),
        pytest.param(
            _node("Layer", bits=4, inner=_node("Layer", bits="x")),
            "model.net.inner.bits='x': Layer wants int",
            id="nested",
        ),
        pytest.param(
            _node("Open", a=[1, _node("Layer", bits="x")]),
            "model.net.a[1].bits='x': Layer wants int",
            id="nested-in-a-list",
        ),
        pytest.param(_node("Layr", bits=4), "no 'Layr' in own_parts; did you mean 'Layer'?", id="class-name"),
        pytest.param({"_target_": "another.Thing"}, "there is no package 'another'", id="missing-package"),
        pytest.param({"_target_": "os.system", "command": "true"}, "set QAT_TARGETS=os", id="package-not-allowed"),
        pytest.param(
            {"_target_": "own_parts.Literal"}, "'own_parts.Literal' is not a class or function of", id="smuggled"
        ),
        pytest.param(
            {"_target_": "qat.errors.neerest"},
            "no 'neerest' in qat.errors; did you mean 'nearest'?",
            id="function-name",
        ),
        pytest.param({"_target_": "qat.erors.nearest"}, "no 'erors' in qat; did you mean 'errors'", id="module-name"),
        pytest.param({"_target_": "qat.errors"}, "is not a class or function", id="a-module"),
    ],
)
def test_a_mistake_names_the_full_key_before_anything_is_called(node, said):
    config = OmegaConf.create({"model": {"net": node}})
    with pytest.raises(UserError) as error:
        instantiate(config.model.net)
    assert said in str(error.value)
    assert str(error.value).startswith("model.net")
    assert CALLS == []


def test_an_argument_from_code_that_the_target_does_not_take_is_named():
    with pytest.raises(UserError, match="add has no parameter 'c'"):
        instantiate(_node("add", a=1), c=1)


def test_a_constructors_own_user_error_is_prefixed_with_the_key():
    config = OmegaConf.create({"quant": _node("Strict", bits=17)})
    with pytest.raises(UserError, match=r"^quant.bits=17 is more than 16$"):
        instantiate(config.quant)


def test_a_key_that_a_constructor_names_whole_is_not_named_twice():
    config = OmegaConf.create({"quant": _node("Keyed", bits=17)})
    with pytest.raises(UserError, match=r"^quant.bits=17: expected fewer$"):
        instantiate(config.quant)


def test_a_nested_constructors_user_error_names_the_nested_key():
    config = OmegaConf.create({"quant": _node("Layer", bits=1, inner=_node("Strict", bits=17))})
    with pytest.raises(UserError, match=r"^quant.inner.bits=17 is more than 16$"):
        instantiate(config.quant)


@pytest.mark.parametrize("path", [None, 3, "", "own_parts..Layer"])
def test_a_target_that_is_no_dotted_name_is_no_package_to_trust(path):
    with pytest.raises(UserError, match=r"^quant._target_=.*: must be the dotted name"):
        instantiate(OmegaConf.create({"quant": {"_target_": path}}).quant)


def test_a_bug_in_a_constructor_is_not_a_user_error():
    with pytest.raises(Exception, match="a bug") as error:
        instantiate(_node("Strict", bits=1))
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("accelerator", "abacus", id="a-value-error"),
        pytest.param("fast_dev_run", -1, id="a-misconfiguration"),
        pytest.param("devices", -1, id="a-type-error"),
    ],
)
def test_lightnings_own_refusal_names_the_key(key, value):
    pytest.importorskip("pytorch_lightning")
    trainer = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "logger": False, key: value}
    with pytest.raises(UserError, match=rf"^trainer[:.].*{key}.*({value}|int > 0)"):
        instantiate(OmegaConf.create({"trainer": trainer}).trainer)


def test_a_trusted_package_reaches_hydras_own_list():
    assert {"qat.*", "torch.*", "own_parts.*", "another.*"} <= set(allowed_patterns())


@pytest.mark.parametrize(
    ("hint", "value", "fits"),
    [
        pytest.param(float, 1, True, id="int-is-a-float"),
        pytest.param(float, True, False, id="bool-is-no-float"),
        pytest.param(Optional[int], None, True, id="none-is-optional"),  # noqa: UP045 - users write it so
        pytest.param(Union[int, str], [1], False, id="a-list-is-no-scalar"),  # noqa: UP007
        pytest.param(Literal[1, 2], True, False, id="true-is-not-the-literal-1"),
        pytest.param(tuple[int, ...], [1, 2], True, id="a-list-is-a-tuple"),
        pytest.param(tuple[int, float], [1, 2, 3], False, id="a-tuple-has-a-length"),
        pytest.param(list[float], ["a"], False, id="items-count"),
        pytest.param(dict[str, int], {"a": "b"}, False, id="values-count"),
        pytest.param(int, {"_target_": "x.y"}, False, id="a-mapping-is-no-number"),
        pytest.param(Layer, 1, True, id="a-class-is-not-checked"),
    ],
)
def test_a_value_fits_an_annotation(hint, value, fits):
    assert accepts(hint, value) is fits


@pytest.mark.parametrize("hint", [int, list[int], dict[str, int]])
def test_a_node_that_is_not_built_yet_fits_wherever_it_stands(hint):
    node = {"_target_": "x.y"}
    check_type("key", hint, {int: node, list[int]: [1, node], dict[str, int]: {"a": node}}[hint])


def test_the_command_finds_a_package_in_the_folder_that_it_is_run_in(tmp_path, monkeypatch, capsys):
    (tmp_path / "kept_beside.py").write_text("class Model:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    monkeypatch.setenv("QAT_TARGETS", "kept_beside")
    with pytest.raises(UserError, match="no package 'kept_beside'"):
        locate("kept_beside.Model", "model")
    importlib.invalidate_caches()
    assert main(["bench", "nowhere.onnx"]) == 2
    assert locate("kept_beside.Model", "model").__name__ == "Model"
