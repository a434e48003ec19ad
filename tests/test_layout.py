"""The layout: which layer imports which, what an import may cost, where the sources are."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moe

ROOT = Path(__file__).parents[1]

# From the bottom up. A module imports only from levels below its own, or from its own package, inside functions too.
LEVELS = [
    {"moe.errors"},
    {"moe.config", "moe.global_batch", "moe.lazy", "moe.roles", "moe.sampling"},
    {"moe.presets", "moe.counts"},
    {"moe.checkpoint.format"},
    {"moe.planning"},
    {"moe.ops", "moe.norm", "moe.uncast"},
    {"moe.router", "moe.init", "moe.rope", "moe.loss", "moe.cache", "moe.output", "moe.linear"},
    {"moe.balance", "moe.quantized"},
    {"moe.attention", "moe.layer"},
    {"moe.packed"},
    {"moe.model"},
    {"moe.int8"},
    {"moe.checkpoint.reading"},
    {"moe.checkpoint.writing"},
    {"moe.checkpoint"},
    {"moe.parallel"},
    {"moe.speculative", "moe.replay"},
    {"moe.generation", "moe.trace"},
    {"moe.train"},
    {"moe.integrations", "moe.recipes"},
    {"moe.cli"},
    {"moe.__main__"},
]


def unit(module: str) -> str:
    """The package in LEVELS that a module belongs to, or the part of moe that it is in."""
    parts = module.split(".")
    package = ".".join(parts[:3])
    return package if any(package in names for names in LEVELS) else ".".join(parts[:2])


def level(name: str) -> int:
    found = [i for i, names in enumerate(LEVELS) if name in names]
    assert found, f"{name} has no level: add it to LEVELS"
    return found[0]


def imports(path: Path) -> set[str]:
    """Modules of moe that a file imports, at any depth of it. `from moe import x` means moe.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            found |= {node.module} if node.module != "moe" else inner
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_each_layer_imports_only_layers_below_it() -> None:
    names = {f"moe.{p.stem}" for p in (ROOT / "moe").iterdir() if p.suffix == ".py"}
    names |= {f"moe.{p.name}" for p in (ROOT / "moe").iterdir() if (p / "__init__.py").exists()}
    unknown = {name for level in LEVELS for name in level if not list(ROOT.glob(name.replace(".", "/") + "*"))}
    assert not unknown, f"no such module: {unknown}"
    wrong = []
    for path in sources("moe"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        me = unit(module.removesuffix(".__init__"))
        if me == "moe":
            continue  # the lazy front door names everything and imports nothing
        for target in imports(path):
            other = unit(target)
            if ".".join(other.split(".")[:2]) not in names or other == me:
                continue
            if level(other) >= level(me):
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_imports_have_no_cycle() -> None:
    """Between modules, inside functions too. The package itself is lazy: it imports what is asked of it."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources("moe")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items() if name != "moe.__init__"}
    left = {name: {target for target in imports(path) if target in modules} - {name} for name, path in modules.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in cycles, or above one: {sorted(left)}"


def test_nothing_sets_an_attribute_of_an_object_from_outside() -> None:
    """Objects change by their own methods, or are completed by the function that makes them."""
    wrong = []
    for path in sources("moe"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            made = {"self", "cls", "ctx"}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    made |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    owner = ast.unparse(node.value)
                elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
                    owner = ast.unparse(node.args[0])
                else:
                    continue
                if owner not in made:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    # Other libraries' own ways to restore a mode, to choose an option, to forget a gradient.
    allowed = {"module.training", "memory.fill_uninitialized_memory", "self.leaf.grad"}
    allowed |= {"tokenizer.encode_special_tokens", "PreTrainedModel.get_correct_experts_implementation"}
    assert {text.partition(": ")[2] for text in wrong} <= allowed, wrong


def test_kernels_never_import_moe() -> None:
    for path in sources("kernels"):
        assert not {name for name in imports(path) if name.split(".")[0] == "moe"}, path


def test_library_imports_neither_tests_nor_benchmarks() -> None:
    for path in sources("moe"):
        assert not {n for n in imports(path) if n.split(".")[0] in ("tests", "benchmarks", "kernels")}, path


def test_no_module_imports_a_test_module() -> None:
    """What tests share is in tests/support, in a program, or in a conftest."""
    wrong = []
    for path in (*sources("tests"), *sources("benchmarks")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if any(part.startswith("test_") for module in modules for part in module.split(".")):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "moe_triton" / "__init__.py").exists()


def without(*packages: str) -> str:
    """Code after which these packages cannot be imported."""
    return f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"


def run(code: str, cwd: Path, **variables: str) -> None:
    """Runs code in a process without PYTHONPATH; `cwd` is on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_cannot_shadow_huggingface_kernels(tmp_path: Path) -> None:
    """`transformers` imports a package called `kernels` when it finds one."""
    pytest.importorskip("moe_triton")
    run("import importlib.util as u; assert u.find_spec('kernels') is None, u.find_spec('kernels')", tmp_path)
    run("from transformers import MixtralForCausalLM", ROOT)


@pytest.mark.parametrize(
    "module", ["moe", "moe.model", "moe.layer", "moe.checkpoint", "moe.generation", "moe.train.loop"]
)
def test_import_needs_neither_triton_nor_transformers(module: str) -> None:
    run(without("triton", "transformers", "matplotlib") + f"import {module}", ROOT)


NOT_ON_A_GPU_MACHINE = ("tyro", "hypothesis", "xdist", "transformers", "tokenizers", "matplotlib", "tensorboard")


def test_what_runs_on_a_gpu_machine_needs_no_installation() -> None:
    """Tests are collected from a clone beside torch, triton, numpy, pytest, rich, einops and safetensors; one runs."""
    files = ("ops/test_ops", "ops/test_routing", "ops/test_contract", "kernels/test_kernels", "kernels/test_cuda")
    paths = [f"tests/{name}.py" for name in (*files, "kernels/offsets")]
    collect = f"import pytest; assert pytest.main(['-q', '--collect-only', *{paths}]) == 0"
    one = "import pytest; assert pytest.main(['-q', 'tests/ops/test_ops.py', '-k', 'one_slot and float32']) == 0"
    for code in (collect, one, "import tests.support.kernels, tests.compiled"):
        run(without(*NOT_ON_A_GPU_MACHINE) + code, ROOT, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


# Where these come from, whatever is installed: the finder of installed packages is not asked.
FOUND = (
    "from importlib.machinery import PathFinder\n"
    "found = [PathFinder.find_spec(name).origin for name in ('moe', 'moe_triton')]\n"
    f"assert found == {[str(ROOT / folder / '__init__.py') for folder in ('moe', 'kernels/moe_triton')]}, found\n"
)


@pytest.mark.parametrize("package", ["tests", "benchmarks"])
def test_programs_find_the_kernels_of_their_checkout(package: str) -> None:
    run(f"import {package}\n{FOUND}", ROOT)


def test_children_of_tests_find_the_kernels_of_their_checkout(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FOUND], cwd=tmp_path, check=True)


def test_import_moe_does_not_import_torch() -> None:
    run("import moe, sys; assert 'torch' not in sys.modules; assert 'MoELayer' in dir(moe)", ROOT)
    formats = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("moe/checkpoint/format")]
    names = ", ".join(("moe.cli.plan", "moe.planning.published", "moe.recipes.task", "moe.cli.grpo", *formats))
    run(f"import {names}, sys; assert 'torch' not in sys.modules", ROOT)


PUBLIC = """
import inspect, moe, pickle, sys
assert dir(moe) == sorted(moe.__all__) and not any(name.startswith("_") for name in dir(moe))
values = {name: getattr(moe, name) for name in moe.__all__}
modules = {name for name, value in values.items() if inspect.ismodule(value)}
assert modules == {MODULES}, modules
for name, value in values.items():
    assert getattr(moe, name) is value and (name in modules or pickle.loads(pickle.dumps(value)) is value)
    assert inspect.getdoc(value) and (name in modules or inspect.signature(value))
names = {}
exec("from moe import *", names)
assert values.items() <= names.items()
assert moe.train.loop.Trainer and moe.planning.footprint and moe.checkpoint.convert.convert and moe.layer.MLP
assert "moe.integrations.transformers" not in sys.modules and "moe.cli" not in sys.modules
"""


def test_public_names_after_import_moe_alone() -> None:
    """Each package but the command line is one, and so are some modules; nothing optional is imported for them."""
    packages = {path.parent.name for path in (ROOT / "moe").glob("*/__init__.py")} - {"cli"}
    modules = packages | {"balance", "config", "counts", "errors", "presets"}
    run(
        without("triton", "transformers", "matplotlib", "jinja2.sandbox") + PUBLIC.replace("{MODULES}", repr(modules)),
        ROOT,
    )


def test_an_unknown_attribute_is_answered_with_the_nearest_name() -> None:
    import moe.checkpoint

    for module, name, hint in (
        (moe, "MoELayr", "; did you mean MoELayer?"),
        (moe, "xyzzy", ""),
        (moe, "_HOM", ""),
        (moe, "__wrapped__", ""),
        (moe.checkpoint, "laod", "; did you mean load?"),
        (moe.train, "lop", ""),
    ):
        with pytest.raises(AttributeError) as caught:
            getattr(module, name)
        assert str(caught.value) == f"module '{module.__name__}' has no attribute '{name}'{hint}"
        assert not hasattr(module, name) and caught.value.name == name


def test_hooks_and_the_hosted_workflow_run_what_ci_runs() -> None:
    yaml = pytest.importorskip("yaml")
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    linters = (ROOT / ".ci/run").read_text().split('stage "ruff"')[1].split('stage "the numeric')[0]
    commands = {line for line in linters.splitlines() if line.startswith(("ruff", "basedpyright"))}
    assert commands == {"ruff check .", "ruff format --check .", "basedpyright"}
    assert {hook["entry"].removesuffix(" --force-exclude") for hook in hooks["hooks"]} == {
        command.removesuffix(" .").removesuffix(" --check") for command in commands
    }
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["run"]["steps"][-1] == {"run": ".ci/run"}


def test_the_version_is_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "moe.__version__"}}
    stated = [path for path in sources("moe") if f'"{moe.__version__}"' in path.read_text()]
    assert stated == [ROOT / "moe/__init__.py"]
