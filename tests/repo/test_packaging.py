"""What is installed: packages, programs, and the three folders that are imported below llmos_tf."""

import ast
import configparser
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import llmos_tf

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "llmos_tf": "llmos_tf",
    "strategies": "llmos_tf/strategies",
    "models": "llmos_tf/models",
    "scripts": "llmos_tf/scripts",
}
# Modules of llmos_tf that users have no business with, beside those with an underscore.
INNER = {
    "partition",
    "coordination",
    "files",
    "graph",
    "options",
    "process",
    "rematerialisation",
    "spmd",
}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def entry_points() -> dict[str, str]:
    lines = setup_cfg()["options.entry_points"]["console_scripts"].split("\n")
    return dict(map(str.strip, line.split("=")) for line in lines if line)


def installed_names() -> set[str]:
    """Returns the path in the wheel of every Python file of the project."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def test_every_package_is_in_setup():
    # Fails when a folder of sources lacks its __init__.py, or setup.py does not find it: either
    # way it would be missing from the wheel without a word.
    spec = importlib.util.spec_from_file_location("llmos_tf_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    expected = {os.path.dirname(name).replace("/", ".") for name in installed_names()}
    assert set(setup.find_packages()) == expected


def test_no_other_package_at_the_top():
    # Fails when a new package at the top of the repository is neither packaged nor refused.
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(FOLDERS)


@pytest.mark.parametrize("name", ["models", "scripts", "strategies"])
def test_folder_refuses_its_own_name(name):
    # Fails when a checkout offers top-level packages called `models` and so on: every class
    # would exist twice, and an install would overwrite another project's package.
    with pytest.raises(ImportError, match=f"llmos_tf.{name}"):
        importlib.import_module(name)
    assert importlib.import_module(f"llmos_tf.{name}").__name__ == f"llmos_tf.{name}"


def test_package_refuses_to_be_found_inside_itself():
    # Fails when the repository's root on __path__ makes llmos_tf.llmos_tf a second copy.
    with pytest.raises(ImportError, match="imported as llmos_tf"):
        importlib.import_module("llmos_tf.llmos_tf")


def test_public_modules_are_attributes():
    # Fails when a public module is added, or goes, and llmos_tf/__init__.py does not say so.
    names = {path.stem for path in (ROOT / "llmos_tf").glob("*.py")}
    names |= {path.parent.name for path in (ROOT / "llmos_tf").glob("*/__init__.py")}
    public = {name for name in names if not name.startswith("_")} - INNER
    assert public | {"models", "scripts", "strategies"} == llmos_tf._MODULES | {"scripts"}
    assert set(llmos_tf.__all__) <= set(dir(llmos_tf))
    assert llmos_tf.Mesh is llmos_tf.mesh.Mesh
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmos_tf.nothing


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("llmos_tf", "Mesh"),
        ("llmos_tf.strategies", "DataParallelStrategy MeshStrategy MultiWorkerMeshStrategy"),
        ("llmos_tf.strategies", "PipelineParallelStrategy TensorParallelStrategy TPUMeshStrategy"),
        ("llmos_tf.strategies", "ZeroStrategy"),
        ("llmos_tf.strategies.schedules", "Op Schedule make_schedule"),
        ("llmos_tf.models", "GPT GPTConfig Llama LlamaConfig Mixtral MixtralConfig get_preset"),
        ("llmos_tf.collectives", "all_gather all_reduce all_to_all axis_index axis_size broadcast"),
        ("llmos_tf.collectives", "permute reduce_scatter traffic"),
        ("llmos_tf.memory", "estimate peak_resident_bytes rematerialised report"),
        ("llmos_tf.training", "make_train_step"),
        ("llmos_tf.testing", "train verify"),
        ("llmos_tf.checkpoint", "latest_checkpoint restore_checkpoint save_checkpoint"),
        ("llmos_tf.devices", "configure_virtual_cpus visible_devices"),
    ],
)
def test_public_names_keep_their_import_paths(module, names):
    # Fails when a file that moves takes a name with it that users import.
    found = importlib.import_module(module)
    assert [name for name in names.split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("name", sorted(entry_points()))
def test_program_resolves(name):
    # Fails when an installed command would end in an ImportError.
    assert callable(EntryPoint(name, entry_points()[name], "console_scripts").load())


def test_every_program_is_installed():
    # Fails when a script with a `run` function has no command, or the two names differ.
    programs = {}
    for path in (ROOT / "scripts").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            programs[f"llmos-{path.stem}"] = f"llmos_tf.scripts.{path.stem}:run"
    assert entry_points() == programs


def test_ci_does_what_the_readme_says():
    # Fails when the two commands of the README are not the ones that CI has seen to work.
    install = "python3 -m pip install -e '.[test]'"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert f"{install} && python3 -m pytest -n 2\n" in readme
    assert install in ci
    assert "python3 -m pytest -n 2" in ci
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# Names of the standard library that came after Python 3.10, which the linters do not know.
TOO_NEW = {
    "contextlib.chdir",
    "datetime.UTC",
    "enum.StrEnum",
    "itertools.batched",
    "tomllib",
    "typing.LiteralString",
    "typing.Never",
    "typing.NotRequired",
    "typing.Required",
    "typing.Self",
    "typing.Unpack",
    "typing.assert_never",
    "typing.override",
}


def test_oldest_python():
    # Fails when a source uses syntax or a name that Python 3.10 does not have.
    assert setup_cfg()["options"]["python_requires"].startswith(">=3.10,")
    problems = []
    for folder in (*FOLDERS, "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
            used = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    used |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    used.add(f"{node.value.id}.{node.attr}")
            problems += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(used & TOO_NEW)]
    assert problems == []


def test_wheel(tmp_path):
    # Fails when a file is missing from the wheel, one lands outside llmos_tf, or the package works
    # only inside a checkout.
    source = tmp_path / "source"
    source.mkdir()
    # A copy: stale files of an earlier build/ would ship, and the checkout stays clean.
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "."]
    subprocess.run([*pip, str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("llmos_tf-*.whl")
    assert f"-{llmos_tf.__version__}-" in wheel.name

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    info = f"llmos_tf-{llmos_tf.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == installed_names()

    code = (
        "import llmos_tf, llmos_tf.models, llmos_tf.scripts\n"
        "assert llmos_tf.models.get_preset('gpt_tiny').num_layers == 4\n"
        "print(len(llmos_tf.__path__), llmos_tf.models.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
        env=environment,
    )
    # One path: the hook for checkouts added nothing.
    assert done.stdout.split() == ["1", str(site / "llmos_tf" / "models" / "__init__.py")]
