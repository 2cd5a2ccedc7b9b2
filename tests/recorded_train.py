"""train.py, which also writes a digest of each batch that it is given.

RECORD.0 is the file of process 0; a line is of its rows for one step.
"""

import hashlib
import os
import pathlib
import runpy
import sys

import jax

from gemma_funnel.parallel import sharding

_put = sharding.put_batch


def _recorded(host, mesh):
  digest = hashlib.sha256(host["tokens"].tobytes()).hexdigest()
  with open(f"{os.environ['RECORD']}.{jax.process_index()}", "a") as f:
    f.write(digest + "\n")
  return _put(host, mesh)


sharding.put_batch = _recorded
path = pathlib.Path(__file__).parents[1] / "train.py"
sys.argv[0] = str(path)
runpy.run_path(str(path), run_name="__main__")
