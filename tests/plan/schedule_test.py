"""The reading of scheduled programs, on short ones whose times can be worked out by hand."""

import pytest

from internvl_jax.plan import chips, hlo, schedule

V5E = chips.CHIPS["v5e"]
ROW = [(i, 0, 0) for i in range(4)]

PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[1024,256])) -> (s32[], bf16[1024,256]) {
  %p = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %w = bf16[1024,256]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %ag = (bf16[1024,256]{1,0}, bf16[4096,256]{1,0}) all-gather-start(%w), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="gather"}
  %dot = bf16[8,8]{1,0} fusion(%w), kind=kLoop, calls=%mul, \
backend_config={"window_config":{"estimated_cycles":"3000"}}
  %agd = bf16[4096,256]{1,0} all-gather-done(%ag)
  ROOT %out = (s32[], bf16[1024,256]) tuple(%w, %w)
}

%mul (q: bf16[8,8]) -> bf16[8,8] {
  %q = bf16[8,8]{1,0} parameter(0)
  ROOT %m = bf16[8,8]{1,0} multiply(%q, %q)
}

%cond (c: (s32[], bf16[1024,256])) -> pred[] {
  %c = (s32[], bf16[1024,256]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[1024,256]) -> bf16[1024,256] {
  %a = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(0)
  %t = (s32[], bf16[1024,256]) tuple(%a, %a)
  %loop = (s32[], bf16[1024,256]) while(%t), condition=%cond, body=%body
  %ar = f32[1024]{0} all-reduce(%a), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%mul
  ROOT %r = bf16[1024,256]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_an_attribute_may_be_broken_over_lines():
    """The metadata that a Pallas kernel came with has lines of its own, some with braces first."""
    kernel = """  %k = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"blocks":"{}"
}}, metadata={op_name="kernel"}
  %t ="""
    body = hlo.parse(PROGRAM.replace("  %t =", kernel)).computations["main"]
    assert [i.name for i in body] == ["a", "k", "t", "loop", "ar", "r"]
    assert body[1].operands == ("a",) and 'op_name="kernel"' in body[1].attributes


def test_a_loop_multiplies_and_a_transfer_hides_behind_compute():
    read = schedule.read(PROGRAM, V5E, ROW, (4, 1))
    gather, reduce = read.collectives
    # Four chips in an open row: one link; three quarters of 4096 × 256 bf16 arrive at each.
    assert gather.bytes == 12 * 0.75 * 4096 * 256 * 2
    once = 0.75 * 4096 * 256 * 2 / 50e9 + schedule.LATENCY
    compute = 3000 / 1.5e9
    assert gather.seconds == pytest.approx(12 * once)
    assert gather.exposed_seconds == pytest.approx(12 * (once - compute))
    assert gather.exposed_bytes == pytest.approx(gather.bytes * (once - compute) / once)
    assert reduce.bytes == 2 * 0.75 * 4096
    assert reduce.exposed_seconds == reduce.seconds
    assert read.compute_seconds == pytest.approx(12 * compute)
    assert read.seconds == pytest.approx(12 * once + reduce.seconds)
    assert read.bytes_by_kind()["all-reduce"] == (reduce.bytes, reduce.bytes)


def test_a_gather_that_spans_fusions_is_one_transfer():
    """The TPU compiler's own form: a start, a fusion beside which it runs, an end, one channel."""
    part = """
%f{n} (x: bf16[64,128]) -> bf16[256,128] {{
  %x.{n} = bf16[64,128]{{1,0}} parameter(0)
  ROOT %ag.{n} = bf16[256,128]{{1,0}} all-gather(%x.{n}), channel_id=7, \
replica_groups={{{{0,1,2,3}}}}
}}
"""
    main = """
ENTRY %main (a: bf16[64,128]) -> bf16[256,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %s = bf16[256,128]{1,0} fusion(%a), kind=kCustom, calls=%f1
  %c = bf16[256,128]{1,0} fusion(%a), kind=kOutput, calls=%f2, \
backend_config={"estimated_cycles":"9000000"}
  ROOT %d = bf16[256,128]{1,0} fusion(%a), kind=kCustom, calls=%f3
}
"""
    text = "HloModule m\n" + "".join(part.format(n=n) for n in (1, 2, 3)) + main
    read = schedule.read(text, V5E, ROW, (4, 1))
    assert len(read.collectives) == 1
    assert read.collectives[0].exposed_seconds == 0
    assert read.seconds == pytest.approx(9e6 / 1.5e9)


def steps_of_gathers(chains):
    """Computations %f1, %f2, …, each a step of the gather of its chain, all of one channel."""
    return "".join(
        f"""
%f{n} (x: bf16[64,128]) -> bf16[256,128] {{
  %x.{n} = bf16[64,128]{{1,0}} parameter(0)
  ROOT %ag.{n} = bf16[256,128]{{1,0}} all-gather(%x.{n}), channel_id=1, \
replica_groups={{{{0,1,2,3}}}}, frontend_attributes={{chain_id="{chain}"}}
}}
"""
        for n, chain in chains.items()
    )


def test_gathers_of_one_channel_are_told_apart_by_their_chain():
    main = """
ENTRY %main (a: bf16[64,128]) -> bf16[256,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %s = bf16[256,128]{1,0} fusion(%a), kind=kCustom, calls=%f1
  %t = bf16[256,128]{1,0} fusion(%a), kind=kCustom, calls=%f2
  %u = bf16[256,128]{1,0} fusion(%a), kind=kCustom, calls=%f3
  ROOT %d = bf16[256,128]{1,0} fusion(%a), kind=kCustom, calls=%f4
}
"""
    chains = {1: 8, 2: 9, 3: 8, 4: 9}
    text = "HloModule m\n" + steps_of_gathers(chains) + main
    read = schedule.read(text, V5E, ROW, (4, 1))
    assert [c.bytes for c in read.collectives] == [0.75 * 256 * 128 * 2] * 2


def test_a_gather_that_passes_through_a_loop_is_one_transfer():
    """Steps of one begun before the loop lie in its fusions; one begun within it runs each turn."""
    main = """
%body (a: bf16[64,128]) -> bf16[256,128] {
  %b = bf16[64,128]{1,0} parameter(0)
  %t = bf16[256,128]{1,0} fusion(%b), kind=kOutput, calls=%f2, \
backend_config={"estimated_cycles":"1000000"}
  %async-collective-start.1 = bf16[256,128]{1,0} fusion(%b), kind=kCustom, calls=%f3
  ROOT %e = bf16[256,128]{1,0} fusion(%b), kind=kCustom, calls=%f4
}

ENTRY %main (a: bf16[64,128]) -> bf16[256,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %async-collective-start = bf16[256,128]{1,0} fusion(%a), kind=kCustom, calls=%f1
  %w = bf16[256,128]{1,0} while(%a), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"9"}}
  ROOT %d = bf16[256,128]{1,0} fusion(%w), kind=kCustom, calls=%f5
}
"""
    chains = {1: 8, 2: 8, 3: 9, 4: 9, 5: 8}
    text = "HloModule m\n" + steps_of_gathers(chains) + main
    read = schedule.read(text, V5E, ROW, (4, 1))
    assert sorted(c.count for c in read.collectives) == [1, 9]
    assert [c.exposed_seconds for c in read.collectives if c.count == 1] == [0]


def test_what_a_sparse_core_does_runs_beside_the_core():
    text = """HloModule m

%called (x: bf16[64,128], t: token[]) -> bf16[256,128] {
  %t = token[] parameter(1)
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %ag = bf16[256,128]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}
}, execution_thread="sparsecore"

%mul (q: bf16[8,8]) -> bf16[8,8] {
  %q = bf16[8,8]{1,0} parameter(0)
  ROOT %m = bf16[8,8]{1,0} multiply(%q, %q)
}

ENTRY %main (a: bf16[64,128]) -> bf16[256,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %s = ((bf16[64,128]{1,0}, token[]), bf16[256,128]{1,0}) call-start(%a, %ready), \
async_execution_thread="sparsecore", to_apply=%called
  %f = bf16[8,8]{1,0} fusion(%a), kind=kLoop, calls=%mul, \
backend_config={"estimated_cycles":"1500"}
  ROOT %d = bf16[256,128]{1,0} call-done(%s)
}
"""
    read = schedule.read(text, V5E, ROW, (4, 1))
    (gather,) = read.collectives
    sent = 0.75 * 256 * 128 * 2
    assert (gather.kind, gather.bytes) == ("all-gather", sent)
    assert gather.seconds == pytest.approx(sent / 50e9 + schedule.LATENCY)
    assert gather.exposed_seconds == pytest.approx(gather.seconds - 1500 / 1.5e9)
    assert read.seconds == pytest.approx(gather.seconds)
    assert [i.name for i in hlo.parse(text).computations["called"]] == ["t", "x", "ag"]


def test_a_reduce_scatter_written_as_all_reduce_and_slice():
    text = """HloModule m

%f (x: bf16[4096,128]) -> bf16[1024,128] {
  %x = bf16[4096,128]{1,0} parameter(0)
  %ar = bf16[4096,128]{1,0} all-reduce(%x), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%g
  ROOT %ds = bf16[1024,128]{1,0} dynamic-slice(%ar, %x), dynamic_slice_sizes={1024,128}
}

ENTRY %main (a: bf16[4096,128]) -> bf16[1024,128] {
  %a = bf16[4096,128]{1,0} parameter(0)
  ROOT %rs = bf16[1024,128]{1,0} fusion(%a), kind=kCustom, calls=%f
}
"""
    (found,) = schedule.read(text, V5E, ROW, (4, 1)).collectives
    assert (found.kind, found.bytes) == ("reduce-scatter", 0.75 * 4096 * 128 * 2)


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x=1", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("source_target_pairs={{0,1},{1,2}}", [0, 1]),
        ("to_apply=%add", []),
    ],
)
def test_groups_in_all_their_notations(attributes, group):
    assert hlo.first_group(attributes) == group


def test_sizes_hold_the_padding_of_tiles():
    assert hlo.bytes_of("bf16[25,3200]{1,0:T(8,128)(2,1)}") == 32 * 3200 * 2
    assert hlo.bytes_of("f32[3200,25]{0,1:T(8,128)}") == 3200 * 32 * 4  # the first axis is minor
    assert hlo.bytes_of("(f32[2,128]{1,0}, s32[])") == 2 * 128 * 4 + 4
    assert hlo.bytes_of("(f32[2,128]{1,0}, bf16[8]{0})", largest=True) == 1024
    assert hlo.bytes_of("pred[16]{0}") == 16


def test_a_kernel_takes_the_cycles_of_its_own_schedule():
    text = """HloModule m

ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %known = bf16[64,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %unknown = bf16[64,128]{1,0} custom-call(%known), custom_call_target="tpu_custom_call"
}
"""
    read = schedule.read(text, V5E, ROW, (4, 1), {"known": 3_000_000})
    assert read.seconds == read.compute_seconds == pytest.approx(3e6 / 1.5e9)
    assert read.kernels == 1  # whose time nobody knows
