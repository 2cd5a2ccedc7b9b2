"""What a stream says of its slots."""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.stream import make_stream, rank, take

SEGMENTS = np.array(
  [[1] * 6, [0, 0, 4, 4, 4, 0], [1, 1, 2, 3, 3, 3], [0] * 6], np.int32
)


def test_rank_is_the_place_within_the_segment():
  for row, ranks in zip(SEGMENTS, rank(jnp.asarray(SEGMENTS)), strict=True):
    want = []
    for slot, segment in enumerate(row):
      continues = slot and row[slot - 1] == segment
      want.append(want[-1] + 1 if continues else 0)
    np.testing.assert_array_equal(ranks, want)


def test_a_token_is_where_it_ends():
  stream = make_stream(jnp.zeros((4, 6, 3)), jnp.asarray(SEGMENTS))
  np.testing.assert_array_equal(stream.position_BT, rank(stream.segment_BT))
  np.testing.assert_array_equal(
    stream.last_token_position_BT, stream.position_BT
  )
  assert stream.position_BT.dtype == jnp.int32
  assert (stream.stride, stream.uniform, stream.packed) == (1, True, True)


def test_given_positions_are_ends_too():
  position_BT = jnp.arange(50, 56, dtype=jnp.int32)[None]
  stream = make_stream(jnp.zeros((1, 6, 3)), None, position_BT)
  np.testing.assert_array_equal(stream.position_BT, position_BT)
  np.testing.assert_array_equal(stream.last_token_position_BT, position_BT)


def test_without_segments_a_row_is_one():
  stream = make_stream(jnp.zeros((2, 5, 3)))
  np.testing.assert_array_equal(stream.segment_BT, np.ones((2, 5)))
  np.testing.assert_array_equal(stream.position_BT, [[0, 1, 2, 3, 4]] * 2)
  assert not stream.packed


def test_take_reads_each_row_by_its_own_index():
  x_BTD = np.arange(24).reshape(2, 4, 3)
  index = jnp.asarray([[3, 0, 9], [4, 1, 1]])
  want = np.stack([x_BTD[0][[3, 0, 3]], x_BTD[1][[3, 1, 1]]])
  for got, rows in ((x_BTD, want), (x_BTD[..., 0], want[..., 0])):
    np.testing.assert_array_equal(take(jnp.asarray(got), index), rows)


def test_what_is_static_stays_out_of_the_leaves():
  """A jitted function knows the spacing, and not the positions."""
  stream = make_stream(jnp.zeros((1, 4, 3))).replace(stride=3, uniform=False)
  assert len(jax.tree.leaves(stream)) == 4

  @jax.jit
  def spacing(stream):
    assert isinstance(stream.position_BT, jax.core.Tracer)
    assert stream.stride == 3 and not stream.uniform
    return stream.replace(stride=stream.stride * 2)

  assert spacing(stream).stride == 6
