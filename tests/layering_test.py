"""Imports point down only: between packages, and between the rooms of each."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("configs", "train", "dsa_jax", "pallas_kernels")  # top to bottom
# Top to bottom, the package itself first: the files that lie in no room.
ROOMS = {
  "train": ("", "aot", "run", "learn", "data", "host"),
  "dsa_jax": ("engine", "hf", "chat", ""),
  "pallas_kernels": (
    *("bench", "workloads", "ops", "cases"),
    *("tpu", "hopper", ""),
  ),
}
# Rooms that need no accelerator's library, and are imported without one.
WITHOUT_JAX = ("dsa_jax/chat",)
# The package's face: it shows what its rooms define.
FACES = ("dsa_jax/__init__.py", "pallas_kernels/__init__.py")


def imports(source: str) -> list[tuple[int, str]]:
  """The line and the full name of every absolute import in `source`."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      for alias in node.names:
        found.append((node.lineno, f"{node.module}.{alias.name}"))
  return found


def rank(module: str) -> tuple[int, int] | None:
  """The floor of a module, lowest number on top; None if it is not ours."""
  package, _, rest = module.partition(".")
  if package not in PACKAGES:
    return None
  rooms, room = ROOMS.get(package, ("",)), rest.partition(".")[0]
  place = rooms.index(room if room in rooms else "")
  return PACKAGES.index(package), place


def upward_imports(module: str, source: str) -> list[str]:
  """The imports in `source`, the text of `module`, that point up."""
  own = rank(module)
  assert own is not None
  found = []
  for line, name in imports(source):
    there = rank(name)
    if there is not None and there < own:
      found.append(f"line {line} imports {name}")
  return found


def files(package: str) -> list[pathlib.Path]:
  return sorted((ROOT / package).rglob("*.py"))


def module_of(file: pathlib.Path) -> str:
  return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package):
  violations = {
    str(file.relative_to(ROOT)): found
    for file in files(package)
    if str(file.relative_to(ROOT)) not in FACES
    and (found := upward_imports(module_of(file), file.read_text("utf-8")))
  }
  assert files(package) and not violations


@pytest.mark.parametrize("package", ROOMS)
def test_every_folder_is_a_known_room(package):
  there = {p.parent.name for p in (ROOT / package).glob("*/__init__.py")}
  assert there == {room for room in ROOMS[package] if room}


@pytest.mark.parametrize("room", WITHOUT_JAX)
def test_some_rooms_do_without_jax(room):
  for file in files(room):
    names = {name for _, name in imports(file.read_text("utf-8"))}
    assert not {n for n in names if n.split(".")[0] in ("jax", "flax")}


def test_no_op_imports_another():
  """But the fused one, which has no kernels of its own."""
  found = []
  for file in files("pallas_kernels/ops"):
    module = module_of(file)
    op = ".".join(module.split(".")[:3])
    found += [
      (module, name)
      for _, name in imports(file.read_text("utf-8"))
      if name.startswith("pallas_kernels.ops.") and not name.startswith(op)
    ]
  assert {module.split(".")[2] for module, _ in found} == {
    "sparse_mla_with_loss"
  }


def test_only_the_dialect_knows_of_mlir():
  """Kernels are written in Pallas and `hopper`, without jax's own modules."""
  below = ("jaxlib.mlir", "jax.experimental.mosaic", "jax.interpreters")
  found = [
    (module_of(file), name)
    for package in (*PACKAGES, "tests")
    for file in files(package)
    for _, name in imports(file.read_text("utf-8"))
    if name.startswith((*below, "jax._src"))
  ]
  assert found
  hopper = "pallas_kernels.hopper."
  assert not [x for x in found if not x[0].startswith(hopper)]
  assert not [x for x in found if x[1].startswith("jax._src")]


def test_functions_of_kernels_fit_on_a_page():
  lengths = {
    f"{module_of(file)}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
    for file in files("pallas_kernels")
    for node in ast.walk(ast.parse(file.read_text("utf-8")))
    if isinstance(node, ast.FunctionDef)
  }
  assert len(lengths) > 300
  assert not {name: x for name, x in lengths.items() if x > 100}


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("pallas_kernels.tiles", "import dsa_jax"),
    ("pallas_kernels.tiles", "import jax, train.learn.step as step"),
    ("pallas_kernels.ops.sparse_mla.api", "from configs import tiny"),
    ("dsa_jax.mla", "from train.config import TrainConfig"),
    ("dsa_jax.mla", "def f():\n  from configs import tiny\n  return tiny"),
    ("dsa_jax.mla", "from dsa_jax.hf import load"),
    ("dsa_jax.chat.tokenizer", "from dsa_jax import hf"),
    ("train.main", "if True:\n  import configs.tiny"),
    ("train.run.checkpoint", "from train import config"),
    ("train.learn.step", "from train.run import metrics"),
    ("train.data.corpus", "from train.learn import step as step_lib"),
    ("train.host.processes", "import train.data.corpus"),
  ],
)
def test_an_upward_import_is_found(module, source):
  assert len(upward_imports(module, source)) == 1


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("pallas_kernels.tiles", "import jax\nfrom pallas_kernels import dispatch"),
    ("dsa_jax.mla", "from pallas_kernels import sparse_mla"),
    ("dsa_jax.hf.load", "from dsa_jax import transformer"),
    ("train.main", "import dsa_jax, pallas_kernels\nimport training"),
    ("train.loop", "from train.run import metrics\nfrom train import stage"),
    ("train.learn.batches", "from train.host import processes"),
    ("configs.tiny", "from configs import h200\nfrom train import config"),
  ],
)
def test_a_downward_import_is_allowed(module, source):
  assert not upward_imports(module, source)
