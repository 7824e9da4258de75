# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: arrows point one way, and the scheduler runs without JAX."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "pallas_kernels": set(),
    "sharding": {"pallas_kernels"},
    "slora_jax": {"pallas_kernels", "sharding"},
    "server": {"slora_jax"},
}
FORBIDDEN = {  # of other projects
    "pallas_kernels": {"flax", "fastapi"},
    "sharding": {"flax", "fastapi"},
    "slora_jax": {"fastapi", "starlette", "uvicorn"},
    "server": set(),
}
OURS = {*ALLOWED, "benchmarks", "tests", "training"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it; relative ones stay in the package.

    `from a import b` gives `a.b`: b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def test_imports_are_found_wherever_they_hide():
    source = """
import a.b as c, d
if c:
    from e.f import g, h
def later():
    import i
    from . import j
"""
    assert set(imports(source)) == {"a.b", "d", "e.f.g", "e.f.h", "i"}
    assert is_inside("jax._src.core", "jax._src")
    assert not is_inside("jaxtyping", "jax")


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_one_way(package):
    closed = (OURS - {package} - ALLOWED[package]) | FORBIDDEN[package]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path.read_text())
        if name.split(".")[0] in closed
    ]
    assert not wrong


@pytest.mark.parametrize("folder", sorted(OURS))
def test_nobody_reaches_into_jax(folder):
    """`jax._src` has no promises."""
    wrong = []
    for path in sources(folder):
        source = path.read_text()
        names = [*imports(source)]
        attributes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute))
        names += [ast.unparse(attribute) for attribute in attributes if attribute.attr == "_src"]
        wrong += [f"{path.relative_to(ROOT)}: {n}" for n in names if is_inside(n, "jax._src")]
    assert not wrong


@pytest.mark.parametrize("package", ["scheduling", "simulator", "pool"])
def test_scheduling_runs_without_jax(package):
    modules = [f"slora_jax.{package}.{path.stem}" for path in sources(f"slora_jax/{package}")]
    names = ", ".join(name.removesuffix(".__init__") for name in modules)
    check = f"import sys, {names}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_the_front_end_runs_without_jax():
    """It starts at once, holds no device, and forks nothing that does."""
    modules = [f"server.{path.stem}" for path in sources("server") if path.parent.name == "server"]
    modules += [f"server.routes.{path.stem}" for path in sources("server/routes")]
    names = ", ".join(name.removesuffix(".__init__") for name in modules)
    check = f"import sys, {names}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
