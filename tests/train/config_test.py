"""The config of a run: files that fail, and how that is told."""

import os
import pathlib

import pytest

from tests.train import runs
from train import config as config_lib
from train import main


def file_of(folder: pathlib.Path, text: str | bytes) -> str:
  """A config file that begins with what configs need."""
  file = folder / "mine.py"
  head = "from tests.train import runs\nimport pathlib\n"
  if isinstance(text, str):
    text = (head + text).encode()
  file.write_bytes(text)
  return str(file)


GOOD = "def config():\n  return runs.config(pathlib.Path('.'))\n"


def test_what_a_file_makes_is_the_config(tmp_path):
  made = config_lib.load(file_of(tmp_path, GOOD))
  assert made == runs.config(pathlib.Path("."))


def test_an_edited_file_is_read_anew(tmp_path):
  """Also within the second, and with as many bytes."""
  for seed in (3, 4):
    edited = GOOD.replace("'.')", f"'{seed}')")
    made = config_lib.load(file_of(tmp_path, edited))
    assert made.run_dir == f"{seed}/run"


@pytest.mark.parametrize(
  "classes",
  [
    "from __future__ import annotations\nimport dataclasses\n"
    "@dataclasses.dataclass\nclass Sizes:\n  wide: int = 3\n",
    "import pickle\nclass Sizes: pass\npickle.dumps(Sizes())\n",
    "from train import config as config_lib\n"
    "class Mine(config_lib.TrainConfig):\n  pass\n"
    "def config():\n  return Mine(**vars(runs.config(pathlib.Path('.'))))\n",
    "class Model(type(runs.MODEL)):\n  pass\n"
    "runs = type('', (), {'config': lambda x, r=runs: __import__('dataclasses')"
    ".replace(r.config(x), model=Model(**vars(r.MODEL)))})\n",
  ],
)
def test_a_file_may_have_classes(tmp_path, classes):
  """Python, and what reads options, look for the module that a class is of."""
  body = classes if "def config" in classes else classes + GOOD
  first = body.startswith("from __future__")
  file = file_of(tmp_path, body.encode() if first else body)
  if first:
    head, _, rest = body.partition("\n")
    runs_too = "from tests.train import runs\nimport pathlib\n"
    pathlib.Path(file).write_text(f"{head}\n{runs_too}{rest}")
  made = main.parse([f"--config={file}", "--seed=7"])
  assert made.seed == 7 and made.model.embed_dim == runs.MODEL.embed_dim


def test_a_file_that_is_called_like_another_may_import_it(tmp_path):
  file = tmp_path / "tiny.py"
  file.write_text("from configs.tiny import config\n")
  assert config_lib.load(str(file)) == config_lib.load("configs/tiny.py")


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("def config(:\n", "line 3: SyntaxError"),
    ("def config():\n\treturn 1\n        return 2\n", "line 5: "),
    ("x = 1 / 0\n" + GOOD, "line 3: ZeroDivisionError: division by zero"),
    ("import numpyy\n" + GOOD, "line 3: ModuleNotFoundError: No module named"),
    ("from train import confg\n" + GOOD, "line 3: ImportError: cannot import"),
    ("import sys\nsys.exit()\n" + GOOD, "line 4: SystemExit"),
    ("raise SystemExit('no')\n" + GOOD, "line 3: SystemExit: no"),
    ("def config():\n  exit(0)\n", "line 4: SystemExit: 0"),
    ("def config():\n  return undefined\n", "line 4: NameError"),
    ("def config():\n  return config()\n", "RecursionError"),
    ("def config():\n  raise KeyError\n", "line 4: KeyError"),
    ("def config():\n  raise ValueError('a\\nb')\n", "line 4: a b"),
    ("def config(size):\n  return size\n", "TypeError: config() missing 1"),
    ("config = 3\n", "TypeError: 'int' object is not callable"),
    ("def confg():\n  return 1\n", "must define `config() -> TrainConfig`"),
    ("", "must define `config() -> TrainConfig`"),
    ("def config():\n  pass\n", "config() must return a TrainConfig"),
    ("def config():\n  return {}\n", "config() must return a TrainConfig"),
    ("def config():\n  return runs.MODEL\n", "must return a TrainConfig"),
    ("def config():\n  yield 1\n", "config() must return a TrainConfig"),
    (
      "from train.host import mesh\ndef config():\n"
      "  return mesh.MeshConfig(data=-1)\n",
      "line 5: data=-1 must be at least 1",
    ),
    (b"caf\xe9 = 1\n", "SyntaxError: (unicode error) 'utf-8' codec"),
    (b"x = 1\0\n", "null bytes"),
    (b"# coding: nonsense\n", "SyntaxError: unknown encoding"),
    (b"\x7fELF\x02\x01\x01\0" * 9, "SyntaxError"),
    ("raise KeyboardInterrupt\n" + GOOD, "line 3: KeyboardInterrupt"),
    ("class E(BaseException): pass\nraise E('no')\n", "line 4: E: no"),
    ("raise RuntimeError('x' * 10**7)\n", "line 3: RuntimeError: xxx"),
    ("raise ValueError('x' * 10**7)\n", "line 3: xxx"),
    ("from . import tiny\n" + GOOD, "line 3: ImportError: attempted relative"),
    ("from .tiny import config\n", "line 3: ImportError: attempted relative"),
    ("x = " + "(" * 300 + ")" * 300, "SyntaxError: too many nested"),
  ],
)
def test_a_file_that_fails_is_told_in_a_line(tmp_path, text, says):
  file = file_of(tmp_path, text)
  with pytest.raises(ValueError) as error:
    config_lib.load(file)
  told = str(error.value)
  assert told.startswith(f"--config={file}") and says in told
  assert "\n" not in told and len(told) < 1400


def test_what_is_no_file_is_told_in_a_line(tmp_path):
  """A pipe that nobody writes to would be waited for."""
  (tmp_path / "folder.py").mkdir()
  os.mkfifo(tmp_path / "pipe.py")
  (tmp_path / "dangling.py").symlink_to("nowhere")
  (tmp_path / "loop.py").symlink_to("loop.py")
  (tmp_path / "notes.txt").write_text(GOOD)
  (tmp_path / "plain.py").write_text(GOOD)
  for name, says in {
    "folder.py": "no file but a folder",
    "pipe.py": "no file but a folder or a device",
    "dangling.py": "there is no such file",
    "loop.py": "there is no such file",
    "none.py": "there is no such file",
    "": "no file but a folder",
    "notes.txt": "is not a Python file",
    "plain.py/more.py": "there is no such file",
    "x" * 300 + ".py": "File name too long",
  }.items():
    with pytest.raises(ValueError, match=says) as error:
      config_lib.load(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_help_says_that_a_config_is_run(capsys):
  for args in ([], ["--help"], ["--config=configs/tiny.py", "--help"]):
    with pytest.raises(SystemExit):
      main.parse(args)
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "give one that you trust" in told
