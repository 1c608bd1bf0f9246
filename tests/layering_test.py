"""Imports point down only: configs -> train -> dsa_jax -> pallas_kernels."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = ("configs", "train", "dsa_jax", "pallas_kernels")  # top to bottom


def upward_imports(layer: str, source: str) -> list[str]:
  """The imports in `source`, a file of `layer`, that point up."""
  above = LAYERS[: LAYERS.index(layer)]
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      modules = [node.module or ""]
    else:  # a relative import cannot leave its own top-level package
      continue
    found += [
      f"line {node.lineno} imports {module}"
      for module in modules
      if module.split(".")[0] in above
    ]
  return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer):
  files = sorted((ROOT / layer).rglob("*.py"))
  assert files, f"no Python file in {ROOT / layer}"
  violations = {
    str(file.relative_to(ROOT)): found
    for file in files
    if (found := upward_imports(layer, file.read_text(encoding="utf-8")))
  }
  assert not violations


@pytest.mark.parametrize(
  "layer, source",
  [
    ("pallas_kernels", "import dsa_jax"),
    ("pallas_kernels", "import jax, train.step as step"),
    ("pallas_kernels", "from configs import tiny"),
    ("dsa_jax", "from train.config import TrainConfig"),
    ("dsa_jax", "def f():\n  from configs import tiny\n  return tiny"),
    ("train", "if True:\n  import configs.tiny"),
  ],
)
def test_finds_an_upward_import(layer, source):
  assert len(upward_imports(layer, source)) == 1


@pytest.mark.parametrize(
  "layer, source",
  [
    ("pallas_kernels", "import jax\nfrom pallas_kernels import dispatch"),
    ("dsa_jax", "from pallas_kernels import sparse_mla"),
    ("dsa_jax", "from . import train"),  # dsa_jax.train, not train
    ("train", "import dsa_jax, pallas_kernels\nimport training"),
    ("configs", "from configs import tiny\nfrom train import config"),
  ],
)
def test_allows_the_rest(layer, source):
  assert not upward_imports(layer, source)
