"""A wheel's dependencies are what is imported, no less and no more."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = {"dsa_jax", "pallas_kernels", "train", "configs"}
# Programs in the packages, and the extra that they need.
PROGRAMS = {"pallas_kernels/bench/__main__.py": "bench"}
# Another name on import, or a package that comes with another.
DISTRIBUTIONS = {"jaxlib": "jax", "orbax": "orbax-checkpoint"}


def third_parties(source: str) -> tuple[set[str], set[str]]:
  """Top-level packages imported by the module itself, and within functions."""
  always, later = set(), set()

  def visit(node: ast.AST, inside: bool) -> None:
    for child in ast.iter_child_nodes(node):
      names = []
      if isinstance(child, ast.Import):
        names = [alias.name for alias in child.names]
      elif isinstance(child, ast.ImportFrom) and child.level == 0:
        names = [child.module or ""]
      tops = {name.split(".")[0] for name in names}
      (later if inside else always).update(
        tops - set(sys.stdlib_module_names) - OURS
      )
      body = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
      visit(child, inside or body)

  visit(ast.parse(source), inside=False)
  return always, later


def imported(*folders: str) -> tuple[set[str], set[str]]:
  """Distributions that the folders' modules import, programs left out."""
  always, later = set(), set()
  for folder in folders:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no Python file in {ROOT / folder}"
    for file in files:
      if str(file.relative_to(ROOT)) not in PROGRAMS:
        a, b = third_parties(file.read_text(encoding="utf-8"))
        always, later = always | a, later | b
  return (
    {DISTRIBUTIONS.get(name, name) for name in always},
    {DISTRIBUTIONS.get(name, name) for name in later},
  )


def project() -> dict:
  return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
  return {re.split(r"[^\w-]", r)[0] for r in requirements}


def test_a_wheel_brings_what_the_packages_import():
  always, _ = imported("dsa_jax", "pallas_kernels")
  assert always == names(project()["dependencies"])


def test_the_extra_train_brings_what_train_imports():
  always, _ = imported("train", "configs")
  extras = project()["optional-dependencies"]
  assert always <= names(project()["dependencies"] + extras["train"])
  # What only another package needs would be an import that nobody makes.
  assert names(extras["train"]) <= always


def test_what_a_function_imports_has_an_extra():
  always, later = imported("dsa_jax", "pallas_kernels", "train", "configs")
  extras = project()["optional-dependencies"]
  known = names([r for group in extras.values() for r in group])
  assert later - always <= known


def test_programs_in_a_package_have_an_extra():
  extras = project()["optional-dependencies"]
  for file, extra in PROGRAMS.items():
    always, _ = third_parties((ROOT / file).read_text(encoding="utf-8"))
    assert always - {"jax"} == names(extras[extra])


def test_dev_includes_the_extras_of_tests():
  (own,) = (
    r
    for r in project()["optional-dependencies"]["dev"]
    if r.startswith("dsa-jax[")
  )
  assert set(own[len("dsa-jax[") : -1].split(",")) >= {"train", "hf"}


def test_finds_imports_inside_and_outside_of_functions():
  source = """
import jax.numpy, os
from . import near
if True:
  from numpy import random
class A:
  import flax
  def f(self):
    import tokenizers
    def g(): from pyarrow import parquet
"""
  always = {"jax", "numpy", "flax"}
  assert third_parties(source) == (always, {"tokenizers", "pyarrow"})


def test_no_library_complains_on_a_cpu(tmp_path):
  """libtpu is installed here, but there is no TPU."""
  pytest.importorskip("libtpu")
  settings = ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "train.main",
      "--config=configs/tiny.py",
      "--check",
      f"--run-dir={tmp_path / 'run'}",
    ],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k not in settings},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  # All that is printed is a word of ours and what it says, or a document.
  ours = r"(run|model|data|mesh|stage|learns|saves|batch|memory|disk|begins) "
  for line in done.stdout.splitlines():
    assert re.match(rf"{ours}|  |ok$", line), line


def test_the_cpu_is_chosen_only_where_nothing_else_is(tmp_path):
  program = """
import os, pathlib, sys
import jax
from train.host import processes

def chosen(*files, platforms=None, devices=pathlib.Path(sys.argv[1])):
  for name in files:
    (devices / name).parent.mkdir(exist_ok=True)
    (devices / name).touch()
  jax.config.update("jax_platforms", platforms)
  processes.configure_platform(devices)
  for name in files:
    (devices / name).unlink()
  return jax.config.jax_platforms

def flags(given):
  os.environ["XLA_FLAGS"] = given
  assert chosen() == "cpu"
  return os.environ["XLA_FLAGS"].split()

ours = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=true"
assert flags("") == [ours]
assert flags("--xla_dump_to=x") == ["--xla_dump_to=x", ours]
assert flags("--xla_backend_extra_options=y") == [
  "--xla_backend_extra_options=y"
]
os.environ["XLA_FLAGS"] = ""
assert chosen("vfio/vfio") == "cpu"
os.environ["XLA_FLAGS"] = ""
assert chosen("accel0") is None
assert chosen("vfio/0") is None
assert chosen(platforms="cuda,cpu") == "cuda,cpu"
os.environ["JAX_FORCE_TPU_INIT"] = "1"
assert chosen() is None
del os.environ["JAX_FORCE_TPU_INIT"]
processes.metadata.entry_points = lambda group: [group]  # as CUDA's
assert chosen() is None
assert os.environ["XLA_FLAGS"] == ""
"""
  subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True
  )
