"""One of several processes that load a checkpoint onto one mesh.

python load_on_mesh.py PATH COORDINATOR PROCESSES PROCESS
"""

import json
import resource
import sys

import jax


def main(path, coordinator, processes, process):
  jax.distributed.initialize(coordinator, int(processes), int(process))
  from flax import nnx
  import numpy as np

  import gemma_funnel
  from gemma_funnel.convert import tensor_io
  from gemma_funnel.parallel import sharding

  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=-1))
  read, sizes = tensor_io.read_range, []

  def counted(path, offset, nbytes):
    sizes.append(nbytes)
    return read(path, offset, nbytes)

  from gemma_funnel.convert import safetensors_file

  safetensors_file.read_range = counted
  # What is loaded with the first values is not what is measured.
  jax.block_until_ready(jax.numpy.ones((8, 8)) @ jax.numpy.ones((8, 8)))
  nnx.state(gemma_funnel.load(path + "-small"))
  sizes.clear()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  model = gemma_funnel.load(path, mesh=mesh)
  jax.block_until_ready(nnx.state(model))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  embedding = model.embedding[...]
  shards = [
    [s.index[0].start or 0, float(np.asarray(s.data, np.float64).sum())]
    for s in embedding.addressable_shards
  ]
  report = dict(
    shape=embedding.shape,
    shards=shards,
    peak=peak << 10,
    read=sum(sizes),
    largest_read=max(sizes),
  )
  print(json.dumps(report), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
