"""Counts from the text of a compiled program: compared with XLA's own without loops, with known values otherwise."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from larp_jax.tools import hlo

LAYERS, WIDTH, ROWS = 5, 64, 16


def compiled(f, *specs):
    """The compiled gradient of f on 8 devices, or on one if no specs are given."""
    shapes = [(LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)]
    if not specs:
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(jax.grad(f)).lower(*arguments).compile()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    placed = [NamedSharding(mesh, spec) for spec in specs]
    arguments = [jax.ShapeDtypeStruct(x, jnp.float32, sharding=s) for x, s in zip(shapes, placed, strict=True)]
    return jax.jit(jax.grad(f), out_shardings=placed[0]).lower(*arguments).compile()


def scanned(kernels, x):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0].sum()


def test_traffic_is_xlas_own_count_where_there_are_no_loops():
    program = compiled(lambda kernels, x: (jnp.tanh(x @ kernels[0]) @ kernels[1]).sum())
    assert hlo.Program(program.as_text()).traffic() == program.cost_analysis()["bytes accessed"]


def test_instructions_in_a_loop_count_once_per_iteration():
    program = compiled(scanned)
    once = program.cost_analysis()["bytes accessed"]
    every = hlo.Program(program.as_text()).traffic()
    kernels = LAYERS * WIDTH * WIDTH * 4
    # each kernel is read forward and backward, and its gradient written
    assert every > 3 * kernels and every > 2 * once


def test_collectives_of_a_layer_split_over_devices():
    found = hlo.Program(compiled(scanned, P(None, "fsdp", None), P("fsdp", None)).as_text()).collectives()
    kernel = WIDTH * WIDTH * 4
    by_kind = {c.kind: c for c in found if c.bytes == kernel}
    gathered = by_kind["all-gather"]  # forward and backward
    assert (gathered.count, gathered.group) == (2 * LAYERS, 8)
    assert gathered.wire_bytes == pytest.approx(2 * LAYERS * kernel * 7 / 8)
    reduced = by_kind.get("reduce-scatter") or by_kind["all-reduce"]
    assert (reduced.count, reduced.group) == (LAYERS, 8)
    assert reduced.wire_bytes == pytest.approx(LAYERS * kernel * 7 / 8 * (2 if reduced.kind == "all-reduce" else 1))


TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=16

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %start = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}
  %done = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  %part = bf16[8,128]{1,0:T(8,128)(2,1)} slice(%done), slice={[0:8], [0:128]}
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%i, %part)
}

%cond (p.1: (s32[], bf16[8,128])) -> pred[] {
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %tuple = (s32[], bf16[8,128]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[8,128]{1,0}) while(%tuple), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %last = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = bf16[8,128]{1,0} all-reduce(%last), channel_id=2, replica_groups={}, to_apply=%add
}
"""  # noqa: E501


NO_TRIP_COUNT = (
    TPU.replace(', backend_config={"known_trip_count":{"n":"12"}}', "")
    .replace("  ROOT %true = pred[] constant(true)\n", """\
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %end = s32[]{:T(128)} constant(13)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
""")
    .replace("%zero = s32[] constant(0)\n", "%one = s32[] constant(1)\n  %zero = s32[] copy(%one)\n")
)  # fmt: skip


# in the second, each iteration compares two numbers, and one number is copied before
@pytest.mark.parametrize("text, scalars", [(TPU, 0), (NO_TRIP_COUNT, 12 * (4 + 4 + 1) + 4 + 4)])
def test_the_text_of_tpu_programs(text, scalars):
    program = hlo.Program(text)
    found = {c.kind: c for c in program.collectives()}
    assert found["all-gather"] == hlo.Collective("all-gather", 12, 4, 32 * 128 * 2)
    assert found["all-reduce"] == hlo.Collective("all-reduce", 1, 16, 8 * 128 * 2)
    # each iteration reads and writes a slice; arrays in S(1) are not in main memory
    assert program.traffic() == 12 * 2 * 8 * 128 * 2 + 2 * 8 * 128 * 2 + scalars


def test_a_loop_of_unknown_length_counts_once():
    text = NO_TRIP_COUNT.replace("direction=LT", "direction=NE")
    assert {c.kind: c.count for c in hlo.Program(text).collectives()} == {"all-gather": 1, "all-reduce": 1}


SLICES = """HloModule jit_f, num_partitions=8

ENTRY %main (p: f32[128,1024]) -> f32[128,1024] {
  %p = f32[128,1024]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[128,1024]{1,0}, u32[], token[]) send(%p, %after-all), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1:3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[128,1024]{1,0}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1:3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[128,1024]{1,0} get-tuple-element(%recv), index=0
}
"""


def test_transfers_between_slices():
    (found,) = hlo.Program(SLICES).transfers()
    assert (found.kind, found.count, found.group, found.bytes) == ("all-reduce", 1, 3, 128 * 1024 * 4)
    assert found.wire_bytes == pytest.approx(2 * 2 / 3 * 128 * 1024 * 4)
    assert not hlo.Program(SLICES).collectives()
    assert hlo._count("1,2") == 2 and hlo._count("0:3,7") == 5
