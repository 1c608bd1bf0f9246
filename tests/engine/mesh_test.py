"""On a mesh, and in several processes, samples are those of one device."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import dsa_jax
from tests.engine import mesh_program
from tests.model import models

ROOT = pathlib.Path(__file__).parents[2]


def check(found, expected):
  np.testing.assert_array_equal(found[0], expected.tokens)
  np.testing.assert_allclose(found[1], expected.log_probs, atol=1e-5, rtol=0)
  np.testing.assert_array_equal(found[2], expected.experts)


@pytest.mark.slow
@pytest.mark.parametrize(
  "speculate, made",
  [
    (False, {}),
    (True, {}),
    (True, dict(cfg=models.WIDE, **models.EIGHT_BITS)),
  ],
  ids=["plain", "drafts", "drafts, in 8 bits"],
)
def test_a_mesh_gives_what_one_device_gives(speculate, made):
  expected = mesh_program.results(speculate, **made)
  with jax.set_mesh(dsa_jax.make_mesh(**mesh_program.MESH)):
    found = mesh_program.results(speculate, on_mesh=True, **made)
  assert len(found) == len(expected) == 24
  for a, b in zip(found, expected):
    check((a.tokens, a.log_probs, a.experts), b)


@pytest.mark.slow
def test_two_processes_give_what_one_device_gives(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  files = [tmp_path / f"{i}.npz" for i in range(2)]
  programs = [
    subprocess.Popen(
      [
        sys.executable,
        "-m",
        "tests.engine.mesh_program",
        file,
        str(port),
        str(i),
      ],
      cwd=ROOT,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i, file in enumerate(files)
  ]
  outputs = [program.communicate()[0] for program in programs]
  assert [p.returncode for p in programs] == [0, 0], outputs
  expected = mesh_program.results(speculate=True)
  for file in files:
    with np.load(file) as saved:
      arrays = [saved[name] for name in saved.files]
    assert len(arrays) == 3 * len(expected)
    for i, result in enumerate(expected):
      check(arrays[3 * i : 3 * i + 3], result)
