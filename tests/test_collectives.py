"""What devices send each other, against programs whose answer is known."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from gemma_funnel.training import collectives


def _mesh():
  types = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((2, 4), ("data", "tensor"), types)


def _found(function, *args, in_specs, out_spec):
  mesh = _mesh()
  placed = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
    for x, s in zip(args, in_specs, strict=True)
  ]
  compiled = (
    jax.jit(function, out_shardings=NamedSharding(mesh, out_spec))
    .lower(*placed)
    .compile()
  )
  found = collectives.collectives(compiled.as_text(), mesh)
  return collectives.bytes_by_axis(found), found


X = np.zeros((64, 128), np.float32)


def test_gathering_one_axis():
  sent, found = _found(lambda x: x, X, in_specs=[P("tensor")], out_spec=P())
  assert {one.kind for one in found} == {"all-gather"}
  # Each device sends its own part, in effect, to three others.
  assert sent == {"tensor": X.nbytes * 3 / 4}


def test_summing_over_an_axis():
  sent, found = _found(
    lambda x, w: x @ w,
    X,
    np.zeros((128, 32), np.float32),
    in_specs=[P(None, "tensor"), P("tensor")],
    out_spec=P(),
  )
  assert {one.kind for one in found} == {"all-reduce"}
  assert sent == {"tensor": 2 * 64 * 32 * 4 * 3 / 4}


def test_a_loop_sends_each_time():
  def function(x, w):
    body = lambda c, w: (jnp.tanh(c @ w), None)
    return jax.lax.scan(body, x, w)[0]

  sent, found = _found(
    function,
    X,
    np.zeros((5, 128, 128), np.float32),
    in_specs=[P("data"), P(None, "tensor")],
    out_spec=P("data"),
  )
  assert max(one.times for one in found) == 5
  assert sent and set(sent) == {"tensor"}
  once, _ = _found(
    lambda x, w: jnp.tanh(x @ w),
    X,
    np.zeros((128, 128), np.float32),
    in_specs=[P("data"), P("tensor")],
    out_spec=P("data"),
  )
  assert sent["tensor"] == pytest.approx(5 * once["tensor"], rel=0.5)


# As libtpu writes them: a kernel's data go on over lines, one operation is in
# every fusion that it goes on in, and a loop counts to what its condition has.
_TPU = """HloModule jit_step

%start (x: bf16[2,8]) -> bf16[8,8] {
  ROOT %all-gather.1 = bf16[8,8]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%goes_on (x: bf16[2,8]) -> bf16[8,8] {
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%inner_condition (p: (f32[4], u32[])) -> pred[] {
  %c = u32[]{:T(128)} constant(4)
  %p = (f32[4], u32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%inner_body (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %p = (f32[4], u32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %same = u32[] copy(%next)
  %more = bf16[8,8] fusion(%x), calls=%goes_on
  %sent = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %y = f32[4]{0} collective-permute-done(%sent)
  ROOT %t = (f32[4], u32[]) tuple(%y, %same)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %c = s32[] constant(3)
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%one, %i)
  %kernel = f32[4]{0} custom-call(%p), backend_config={"a":{
"data":"{}"
}}, metadata={op_name="kernel"}
  %first = bf16[8,8] fusion(%kernel), calls=%start
  %loop = (f32[4], u32[]) while(%first), condition=%inner_condition, body=%inner_body
  ROOT %t = (s32[], f32[4]) tuple(%next, %kernel)
}, execution_thread="main"

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %loop = (s32[], f32[4]) while(%x), condition=%condition, body=%body
  ROOT %r = (f32[4], f32[2]) all-reduce-start(%x, %x), replica_groups=[4,2]<=[2,4]T(1,0)
}
"""


def test_text_of_tpus():
  found = collectives.collectives(_TPU, _mesh())
  times = {one.kind: one.times for one in found}
  assert times == {
    "all-gather": 3,
    "collective-permute": 3 * 2,
    "all-reduce": 1,
  }
  gathered = 3 * 8 * 8 * 2 * 3 / 4
  assert collectives.bytes_by_axis(found) == {
    "tensor": gathered + 6 * 16,
    "data": 2 * 6 * 4 / 2,
  }


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("source_target_pairs={{0,1},{1,0},{2,2}}", [[0, 1], [1, 0]]),
    (
      "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) "
      "{'a'}, dimensions={0}",
      [[0, 1, 2, 3], [4, 5, 6, 7]],
    ),
    (
      "replica_groups=mesh['a'=4,'b'=2] {'b'}, x",
      [[0, 1], [2, 3], [4, 5], [6, 7]],
    ),
    (
      "replica_groups=mesh['a'=8] {'a':(2)2}, x",
      [[0, 2], [1, 3], [4, 6], [5, 7]],
    ),
    ("no groups", [[0, 1, 2, 3, 4, 5, 6, 7]]),
  ],
)
def test_groups_are_read(text, groups):
  np.testing.assert_array_equal(collectives._groups(text, 8), groups)


def test_axes_of_groups():
  mesh = _mesh()
  axes = lambda g: collectives._axes(np.asarray(g), mesh)
  assert axes([[0, 4], [1, 5]]) == ("data",)
  assert axes([[0, 1, 2, 3]]) == ("tensor",)
  assert axes([list(range(8))]) == ("data", "tensor")
