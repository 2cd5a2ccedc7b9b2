"""Strict modes, and 8 host devices; before jax is first imported."""

import os
import shutil

from tiny_run import FAST_COMPILE

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
# gcsfs, when it is imported; else it asks by gRPC of what kind a bucket is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + f" --xla_force_host_platform_device_count=8 {FAST_COMPILE}"
)
# torch's threads wait for each other spinning: of the oracles, a worker has one.
if "PYTEST_XDIST_WORKER" in os.environ:
  os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Frees each module's compiled programs: hundreds are made."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def made(tmp_path_factory):
  """A small checkpoint in every format, to be left as it is."""
  from made_checkpoints import make_all

  return make_all(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copy(made, tmp_path):
  """Makes a copy of one of them, to be spoiled."""
  return lambda name: shutil.copytree(made / name, tmp_path / "src")


@pytest.fixture
def fakes(tmp_path):
  """The programs that the scripts of tpu/ call."""
  from tpu_fakes import Fakes

  return Fakes(tmp_path)
