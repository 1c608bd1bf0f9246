"""The Markdown files: width of lines, and paths and modules that exist."""

import dataclasses
import pathlib
import re

from flax import nnx
import jax
import pytest

import dsa_jax
from dsa_jax.chat import tokenizer as tokenizer_lib
from tests.model import models
from train import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
COLUMNS = 120
PACKAGES = ("configs", "dsa_jax", "pallas_kernels", "tests", "train")
FOLDERS = (*PACKAGES, "docs", ".ci")

_FENCE = re.compile(r"^\s*```.*?^\s*```", re.M | re.S)
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
_CODE_SPAN = re.compile(r"`([^`\n]+)`")
_TARGET = re.compile(r"\]\(([^)\s]+)\)")
_MODULE = re.compile(r"python -m ([\w.]+)")
# `configs/tiny.py` (1M parameters, N = 4 heads, 8 sequences of 256 tokens
_CONFIG = re.compile(
  r"`configs/(\w+)\.py`\s\((\d+)M\sparameters,\sN\s=\s(\d+)\sheads,"
  r"\s(\d+)\ssequences\sof\s([\d,]*\d)"
)
_PLACEHOLDER = re.compile(r"<\w+>|[A-Z]{2,}")  # of `ops/<op>/api.py`, `STAGE`


def long_lines(text: str) -> list[str]:
  """Lines of prose that are too long: no tables, code or links."""
  prose = _FENCE.sub("", text)
  lines = (_TARGET.sub("]", line) for line in prose.splitlines())
  return [
    line
    for line in lines
    if len(line) > COLUMNS
    and not line.startswith(("|", "    "))
    and "://" not in line
  ]


def paths(text: str) -> set[str]:
  """Repository paths in code spans, with placeholders as globs."""
  spans = _CODE_SPAN.findall(_FENCE.sub("", text))
  return {
    _PLACEHOLDER.sub("*", span)
    for span in spans
    if re.fullmatch(r"[\w.*<>/-]+", span)
    and "/" in span
    and span.split("/")[0] in FOLDERS
  }


def targets(text: str) -> set[str]:
  """Files that links and images point to."""
  found = (x.split("#")[0] for x in _TARGET.findall(_FENCE.sub("", text)))
  return {x for x in found if x and "://" not in x}


def modules(text: str) -> set[str]:
  """This repository's modules that a command runs."""
  found = _MODULE.findall(text)
  return {x for x in found if x.split(".")[0] in PACKAGES}


@pytest.fixture(params=FILES, ids=lambda x: str(x.relative_to(ROOT)))
def file(request):
  return request.param


def test_prose_fits_the_columns(file):
  assert not long_lines(file.read_text(encoding="utf-8"))


def test_paths_exist(file):
  named = paths(file.read_text(encoding="utf-8"))
  assert not {x for x in named if not any(ROOT.glob(x.rstrip("/")))}


def test_links_lead_to_files(file):
  linked = targets(file.read_text(encoding="utf-8"))
  assert not {x for x in linked if not (file.parent / x).exists()}


def test_commands_run_modules_that_exist(file):
  run = modules(file.read_text(encoding="utf-8"))
  places = {x: ROOT / x.replace(".", "/") for x in run}
  missing = {
    x
    for x, place in places.items()
    if not place.with_suffix(".py").exists()
    and not (place / "__main__.py").exists()
  }
  assert not missing


def test_a_config_is_what_is_said_of_it(file):
  for name, *said in _CONFIG.findall(file.read_text(encoding="utf-8")):
    cfg = config_lib.load(f"configs/{name}.py")
    assert _facts(cfg) == [int(x.replace(",", "")) for x in said], name


def _facts(cfg):
  """Millions of parameters, heads, sequences of a step, tokens of each."""
  make = lambda: dsa_jax.Transformer(cfg.model, rngs=nnx.Rngs(0))
  params = jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param))
  millions = round(sum(x.size for x in params) / 1e6)
  stage = cfg.stages[-1]
  return [millions, cfg.model.num_heads, stage.batch_size, stage.seq_len]


def test_what_is_said_of_configs_is_found():
  text = "`configs/x.py` (6M parameters, N = 32 heads, 2 sequences of\n8,192"
  assert _CONFIG.findall(text) == [("x", "6", "32", "2", "8,192")]
  found = [_CONFIG.search(x.read_text(encoding="utf-8")) for x in FILES]
  assert any(found)


@pytest.mark.slow
def test_the_examples_of_the_engine_run(capsys):
  text = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
  examples = _PYTHON.findall(text)
  tokenizer = tokenizer_lib.ByteTokenizer()
  vocab = tokenizer.vocab_size
  model = models.model(dataclasses.replace(models.CONFIG, vocab_size=vocab))
  exec("".join(examples), {"model": model, "tokenizer": tokenizer})
  assert len(examples) == 2 and "length " in capsys.readouterr().out


def test_what_is_wrong_is_found():
  wide = "x" * (COLUMNS + 1)
  assert long_lines(f"{wide}\n\n- {wide}") == [wide, f"- {wide}"]
  assert paths("`train/no.py` and `tests/hf`, `ops/<op>/api.py`") == {
    "train/no.py",
    "tests/hf",
  }
  assert paths("`pallas_kernels/ops/<op>/api.py`") == {
    "pallas_kernels/ops/*/api.py"
  }
  assert paths("`python -m train.main`, `a / b`, `runs/mine`") == set()
  assert targets("![x](dsa/x.png), [y](https://y/z)") == {"dsa/x.png"}
  assert modules("    python -m train.no --x; python -m pytest") == {"train.no"}


def test_tables_code_and_links_may_be_wide():
  wide = "x" * (COLUMNS + 1)
  text = f"| {wide} |\n\n    {wide}\n\n```\n{wide}\n```\n[short]({wide})\n"
  assert not long_lines(text)
