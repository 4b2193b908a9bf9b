"""Cycles of a kernel: its bundles, times the trips of the loops around them."""

from internvl_jax.plan import kernels

# Two bundles, a loop of 5 with 3 bundles of its own and an inner one of 3 × 3, then one bundle. Two
# of them have the marks of other places: an empty one, and one that was moved into a loop.
SCHEDULE = """
     0   :  { %a = vadd }
   0x1   :  { %b = vadd }
   0x2 LB: > { %c = vadd }
   0x3 LB: >> { %d = vadd ; %p1_p7 = scmp.ge.s32.totalorder %s2, 3 /* loop exit test */ }
   0x4   : > { %l = smov (%p1_p7), 0 ; %9 = sbr.rel (!%p1_p7) target = $region8 }
   0x5   :  {} /* End region 8 :: End region 45 */
   0x6   : > { %h = vadd ; %p3_p0 = scmp.ge.s32.totalorder %s4, 5 /* loop exit test */ }
   0x7   :  { %7 = sbr.rel (!%p3_p0) target = $region12 } /* End region 4 */
   0x8   :  { %k = sbr.rel (!%p5_p5) target = $region9 } /* End region 9 */
"""
CYCLES = 2 + 5 * (3 + 3 * 3) + 1


def test_loops_multiply_what_stands_in_them():
    assert kernels.issue_cycles(SCHEDULE) == CYCLES


def test_turns_that_only_move_data_do_not_count():
    index = "{ %c = sphi %c, %d /* phi copy :: iteration index, stage = 0 */ }"
    pipelined = SCHEDULE.replace("{ %c = vadd }", index)
    assert kernels.issue_cycles(pipelined) == 2 + (5 - 2) * (3 + 3 * 3) + 1


def test_only_the_programs_kernels_count(tmp_path):
    for name in ("10-attention.1-03-final_bundles.txt", "11-fusion.7-03-final_bundles.txt"):
        (tmp_path / name).write_text(SCHEDULE)
    text = call("attention.1", "first")
    assert kernels.cycles(tmp_path, text) == {"attention.1": CYCLES}
    kernels.clear(tmp_path)
    assert kernels.cycles(tmp_path, text) == {}


def test_a_program_may_have_no_kernel(tmp_path):
    (tmp_path / "11-fusion.7-03-final_bundles.txt").write_text(SCHEDULE)
    assert kernels.cycles(tmp_path, "HloModule plain\n") == {}


def test_equal_kernels_share_a_schedule(tmp_path):
    (tmp_path / "10-attention.1-03-final_bundles.txt").write_text(SCHEDULE)
    text = call("attention.1", "same") + call("attention.2", "same") + call("other.3", "another")
    assert kernels.cycles(tmp_path, text) == {"attention.1": CYCLES, "attention.2": CYCLES}


def test_a_call_of_several_lines_or_without_its_code_counts(tmp_path):
    """JAX's splash attention carries metadata with line breaks."""
    (tmp_path / "10-splash.1-03-final_bundles.txt").write_text(SCHEDULE)
    broken = call("splash.1", "one").replace("backend_config", '"{\n}", backend_config')
    assert kernels.cycles(tmp_path, broken) == {"splash.1": CYCLES}
    bare = '  %splash.1 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"\n'
    assert kernels.cycles(tmp_path, bare) == {"splash.1": CYCLES}


def call(name, body):
    config = f'{{"custom_call_config":{{"body":"{body}"}}}}'
    target = 'custom_call_target="tpu_custom_call"'
    return f"  %{name} = f32[8] custom-call(%x), {target}, backend_config={config}\n"
