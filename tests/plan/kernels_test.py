"""Cycles of a kernel: its bundles, times the trips of the loops around them."""

from internvl_jax.plan import kernels

# Two bundles, a loop of 5 with 2 bundles of its own and an inner one of 3 × 2, then one bundle.
SCHEDULE = """
     0   :  { %a = vadd }
   0x1   :  { %b = vadd }
   0x2   : > { %c = vadd }
   0x3   : >> { %d = vadd }
   0x4   : >> { %e = ssub ; %f = totalorder %g, 3 /* loop exit test */ }
   0x5   : > { %h = vadd ; %i = totalorder %j, 5 /* loop exit test */ }
   0x6   :  { %k = vst }
"""


def test_loops_multiply_what_stands_in_them():
    assert kernels.issue_cycles(SCHEDULE) == 2 + 5 * (2 + 3 * 2) + 1


def test_an_empty_bundle_belongs_to_its_loop():
    delayed = SCHEDULE.replace("   0x4", "   0x31   :  {}\n   0x4")
    assert kernels.issue_cycles(delayed) == 2 + 5 * (2 + 3 * 3) + 1


def test_a_copy_that_was_moved_into_a_loop_belongs_to_it():
    copy = "   0x31   : > { %l = smov (%p), 0 /* copy for cssa */ }\n"
    assert kernels.issue_cycles(SCHEDULE.replace("   0x4", f"{copy}   0x4")) == 2 + 5 * (2 + 9) + 1
    # Where the next bundle begins a loop, it stands between two.
    begins = SCHEDULE.replace("   0x5   :", f"{copy}   0x4 LB: >> {{ %m = vadd }}\n   0x5   :")
    assert kernels.issue_cycles(begins) == 2 + 5 * (2 + 6 + 2) + 1


def test_only_the_programs_kernels_count(tmp_path):
    for name in ("10-attention.1-03-final_bundles.txt", "11-fusion.7-03-final_bundles.txt"):
        (tmp_path / name).write_text(SCHEDULE)
    text = call("attention.1", "first")
    assert kernels.cycles(tmp_path, text) == {"attention.1": 43}
    kernels.clear(tmp_path)
    assert kernels.cycles(tmp_path, text) == {}


def test_a_program_may_have_no_kernel(tmp_path):
    (tmp_path / "11-fusion.7-03-final_bundles.txt").write_text(SCHEDULE)
    assert kernels.cycles(tmp_path, "HloModule plain\n") == {}


def test_equal_kernels_share_a_schedule(tmp_path):
    (tmp_path / "10-attention.1-03-final_bundles.txt").write_text(SCHEDULE)
    text = call("attention.1", "same") + call("attention.2", "same") + call("other.3", "another")
    assert kernels.cycles(tmp_path, text) == {"attention.1": 43, "attention.2": 43}


def test_a_call_of_several_lines_or_without_its_code_counts(tmp_path):
    """JAX's splash attention carries metadata with line breaks."""
    (tmp_path / "10-splash.1-03-final_bundles.txt").write_text(SCHEDULE)
    broken = call("splash.1", "one").replace("backend_config", '"{\n}", backend_config')
    assert kernels.cycles(tmp_path, broken) == {"splash.1": 43}
    bare = '  %splash.1 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"\n'
    assert kernels.cycles(tmp_path, bare) == {"splash.1": 43}


def call(name, body):
    config = f'{{"custom_call_config":{{"body":"{body}"}}}}'
    target = 'custom_call_target="tpu_custom_call"'
    return f"  %{name} = f32[8] custom-call(%x), {target}, backend_config={config}\n"
