"""Two processes train as one, and the run goes on in another shape."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.train import runs
from train.host import processes

ROOT = pathlib.Path(__file__).parents[3]

# A process of a run: the folder of its text, then options of train.main.
PROGRAM = """
import dataclasses, pathlib, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_disable_most_optimizations", True)
from tests.train import runs
from train import config as config_lib
from train import evaluation
from train import main
folder = pathlib.Path(sys.argv[1])

def load(path):
  cfg = runs.config(folder, model=runs.ONE_LAYER)
  stage = dataclasses.replace(cfg.stages[0], steps=4, microbatches=1)
  data = dataclasses.replace(cfg.data, shards=2)
  return dataclasses.replace(cfg, stages=(stage,), data=data)

compile = jax.stages.Lowered.compile
# It would compile as much again.
evaluation.Evaluation.__call__ = lambda *_, last: 0.0

def compile_slowly(*args, **kwargs):
  time.sleep(40)
  return compile(*args, **kwargs)

if (folder / "slowly").exists() and "--distributed.process=1" in sys.argv:
  jax.stages.Lowered.compile = compile_slowly
config_lib.load = load
sys.argv = ["main", "--config=test", *sys.argv[3:]]
main.main()
"""

# A process that meets others which do not come, and loses patience soon.
ALONE = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from train.host import processes
processes._START_SECONDS = 1
_, coordinator, number = sys.argv
processes.start(
  processes.DistributedConfig(
    coordinator=coordinator, processes=2, process=int(number)
  )
)
"""

STARTED = []  # processes, to be ended with their test
HANGS = 1200  # seconds: so long takes nothing, even on a busy machine


@pytest.fixture(autouse=True)
def nothing_is_left():
  yield
  while STARTED:
    with STARTED.pop() as process:
      process.kill()


def launch(folder, devices, *options):
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, str(folder), str(devices), *options],
    cwd=ROOT,
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  STARTED.append(process)
  return process


def launch_two(folder, *options):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    launch(
      folder,
      2,
      f"--distributed.coordinator=localhost:{port}",
      "--distributed.processes=2",
      f"--distributed.process={i}",
      *options,
    )
    for i in range(2)
  ]


def finish(*started):
  outputs = [process.communicate(timeout=HANGS)[0] for process in started]
  for process, output in zip(started, outputs):
    assert process.returncode == 0, output
  return outputs


def losses(folder, run):
  return [
    (line["step"], line["loss"]) for line in runs.lines(folder / run, "train")
  ]


@pytest.mark.slow
def test_a_run_goes_on_in_another_shape(tmp_path):
  runs.write_text(tmp_path)
  whole = f"--run-dir={tmp_path}/whole"
  finish(launch(tmp_path, 1, whole))
  expected = losses(tmp_path, "whole")
  assert len(expected) == 4

  parts = f"--run-dir={tmp_path}/parts"
  first, second = finish(
    *launch_two(tmp_path, parts, "--mesh.fsdp=4", "--stop-at=1")
  )
  assert "stopped after step 1" in first
  assert "step" not in second  # one log
  # On four devices of one process, then on one.
  finish(
    launch(
      tmp_path,
      4,
      *(parts, "--resume", "--mesh.context=2", "--mesh.tensor=2"),
      "--stop-at=3",
    )
  )
  finish(launch(tmp_path, 1, parts, "--resume"))
  actual = losses(tmp_path, "parts")
  assert [step for step, _ in actual] == [step for step, _ in expected]
  np.testing.assert_allclose(
    [x for _, x in actual], [x for _, x in expected], rtol=1e-5
  )


def launch_long(folder):
  """Two processes of a run without an end, that have trained some steps."""
  runs.write_text(folder)
  started = launch_two(
    folder,
    f"--run-dir={folder}/run",
    "--mesh.data=4",
    "--stages.0.steps=100000",
  )
  metrics = folder / "run" / "metrics.jsonl"
  begun = time.monotonic()
  while not (metrics.exists() and metrics.read_text()):
    assert time.monotonic() - begun < HANGS
    if any(process.poll() is not None for process in started):
      finish(*started)  # tells what they said
    time.sleep(0.5)
  return started


@pytest.mark.slow
def test_when_one_is_asked_to_stop_all_save_one_step(tmp_path):
  # One compiles for longer than collectives of CPUs wait for each other.
  (tmp_path / "slowly").touch()
  started = launch_long(tmp_path)
  started[1].send_signal(signal.SIGTERM)
  first, _ = finish(*started)
  (step,) = re.findall(r"stopped after step (\d+)", first)
  saved = [x.name for x in (tmp_path / "run" / "checkpoints").iterdir()]
  assert step in saved
  assert losses(tmp_path, "run")[-1][0] == int(step)


@pytest.mark.slow
def test_when_one_dies_all_end(tmp_path):
  started = launch_long(tmp_path)
  started[1].send_signal(signal.SIGKILL)
  started[1].communicate()
  output, _ = started[0].communicate(timeout=60)
  assert started[0].returncode not in (0, None), output


@pytest.mark.parametrize(
  ("options", "says"),
  [
    (dict(coordinator="a:1"), "belong together"),
    (dict(coordinator="a:1", processes=2, process=2), "below"),
    (dict(auto=True, process=0), "finds the processes itself"),
  ],
)
def test_refuses(options, says):
  with pytest.raises(ValueError, match=says):
    processes.DistributedConfig(**options)


TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


def test_what_is_said_is_logged_with_times(tmp_path, capsys):
  file = tmp_path / "log.txt"
  processes.say("before")
  for attempt in ("first", "second"):
    with processes.log_to(file):
      processes.say(f"{attempt}:\n  | text")
  processes.say("after")
  said = capsys.readouterr().out
  assert said == "before\nfirst:\n  | text\nsecond:\n  | text\nafter\n"
  lines = file.read_text().splitlines()
  assert all(re.match(f"{TIME} ", line) for line in lines)
  assert [line[21:] for line in lines] == said.splitlines()[1:-1]


def test_the_log_tells_what_ended_a_run(tmp_path):
  file = tmp_path / "log.txt"
  with pytest.raises(KeyError), processes.log_to(file):
    raise KeyError("no such thing")
  lines = file.read_text().splitlines()
  assert re.fullmatch(f"{TIME} KeyError: 'no such thing'", lines[-1])
  with pytest.raises(SystemExit), processes.log_to(file):
    sys.exit(143)
  assert file.read_text().splitlines()[-1].endswith(" SystemExit: 143")


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, capsys):
  with processes.log_to(tmp_path):  # a folder
    processes.say("on it goes")
  out, err = capsys.readouterr()
  assert out == "on it goes\n"
  assert f"{tmp_path} could not be written" in err


def test_one_process_logs(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(processes, "is_first", lambda: False)
  with pytest.raises(KeyError), processes.log_to(tmp_path / "log.txt"):
    processes.say("not this one")
    raise KeyError
  assert capsys.readouterr().out == ""
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [0, 1])
def test_who_waits_in_vain_says_so(number):
  """Of itself, JAX would abort with a stack trace."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  done = subprocess.run(
    [sys.executable, "-c", ALONE, f"127.0.0.1:{port}", f"{number}"],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=HANGS,
  )
  assert done.returncode == 1
  *_, last = done.stderr.splitlines()
  assert last.startswith("error: The processes of this run do not meet")
  assert f"waiting for 2 processes at 127.0.0.1:{port}" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  "coordinator",
  [
    *("host", "host:", ":8476", "host:0", "host:65536", "host:x", "host:-1"),
    *("host:8476:", "host:٨", "8476", "http://host", "host:8476/x"),
  ],
)
def test_refuses_what_is_no_address(coordinator):
  with pytest.raises(ValueError, match="is no HOST:PORT"):
    processes.DistributedConfig(coordinator=coordinator, processes=2, process=0)


def test_a_host_without_an_address_is_not_waited_for():
  cfg = processes.DistributedConfig(
    coordinator="no.such.host.invalid:8476", processes=2, process=1
  )
  with pytest.raises(ValueError, match="do not meet"):
    processes.start(cfg)
