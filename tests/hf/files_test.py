"""Files that are cut short, missing, or cannot be written."""

import json
import pathlib
import resource

import numpy as np
import pytest

import dsa_jax
from dsa_jax import regular_file
from dsa_jax.hf import companions
from dsa_jax.hf import files
from tests.hf import folders

MEMORY = pathlib.Path("/proc/self/mem")


@pytest.fixture
def folder(tmp_path):
  folders.write(tmp_path / "in", folders.tensors("fp8"))
  return tmp_path / "in"


def part(folder, i):
  return folder / f"model-{i:05d}-of-00003.safetensors"


def test_reads_each_tensor_by_itself(folder):
  stored = files.Folder(folder)
  expected = folders.read(folder)
  assert stored.entries.keys() == expected.keys()
  for name, array in expected.items():
    actual = stored.read(name)
    assert actual.dtype == array.dtype
    assert actual.tobytes() == array.tobytes(), name


def test_a_missing_file(folder):
  part(folder, 2).unlink()
  with pytest.raises(FileNotFoundError, match="00002-of-00003.*is missing"):
    dsa_jax.load_hf(folder)
  (folder / files.INDEX).unlink()
  with pytest.raises(FileNotFoundError, match="2 of the 3 files"):
    dsa_jax.load_hf(folder)


def test_a_tensor_that_the_index_puts_elsewhere(folder):
  index = json.loads((folder / files.INDEX).read_text())
  index["weight_map"]["lm_head.weight"] = part(folder, 2).name
  (folder / files.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match="00002-of-00003.*no lm_head.weight"):
    dsa_jax.load_hf(folder)


@pytest.mark.parametrize("kept", [0, 5, 2000, -7])
def test_a_file_that_is_cut_short(folder, kept):
  file = part(folder, 3)
  whole = file.read_bytes()
  file.write_bytes(whole[:kept])
  with pytest.raises(ValueError, match="00003-of-00003.*cut short"):
    dsa_jax.load_hf(folder)


@pytest.mark.skipif(not MEMORY.exists(), reason="there is no /proc/self/mem")
def test_a_disk_that_fails_is_told_by_file(folder):
  """Its first pages cannot be read: an error of input, by a file that opens."""
  stored = files.Folder(folder)
  file = part(folder, 2)
  name = next(x for x, at in stored.entries.items() if at.file == file)
  file.unlink()
  file.symlink_to(MEMORY)
  for read in (
    lambda: stored.read(name),
    lambda: stored.same(name, name),
    lambda: files.checksum(file),
    lambda: files.Folder(folder),
    lambda: regular_file.read(file, 8),
    lambda: companions.copy(
      [companions.Companion(file, pathlib.Path("copy"))], folder
    ),
  ):
    with pytest.raises(OSError, match="error: '.*00002-of-00003.safetensors'"):
      read()


def test_a_header_that_is_none(folder):
  file = part(folder, 1)
  whole = file.read_bytes()
  file.write_bytes(whole[:8] + b"?" + whole[9:])
  with pytest.raises(ValueError, match="00001-of-00003.*broken header"):
    dsa_jax.load_hf(folder)


def test_no_space_leaves_nothing_that_looks_whole(tmp_path, folder):
  model = dsa_jax.load_hf(folder)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
  try:
    with pytest.raises(OSError, match=r"at model\.layers.*model-00001-of"):
      dsa_jax.save_hf(model, tmp_path / "out", max_shard_size="300KB")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not list((tmp_path / "out").iterdir())
  with pytest.raises(FileNotFoundError):
    dsa_jax.load_hf(tmp_path / "out")


def test_writes_what_others_read(tmp_path):
  arrays = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.zeros(0, np.float32),
  ]
  specs = [files.Spec(name, x.dtype, x.shape) for name, x in zip("ab", arrays)]
  file = tmp_path / "model.safetensors"
  checksum = files.write(file, specs, arrays)
  assert checksum == files.checksum(file)
  folders.assert_same(folders.read(tmp_path), dict(zip("ab", arrays)))
  assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0
