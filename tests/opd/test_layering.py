"""The house: packages import downwards only, each dependency has one home, files and functions stay small and say what they are."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ["rollout", "teachers", "opd"]
"""From the bottom up: each may import itself and those before it."""
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]

HOMES = {
    "deepspeed": {"opd/engine.py", "opd/bench_peers.py", "opd/bench_step_peers.py"},  # its loss and its rollout are measured beside ours
    "wandb": {"opd/wandb_log.py"},
    "datasets": {"rollout/prompts.py"},
    "hydra": {"opd/composition.py", "opd/errors.py", "opd/submission.py"},
    "rich": {"opd/console.py"},
    "lm_eval": {"opd/harness.py", "opd/harness_tasks.py"},
}


def imports(path: Path) -> list[str]:
    """Every module that a file imports, inside functions too, as a full name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.append(node.module)
    return found


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_three_packages_are_there():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_imports_upwards(name):
    own = LAYERS.index(name.split("/")[0])
    above = [module for module in imports(ROOT / name) if module.split(".")[0] in LAYERS[own + 1 :]]
    assert not above


@pytest.mark.parametrize("name", NAMES)
def test_no_package_imports_the_tests(name):
    assert not [module for module in imports(ROOT / name) if module.split(".")[0] in ("tests", "conftest", "pytest")]


@pytest.mark.parametrize("dependency", list(HOMES))
def test_a_dependency_is_imported_in_its_home_only(dependency):
    users = {name for name in NAMES if any(module.split(".")[0] == dependency for module in imports(ROOT / name))}
    assert users <= HOMES[dependency]
    assert users, f"nothing imports {dependency}"


def test_the_number_of_processes_is_read_in_one_place():
    """Another puts SLURM's names for it into the words that this one reads."""
    readers = {name for name in NAMES if "world_size" in (ROOT / name).read_text().lower()}
    assert readers == {"opd/distributed.py", "opd/slurm.py"}


@pytest.mark.parametrize("name", NAMES)
def test_torchs_process_groups_are_used_in_one_place(name):
    """One other place divides frozen models among the ranks."""
    if name not in ("opd/distributed.py", "teachers/sharding.py"):
        assert not [module for module in imports(ROOT / name) if module.startswith("torch.distributed")]


@pytest.mark.parametrize("name", NAMES)
def test_each_module_says_what_it_is(name):
    documentation = ast.get_docstring(ast.parse((ROOT / name).read_text()))
    assert documentation
    assert len(documentation.split()) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_at_most_350_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= 350


@pytest.mark.parametrize("name", NAMES)
def test_a_function_has_at_most_60_lines_and_six_parameters(name):
    """Triton kernels take no objects, so theirs do not count; nor do those of `divergence`, the one entry that is called without a config."""
    for function in functions(ROOT / name):
        assert function.end_lineno - function.lineno < 60, function.name
        arguments = function.args
        if function.name == "divergence" or any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list):
            continue
        count = len([a for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg not in ("self", "cls", "ctx")])
        assert count <= 6, function.name


@pytest.mark.parametrize("name", NAMES)
def test_public_functions_and_classes_are_documented(name):
    """Methods of one line and those of a protocol's implementation speak for themselves."""
    tree = ast.parse((ROOT / name).read_text())
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    silent = [node.name for node in public if not ast.get_docstring(node) and node.end_lineno - node.lineno > 5]
    assert not silent


def own_names(tree: ast.Module) -> set[str]:
    """Variables and parameters of a module, without the attributes of other modules' objects."""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("opd/")])
def test_a_shape_suffix_is_explained_in_the_modules_legend(name):
    """A letter that ends a tensor's name (hidden_ND) stands in the module's docstring, as `N:`."""
    tree = ast.parse((ROOT / name).read_text())
    suffixes = [re.fullmatch(r"[a-z][a-z_0-9]*_([A-Z]+)1?", found) for found in own_names(tree)]
    letters = {letter for suffix in suffixes if suffix for letter in suffix[1]}
    assert letters <= set(re.findall(r"\b([A-Z]): ", ast.get_docstring(tree)))


def test_the_loop_has_at_most_40_lines():
    """DESIGN section 4: nothing but the loop."""
    [loop] = functions(ROOT / "opd" / "distill.py")
    assert loop.end_lineno - loop.lineno <= 40


def test_config_does_not_need_the_heavy_libraries():
    """A mistake on the command line is answered before DeepSpeed and W&B are imported."""
    script = "import sys; from opd.__main__ import load_config; load_config('distill', []); print([m for m in ('deepspeed', 'wandb') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
