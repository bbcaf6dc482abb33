"""The rooms: imports go down the levels only, and each room keeps to its sentence."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room may import rooms above it in this table only: never one beside it.
LEVELS = (
    {"errors"},
    {"files", "parallel"},
    {"config", "input_pipeline", "model", "diffusion", "optimizers", "averages"},
    {"checkpoint", "metrics", "dataset"},
    {"generate"},
    {"callbacks", "tracking", "trainer", "evaluate", "web", "tools"},
    {"stages"},
    {"cup3"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
NOT_ROOMS = {"tests", "benchmarks", "docs"}

PIP_NAMES = {"PIL": "pillow"}


def source_files():
    """The project's files of code, tests and benchmarks apart."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
    # A folder without code at its top is data, an environment or something else of the user's.
    return [
        file for file in files if room(file) not in NOT_ROOMS and (file.parent == ROOT or is_package(file))
    ]


def is_package(file):
    return any((ROOT / room(file)).glob("*.py"))


def room(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def name(file):
    return str(file.relative_to(ROOT))


def imports(tree):
    """The first name of every module that is imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def wrong_imports(importer, tree):
    """The rooms that `importer` imports but must not."""
    rooms = {target for target in imports(tree) if target in LEVEL and target != importer}
    return sorted(target for target in rooms if LEVEL[target] >= LEVEL[importer])


each_file = pytest.mark.parametrize("file", sorted(source_files()), ids=name)


def test_every_room_is_known():
    assert {room(file) for file in source_files()} <= LEVEL.keys()


@pytest.mark.parametrize(
    ("importer", "code", "wrong"),
    [
        ("generate", "import checkpoint, os.path\nfrom model.vae import Encoder", []),
        ("model", "from model.common import Attention", []),
        ("model", "import diffusion", ["diffusion"]),
        ("metrics", "def f():\n    from checkpoint import assign", ["checkpoint"]),
        ("trainer", "from cup3 import main\nimport stages", ["cup3", "stages"]),
    ],
)
def test_the_reader_of_imports_sees_what_is_wrong(importer, code, wrong):
    assert wrong_imports(importer, ast.parse(code)) == wrong


@each_file
def test_imports_go_down_only(file):
    assert wrong_imports(room(file), ast.parse(file.read_text())) == []


@each_file
def test_every_file_starts_with_its_sentence(file):
    sentence = ast.get_docstring(ast.parse(file.read_text()))
    assert sentence, "the file has no docstring"
    assert len(sentence.split()) >= 5


@each_file
def test_every_public_module_has_its_tests(file):
    module = file.stem
    if module not in ("__init__", "errors") and not module.startswith("_"):
        assert (ROOT / "tests" / f"test_{module}.py").exists()


@each_file
def test_only_the_trainer_takes_gradients(file):
    attributes = {
        node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)
    }
    assert "GradientTape" not in attributes or room(file) == "trainer"


@each_file
def test_networks_and_the_process_need_no_tensorflow(file):
    if room(file) in ("model", "diffusion"):
        assert "tensorflow" not in imports(ast.parse(file.read_text()))


@each_file
def test_there_are_no_drawers_of_odds_and_ends(file):
    assert file.stem not in ("utils", "util", "helpers", "misc")


def test_what_is_imported_is_required():
    required = set(re.findall(r"^[a-z0-9-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    imported = {target for file in source_files() for target in imports(ast.parse(file.read_text()))}
    foreign = imported - LEVEL.keys() - set(sys.stdlib_module_names)
    assert {PIP_NAMES.get(target, target).replace("_", "-") for target in foreign} <= required


def test_the_process_is_read_in_one_sitting():
    lines = {file: file.read_text().splitlines() for file in source_files() if room(file) == "diffusion"}
    assert sum(map(len, lines.values())) < 700
    for file in lines:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{name(file)}: {node.name}"
