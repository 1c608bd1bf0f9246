"""Damaged and hostile folders: refused in one line, or read as they are meant.

Each case is one change to a folder that is whole. What is read nevertheless is
another model than before, or a warning names the key, or the change is one that
says nothing of the model.
"""

import json
import pathlib
import random
import shutil
from typing import Any

import numpy as np
import pytest

from dsa_jax import json_file
from dsa_jax.hf import companions
from dsa_jax.hf import config_json
from dsa_jax.hf import files
from dsa_jax.hf import header as header_lib
from tests import damage
from tests.hf import folders

GLM = folders.GOLDEN.parent / "glm_moe_dsa_tiny"
CONFIGS = {
  "v32": json.loads((folders.GOLDEN / "config.json").read_text()),
  "glm": json.loads((GLM / "config.json").read_text()),
  "released": folders.CONFIG
  | dict(quantization_config=folders.FP8, auto_map={"a": "b"}, use_cache=True),
}
# Keys with no bearing on the model's numbers.
IDLE = {
  *("architectures", "auto_map", "bos_token_id", "eos_token_id", "use_cache"),
  *("max_position_embeddings", "output_router_logits", "pad_token_id"),
  "transformers_version",
}


class Config:
  """A config.json, and what is read of it as it is."""

  def __init__(self, name: str, folder: pathlib.Path):
    self.raw = CONFIGS[name]
    self._file = folder / "config.json"
    layers = self.raw["num_hidden_layers"]
    has_mtp = self.raw.get("num_nextn_predict_layers")
    self._names = {f"model.layers.{layers}.x"} if has_mtp else set()
    self.whole = self.read(damage.dumps(self.raw))
    assert self.whole.result and not self.whole.said

  def read(self, text: bytes) -> damage.Outcome:
    self._file.write_bytes(text)
    return damage.read(
      lambda: config_json.parse(
        config_json.read_json(self._file.parent),
        None,
        self._names,
        str(self._file),
      )
    )

  def check(self, got: damage.Outcome, changed: dict, case) -> None:
    """Refused by file and key; or else read, or told, as it is meant."""
    if got.refused:
      assert "config.json" in got.said, case
      known = self.raw.keys() | changed.keys()
      assert "recursion" in got.said or any(x in got.said for x in known), case
    elif got.result == self.whole.result:
      for path in damage.changes(self.raw, changed):
        key = json_file.dotted([path[-1]])
        assert path[0] in IDLE or key in got.said, (path, *case)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
  "each", [3, pytest.param(len(damage.HOSTILE), marks=pytest.mark.slow)]
)
def test_values_of_config_json(tmp_path, name, each):
  config = Config(name, tmp_path)
  rng = random.Random(name)
  for path in damage.paths(config.raw):
    for value in rng.sample(damage.HOSTILE, each):
      changed = damage.replaced(config.raw, path, value)
      got = config.read(damage.dumps(changed))
      config.check(got, changed, (path, value, got.said[:300]))
      if value is None and not got.refused:  # null is as good as absent
        absent = config.read(damage.dumps(damage.without(config.raw, path)))
        assert absent.result == got.result, path


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_of_config_json(tmp_path, name):
  """Keys that are absent, stand twice, are misspelt, or belong to others."""
  config = Config(name, tmp_path)
  for path in damage.paths(config.raw):
    absent = damage.without(config.raw, path)
    got = config.read(damage.dumps(absent))
    config.check(got, absent, (path, got.said[:300]))
    if isinstance(path[-1], str):
      value: Any = config.raw
      for key in path:
        value = value[key]
      odd = damage.replaced(absent, (*path[:-1], f"{path[-1]}\n\0 x"), value)
      got = config.read(damage.dumps(odd))
      idle = path[0] in IDLE and len(path) > 1
      assert got.refused or idle or path[-1] in got.said, path
    if len(path) == 1:
      twice = config.read(damage.doubled(config.raw, path[0], 1))
      assert twice.refused and f"{path[0]!r} stands twice" in twice.said


@pytest.mark.parametrize(
  ("unit", "says"),
  [
    (b"1,", "has more than 1,048,576 bytes"),
    (b"[1],", "has more than 4,194,304 values"),
    (b'{"a":1},', "has more than 4,194,304 values"),
  ],
)
def test_millions_of_values(tmp_path, unit, says):
  file = tmp_path / "config.json"
  text = b'{"a": [' + unit * 2_100_000 + b"1]}"
  reader = config_json.read_json
  if "values" in says:
    reader = lambda folder: json_file.parse(text, str(folder / "config.json"))
  file.write_bytes(text)
  got = damage.read(lambda: reader(tmp_path))
  assert got.refused and f"{file} {says}" in got.said


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_config_json(tmp_path, name):
  config = Config(name, tmp_path)
  text = damage.dumps(config.raw)
  rng = random.Random(0)
  read = 0
  for _ in range(120):
    at, kind = rng.randrange(len(text)), rng.choice(("cut", "flip", "drop"))
    if kind == "cut":
      damaged = text[:at]
    elif kind == "flip":
      flipped = bytes([text[at] ^ 1 << rng.randrange(8)])
      damaged = text[:at] + flipped + text[at + 1 :]
    else:
      damaged = text[:at] + text[at + rng.randint(1, 9) :]
    got = config.read(damaged)
    try:
      changed = json.loads(damaged)
    except ValueError:
      assert got.refused, (kind, damaged)
      continue
    read += 1
    config.check(got, changed, (kind, damaged, got.said[:300]))
  assert read > 15


class Stored:
  """A folder of one safetensors file or three, and its tensors."""

  def __init__(self, folder: pathlib.Path, parts: int):
    self.folder = folder / "stored"
    rng = np.random.default_rng(0)
    self.tensors = {
      f"model.layers.{i}.{name}.weight": rng.standard_normal(
        (i + 5, 7), np.float32
      )
      for i in range(6)
      for name in ("a", "b")
    }
    if parts == 1:
      self.folder.mkdir()
      folders.save_file(self.tensors, self.folder / "model.safetensors")
    else:
      folders.write(self.folder, self.tensors, parts)

  def check(self, case) -> damage.Outcome:
    """Refused by a file's name, or read with the values that it had."""

    def read():
      stored = files.Folder(self.folder)
      return {name: stored.read(name) for name in stored.entries}

    got = damage.read(read)
    if got.refused:
      assert self.folder.name in got.said, (case, got.said)
    else:
      for name, array in got.result.items():
        np.testing.assert_array_equal(array, self.tensors[name], str(case))
    return got


def headers(file: pathlib.Path) -> tuple[dict, bytes]:
  raw = file.read_bytes()
  length = int.from_bytes(raw[:8], "little")
  return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(file: pathlib.Path, header: bytes, data: bytes) -> None:
  file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_values_of_a_header(tmp_path):
  stored = Stored(tmp_path, 1)
  file = stored.folder / "model.safetensors"
  header, data = headers(file)
  name = "model.layers.3.a.weight"
  some = [path for path in damage.paths(header) if path[0] == name]
  assert len(some) == 8  # itself, dtype, shape, data_offsets, and each number
  for path in [("__metadata__",), (name,), *some]:
    for value in damage.HOSTILE:
      put(file, damage.dumps(damage.replaced(header, path, value)), data)
      got = stored.check((path, value))
      assert got.refused or path[0] == "__metadata__", (path, value)
  put(file, damage.doubled(header, name, header[name]), data)
  assert "stands twice" in stored.check("twice").said


@pytest.mark.parametrize(
  ("offsets", "says"),
  [
    ([0, 72], "has 72 bytes"),
    ([-72, 0], "data_offsets"),
    ([24, 0], "data_offsets"),
    ([0, 24], "overlaps"),
    ([2**63, 2**63 + 24], "cut short"),
    ([240, 264], "leaves a gap"),
    ([24, 48, 72], "data_offsets"),
    ([24], "data_offsets"),
    ([24, 48.0], "data_offsets"),
    ([False, 24], "data_offsets"),
  ],
)
def test_places_in_a_header(tmp_path, offsets, says):
  """The first tensor has bytes 0 to 24, and the second the next 24."""
  file = tmp_path / "model.safetensors"
  two = {name: np.ones((2, 3), np.float32) for name in "ab"}
  folders.save_file(two, file)
  header, data = headers(file)
  assert header["b"]["data_offsets"] == [24, 48]
  put(
    file,
    damage.dumps(damage.replaced(header, ("b", "data_offsets"), offsets)),
    data + b"\0" * 300 * (offsets[0] == 240),
  )
  got = damage.read(lambda: files.Folder(tmp_path))
  assert got.refused and says in got.said and file.name in got.said


def test_a_tensor_of_many_dimensions(tmp_path):
  """Whose product would take minutes."""
  stored = Stored(tmp_path, 1)
  file = stored.folder / "model.safetensors"
  header, data = headers(file)
  path = ("model.layers.3.a.weight", "shape")
  for shape in ([10**290] * 50_000, [1] * 9):
    put(file, damage.dumps(damage.replaced(header, path, shape)), data)
    got = stored.check(len(shape))
    assert got.refused and len(got.said) < 300 and "has shape=[1" in got.said


def test_bytes_of_a_file(tmp_path):
  stored = Stored(tmp_path, 1)
  file = stored.folder / "model.safetensors"
  whole = file.read_bytes()
  end = 8 + int.from_bytes(whole[:8], "little")
  rng = random.Random(0)
  for _ in range(200):
    at, kind = rng.randrange(end), rng.choice(("cut", "flip", "drop", "more"))
    if kind == "cut":
      damaged = whole[: rng.randrange(len(whole))]
    elif kind == "flip":
      flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
      damaged = whole[:at] + flipped + whole[at + 1 :]
    elif kind == "drop":
      damaged = whole[:at] + whole[at + rng.randint(1, 9) :]
    else:
      damaged = whole + whole[-rng.randint(1, 9) :]
    file.write_bytes(damaged)
    try:
      stored.check((kind, at))
    except (KeyError, AssertionError):
      # A valid file of other names; the model has no such tensor.
      assert kind == "flip"
      assert header_lib.read(file).keys() != stored.tensors.keys()


NAMES = (
  *("../model-00001-of-00003.safetensors", "/etc/passwd", ".", "..", ""),
  *("inner/x.safetensors", "config.json", "a\0b.safetensors", "x" * 300),
  *("nowhere.safetensors", "folder.safetensors", "fifo.safetensors"),
  *("model-00002-of-00003.safetensors", "a\nb.safetensors"),
)


def test_values_of_an_index(tmp_path):
  stored = Stored(tmp_path, 3)
  damage.OTHERS["fifo"](stored.folder / "fifo.safetensors")
  (stored.folder / "folder.safetensors").mkdir()
  outside = tmp_path / "model-00001-of-00003.safetensors"
  shutil.copy(stored.folder / outside.name, outside)
  index = stored.folder / files.INDEX
  raw = json.loads(index.read_text())
  name, place = next(iter(raw["weight_map"].items()))
  for path in [("metadata",), ("weight_map",), ("weight_map", name)]:
    for value in (*damage.HOSTILE, *NAMES):
      index.write_bytes(damage.dumps(damage.replaced(raw, path, value)))
      got = stored.check((path, value))
      assert got.refused or path == ("metadata",), (path, value)
  index.write_bytes(damage.dumps(damage.without(raw, ("weight_map", name))))
  assert f"{place} has {name}, which" in stored.check("unnamed").said
  index.write_bytes(damage.doubled(raw, "weight_map", {}))
  assert "'weight_map' stands twice" in stored.check("twice").said


def test_a_tensor_in_two_files(tmp_path):
  stored = Stored(tmp_path, 3)
  first, second = sorted(stored.folder.glob("*.safetensors"))[:2]
  shutil.copy(first, second)
  assert "is both in" in stored.check("two").said
  (stored.folder / files.INDEX).unlink()
  assert "is both in" in stored.check("two").said


def test_files_that_do_not_belong_together(tmp_path):
  stored = Stored(tmp_path, 3)
  parts = sorted(stored.folder.glob("*.safetensors"))
  shutil.copy(parts[0], stored.folder / "model.safetensors")
  assert "remove one of them" in stored.check("both").said
  (stored.folder / files.INDEX).unlink()
  assert "belong together" in stored.check("no index").said
  (stored.folder / "model.safetensors").unlink()
  assert not stored.check("whole").refused
  parts[0].rename(stored.folder / "model-00004-of-00003.safetensors")
  assert "3 of the 3 files" in stored.check("a number too high").said
  parts[1].rename(stored.folder / "model-00001-of-99999999.safetensors")
  assert "belong together" in stored.check("other totals").said


@pytest.mark.parametrize("other", damage.OTHERS)
@pytest.mark.parametrize(
  "name",
  ["config.json", files.INDEX, "model-00002-of-00003.safetensors", "LICENSE"],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_what_is_no_file(tmp_path, name, other, indexed):
  stored = Stored(tmp_path, 3)
  if not indexed:
    (stored.folder / files.INDEX).unlink()
  file = stored.folder / name
  file.unlink(missing_ok=True)
  damage.OTHERS[other](file)
  reader = {
    "config.json": lambda: config_json.read_json(stored.folder),
    "LICENSE": lambda: companions.find(stored.folder),
  }.get(name, lambda: files.Folder(stored.folder))
  got = damage.read(reader)
  assert got.refused == ((name, other) != ("LICENSE", "empty"))
  assert not got.refused or name in got.said


def test_links_of_a_cache(tmp_path):
  """The hub's cache: a snapshot's files are links to blobs without names."""
  stored = Stored(tmp_path, 3)
  (stored.folder / "LICENSE").write_text("mine")
  blobs = tmp_path / "models--a--b" / "blobs"
  snapshot = tmp_path / "models--a--b" / "snapshots" / "0f3"
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  for i, file in enumerate(sorted(stored.folder.iterdir())):
    file.rename(blobs / f"{i:064x}")
    (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
  stored.folder = snapshot
  assert not stored.check("links").refused
  companions.copy(companions.find(snapshot), tmp_path / "out")
  assert (tmp_path / "out" / "LICENSE").read_text() == "mine"
