"""What an attempt writes of itself, in a checkout, without one, without Git."""

import importlib.metadata
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from train.run import provenance


def git(folder, *arguments):
  identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
  done = subprocess.run(
    ["git", *identity, *arguments],
    cwd=folder,
    check=True,
    capture_output=True,
    text=True,
  )
  return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A repository in which the module seems to lie; nothing is changed in it."""
  folder = tmp_path / "checkout"
  (folder / "train").mkdir(parents=True)
  git(tmp_path, "init", "--quiet", str(folder))
  module = folder / "train" / "provenance.py"
  module.write_text("one\n")
  (folder / "weights").write_bytes(bytes(range(256)))
  git(folder, "add", ".")
  git(folder, "commit", "--quiet", "-m", "all")
  monkeypatch.setattr(provenance, "__file__", str(module))
  return folder


@pytest.fixture
def run_dir(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  return folder


def written(run_dir):
  return {
    int(file.stem): json.loads(file.read_text())
    for file in run_dir.glob("versions/*.json")
  }


def test_tells_what_runs_and_where(run_dir, monkeypatch):
  monkeypatch.setenv("NCCL_DEBUG", "WARN")
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train.main", "a b"])
  provenance.write(run_dir)
  found = written(run_dir)[1]
  assert found["command"] == "python -m train.main 'a b'"
  assert found["environment"]["NCCL_DEBUG"] == "WARN"
  assert "PATH" not in found["environment"]
  assert found["devices"]["kind"] == "cpu"
  assert found["devices"]["count"] == jax.device_count()
  assert found["python"].startswith(f"{sys.version_info.major}.")
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"):
    assert found["packages"][name] == importlib.metadata.version(name)


def test_secrets_are_not_written_down(run_dir, monkeypatch):
  secret = "hunter2hunter2"
  for name in (
    *("JAX_SECRET", "JAX_API_TOKEN", "TPU_TOKEN", "TPU_API_KEY", "CUDA_KEY"),
    *("NCCL_PASSWORD", "XLA_CREDENTIALS", "LIBTPU_X", "HF_TOKEN"),
  ):
    monkeypatch.setenv(name, secret)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"s3://me:{secret}@host/a")
  flags = f"--xla_dump_to=/a --token={secret} --header='Bearer {secret}'"
  monkeypatch.setenv("XLA_FLAGS", flags)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  path = f"hf:a/b?name=en&token={secret}&split=train"
  options = [f"--data.sources.0.path={path}", "--log.sample-tokens=4"]
  shapes = ["hf_abcdefghijklmnop", f"https://u:{secret}@h/x?sig={secret}&v=1"]
  monkeypatch.setattr(sys, "orig_argv", ["python", *options, *shapes])
  provenance.write(run_dir)
  text = (run_dir / "versions" / "1.json").read_text()
  assert secret not in text and "hf_abc" not in text
  found = json.loads(text)
  assert (
    found["environment"].items()
    >= {
      "JAX_COMPILATION_CACHE_DIR": "s3://***@host/a",
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_dump_to=/a --token=*** --header='Bearer ***",
    }.items()
  )
  assert "token=***&split=train" in found["command"]
  assert "--log.sample-tokens=4" in found["command"]


def test_a_clean_checkout_is_its_commit(checkout, run_dir):
  provenance.write(run_dir)
  head = git(checkout, "rev-parse", "HEAD")
  assert written(run_dir)[1]["code"] == {"commit": head, "changed": []}
  assert [x.name for x in run_dir.glob("versions/*")] == ["1.json"]


def test_the_diff_makes_the_code_that_ran(checkout, run_dir, tmp_path):
  (checkout / "train" / "provenance.py").write_text("one\ntwo\n\n")
  (checkout / "weights").write_bytes(bytes(range(255, -1, -1)))
  (checkout / "new file").write_text("new")
  provenance.write(run_dir)
  changed = written(run_dir)[1]["code"]["changed"]
  assert sorted(changed) == [
    " M train/provenance.py",
    " M weights",
    '?? "new file"',
  ]
  git(tmp_path, "clone", "--quiet", str(checkout), "clone")
  git(tmp_path / "clone", "apply", str(run_dir / "versions" / "1.diff"))
  for name in ("train/provenance.py", "weights"):
    same = (tmp_path / "clone" / name).read_bytes()
    assert same == (checkout / name).read_bytes()


def test_earlier_attempts_stay(checkout, run_dir):
  code = checkout / "train" / "provenance.py"
  for i in range(3):
    code.write_text(f"attempt {i}")
    provenance.write(run_dir)
  assert written(run_dir).keys() == {1, 2, 3}
  for i in range(3):
    diff = (run_dir / "versions" / f"{i + 1}.diff").read_text()
    assert f"+attempt {i}" in diff
  # One that was killed between its two files is not written over either.
  (run_dir / "versions" / "4.diff").write_text("kept")
  provenance.write(run_dir)
  assert (run_dir / "versions" / "4.diff").read_text() == "kept"
  assert (run_dir / "versions" / "5.json").exists()


def test_another_checkout_around_the_code_is_not_its_own(
  checkout, run_dir, monkeypatch
):
  installed = checkout / "venv" / "train" / "provenance.py"
  installed.parent.mkdir(parents=True)
  installed.write_text("installed")
  monkeypatch.setattr(provenance, "__file__", str(installed))
  provenance.write(run_dir)
  code = written(run_dir)[1]["code"]
  assert code["commit"] is None and "provenance.py" in code["why"]


def test_works_without_git(checkout, run_dir, monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  provenance.write(run_dir)
  code = written(run_dir)[1]["code"]
  assert code["commit"] is None and "git" in code["why"]


def test_works_outside_of_a_checkout(run_dir, tmp_path, monkeypatch):
  monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
  module = pathlib.Path(tmp_path, "provenance.py")
  monkeypatch.setattr(provenance, "__file__", str(module))
  provenance.write(run_dir)
  code = written(run_dir)[1]["code"]
  assert code["commit"] is None and "not a git repository" in code["why"]


def test_one_process_writes(run_dir, monkeypatch):
  monkeypatch.setattr(provenance.processes, "is_first", lambda: False)
  provenance.write(run_dir)
  assert not any(run_dir.iterdir())


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_cannot_be_written_is_told(run_dir, capsys, kind):
  versions = run_dir / "versions"
  versions.touch() if kind == "file" else versions.symlink_to("/nowhere/at")
  provenance.write(run_dir)
  assert f"could not be written to {versions}" in capsys.readouterr().out
