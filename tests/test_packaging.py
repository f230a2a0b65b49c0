"""The wheel works outside the checkout: it carries the configs, the command, and everything a run needs."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="building the wheel needs the extra `dev`")
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = out.glob("qat-*.whl")
    return built


@pytest.fixture(scope="module")
def qat_command(wheel, tmp_path_factory) -> Path:
    """`qat` from the wheel, in an environment of its own that finds the dependencies in the one the tests run in."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "qat"


def _qat(command: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed command in another folder, without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([command, *argv], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_carries_every_config_of_the_checkout(wheel):
    inside = {name.removeprefix("qat/") for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".yaml")}
    assert inside == {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qat"}


def test_the_wheel_says_that_it_is_typed(wheel):
    assert "qat/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_the_source_distribution_holds_what_its_tests_read(tmp_path):
    pytest.importorskip("hatchling", reason="building it needs the extra `dev`")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = tmp_path.glob("qat-*.tar.gz")
    with tarfile.open(built) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    patterns = ("tests/*.py", "benchmarks/*.py", "docs/*.*", "notebooks/*.ipynb", "configs/**/*.yaml", "*.md", "*.py")
    read = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert read | {"pyproject.toml", "qat/py.typed"} <= inside


def test_the_installed_command_finds_its_configs_from_another_folder(qat_command, tmp_path):
    done = _qat(qat_command, tmp_path, "train", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: qat train" in done.stdout and "model: causal_lm, chargpt, cnn, mlp" in done.stdout
    source = _qat(qat_command, tmp_path, "train", "--info", "searchpath").stdout
    assert str(qat_command.parents[1]) in source and str(ROOT / "configs") not in source


def test_the_installed_command_trains_from_another_folder(qat_command, tmp_path):
    done = _qat(qat_command, tmp_path, "train", "model=mlp", "float_epochs=1", "trainer.max_epochs=1", "run_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / ".hydra" / "config.yaml").exists()
    assert [path for path in (tmp_path / "run").rglob("*") if path.suffix == ".onnx"]


def test_importing_the_core_loads_nothing_beside_torch_and_none_of_its_heavy_parts():
    code = "import sys, torch; before = set(sys.modules); import qat, qat.policies.policy, qat.insert, qat.calibrate; "
    code += "print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names <= {"qat", "torch"}
    assert not [n for n in loaded if n.startswith(("torch._dynamo", "torch._inductor", "torch.onnx", "torch.export"))]


def _imported(path: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def test_what_the_package_imports_is_a_dependency_or_in_an_extra_for_users():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    listed = {re.split(r"[^\w-]", text)[0].lower().replace("_", "-") for text in [*project["dependencies"], *extras]}
    listed |= {"omegaconf"}  # see there
    homes = packages_distributions()
    imported = {name for path in (ROOT / "qat").rglob("*.py") for name in _imported(path)} - sys.stdlib_module_names
    lacking = {n for n in imported if not listed & {home.lower().replace("_", "-") for home in homes.get(n, [n])}}
    assert lacking - {"qat"} == set()
