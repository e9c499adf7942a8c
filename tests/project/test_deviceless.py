"""What `python -m benchmarks.deviceless` counts, on modules small enough to count by hand."""

import jax
import pytest

from benchmarks.deviceless import __main__ as command
from benchmarks.deviceless import devices
from benchmarks.deviceless.hlo import traffic

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def counted(text):
    """For each kernel how often it runs, what it reads and what it writes."""
    return {k.name: (k.runs, k.read, k.written) for k in traffic(text).kernels}


def test_a_fusion_reads_its_operands_and_writes_its_result():
    text = (
        ADD
        + """
%fused (p: f32[4,8], row: f32[4]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %row = f32[4]{0} parameter(1)
  %wide = f32[4,8]{1,0} broadcast(%row), dimensions={0}
  ROOT %product = f32[4,8]{1,0} multiply(%p, %wide), metadata={op_name="f(x)/mul"}
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %sums = f32[4]{0} reduce(%x, %zero), dimensions={1}, to_apply=%add
  %view = f32[32]{0} bitcast(%x)
  %back = f32[4,8]{1,0} bitcast(%view)
  ROOT %out = f32[4,8]{1,0} fusion(%back, %sums), kind=kLoop, calls=%fused
}
"""
    )
    assert counted(text) == {"sums": (1, 4 * 32 + 4, 4 * 4), "out": (1, 4 * 32 + 4 * 4, 4 * 32)}
    found = traffic(text)
    assert (found.floor, found.bytes, found.launches) == (256, 132 + 16 + 144 + 128, 2)
    assert found.exact


def test_types_tuples_and_memories():
    text = """
ENTRY %main (x: bf16[8], y: pred[8]) -> (f8e4m3fn[8], (s4[8], c64[2])) {
  %x = bf16[8]{0} parameter(0)
  %y = pred[8]{0:T(128)} parameter(1)
  %near = bf16[8]{0:T(256)S(1)} copy(%x)
  %made = (f8e4m3fn[8]{0}, (s4[8]{0}, c64[2]{0}), /*index=2*/token[]) custom-call(%near, %y), \
custom_call_target="kernel (of mine)"
  %first = f8e4m3fn[8]{0} get-tuple-element(%made), index=0
  %rest = (s4[8]{0}, c64[2]{0}) get-tuple-element(%made), index=1
  ROOT %out = (f8e4m3fn[8]{0}, (s4[8]{0}, c64[2]{0})) tuple(%first, %rest)
}
"""
    assert counted(text) == {"near": (1, 16, 0), "made": (1, 8, 8 + 4 + 16)}
    assert traffic(text).floor == 16 + 8 + 28


def test_slices_and_gathers_read_what_they_take():
    text = """
%fused (table: f32[100], bitten: f32[100], whole: f32[100], i: s32[]) -> f32[10] {
  %table = f32[100]{0} parameter(0)
  %square = f32[10,10]{1,0} bitcast(%table)
  %i = s32[] parameter(3)
  %row = f32[1,10]{1,0} dynamic-slice(%square, %i, %i), dynamic_slice_sizes={1,10}
  %taken = f32[10]{0} bitcast(%row)
  %bitten = f32[100]{0} parameter(1)
  %twice = f32[100]{0} add(%bitten, %bitten)
  %bite = f32[10]{0} slice(%twice), slice={[0:10]}
  %whole = f32[100]{0} parameter(2)
  %cut = f32[10]{0} slice(%whole), slice={[90:100]}
  %zero = f32[] constant(0)
  %total = f32[] reduce(%whole, %zero), dimensions={0}, to_apply=%add
  %totals = f32[10]{0} broadcast(%total), dimensions={}
  %ab = f32[10]{0} add(%taken, %bite)
  %cd = f32[10]{0} add(%cut, %totals)
  ROOT %out = f32[10]{0} add(%ab, %cd)
}

ENTRY %main (a: f32[100], b: f32[100], c: f32[100], i: s32[]) -> f32[3] {
  %a = f32[100]{0} parameter(0)
  %b = f32[100]{0} parameter(1)
  %c = f32[100]{0} parameter(2)
  %i = s32[] parameter(3)
  %part = f32[10]{0} fusion(%a, %b, %c, %i), kind=kLoop, calls=%fused
  %places = s32[3,1]{1,0} iota(), iota_dimension=0
  ROOT %some = f32[3]{0} gather(%part, %places), offset_dims={}, slice_sizes={1}
}
"""
    assert counted(ADD + text) == {
        "part": (1, 4 * (10 + 10 + 100 + 1), 40),
        "places": (1, 0, 12),
        "some": (1, 12 + 12, 12),
    }


UPDATE = """
%fused (big: f32[8,16], new: f32[1,16], i: s32[]) -> (f32[8,16], f32[1,16]) {
  %big = f32[8,16]{1,0} parameter(0)
  %new = f32[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %old = f32[1,16]{1,0} dynamic-slice(%big, %i, %i), dynamic_slice_sizes={1,16}
  %sum = f32[1,16]{1,0} add(%old, %new)
  %updated = f32[8,16]{1,0} dynamic-update-slice(%big, %sum, %i, %i)
  %view = f32[8,16]{1,0} bitcast(%updated)
  ROOT %both = (f32[8,16]{1,0}, f32[1,16]{1,0}) tuple(%view, %sum)
}

%body (state: (s32[], f32[8,16], f32[1,16])) -> (s32[], f32[8,16], f32[1,16]) {
  %state = (s32[], f32[8,16]{1,0}, f32[1,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %big = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %new = f32[1,16]{1,0} get-tuple-element(%state), index=2
  %step = (f32[8,16]{1,0}, f32[1,16]{1,0}) fusion(%big, %new, %i), kind=kLoop, calls=%fused
  %next_big = f32[8,16]{1,0} get-tuple-element(%step), index=0
  %next = f32[1,16]{1,0} get-tuple-element(%step), index=1
  %one = s32[] constant(1)
  %count = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[1,16]{1,0}) tuple(%count, %next_big, %next)
}

%condition (state: (s32[], f32[8,16], f32[1,16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}, f32[1,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(8)
  ROOT %more = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x: f32[8,16], new: f32[1,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %new.1 = f32[1,16]{1,0} parameter(1)
  %start = s32[] constant(0)
  %kept = f32[8,16]{1,0} copy(%x)
  %init = (s32[], f32[8,16]{1,0}, f32[1,16]{1,0}) tuple(%start, %kept, %new.1)
  %loop = (s32[], f32[8,16]{1,0}, f32[1,16]{1,0}) while(%init), condition=%condition, body=%body\
BACKEND
  ROOT %done = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_an_update_in_a_loop_writes_its_slice_in_place():
    known = ', backend_config={"known_trip_count":{"n":"8"},"known_init_step":{"init":"0"}}'
    text = UPDATE.replace("BACKEND", known)
    assert counted(text) == {
        "kept": (1, 512, 512),
        "step": (8, 64 + 64 + 4, 64 + 64),
        "count": (8, 4 + 4, 4),
    }
    assert traffic(text).launches == 17
    assert traffic(text).exact


def test_a_loop_of_unknown_length_gives_a_lower_bound():
    found = traffic(UPDATE.replace("BACKEND", ""))
    assert not found.exact
    assert found.launches == 3
    assert str(command.cost(found, 512, 512)).startswith("≥ ")


def test_an_update_of_what_the_fusion_makes_writes_all_of_it():
    text = """
%fused (new: f32[1,16], i: s32[]) -> f32[8,16] {
  %new = f32[1,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = f32[] constant(0)
  %zeros = f32[8,16]{1,0} broadcast(%zero), dimensions={}
  ROOT %out = f32[8,16]{1,0} dynamic-update-slice(%zeros, %new, %i, %i)
}

ENTRY %main (new: f32[1,16], i: s32[]) -> f32[8,16] {
  %new = f32[1,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %all = f32[8,16]{1,0} fusion(%new, %i), kind=kLoop, calls=%fused
}
"""
    assert counted(text) == {"all": (1, 64 + 4, 512)}


def test_a_scatter_reads_and_writes_the_entries_it_updates():
    text = """
ENTRY %main (x: f32[100], i: s32[5,1], new: f32[5]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %i = s32[5,1]{1,0} parameter(1)
  %new = f32[5]{0} parameter(2)
  ROOT %out = f32[100]{0} scatter(%x, %i, %new), update_window_dims={}, to_apply=%add
}
"""
    assert counted(ADD + text) == {"out": (1, 20 + 20 + 20, 20)}


def test_a_product_of_matrices_does_not_write_its_scratch():
    text = """
ENTRY %main (x: f32[4,8], w: f32[8,2]) -> f32[4,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[8,2]{1,0} parameter(1)
  %gemm = (f32[4,2]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"
  ROOT %out = f32[4,2]{1,0} get-tuple-element(%gemm), index=0
}
"""
    assert counted(text) == {"gemm": (1, 4 * (32 + 16), 4 * 8)}
    assert traffic(text).kernels[0].kind == "__cublas$gemm"


def test_calls_branches_and_asynchronous_pairs():
    text = """
%callee (a: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} parameter(0)
  ROOT %negative = f32[8]{0} negate(%a.1)
}

%cheap (a: f32[8]) -> f32[8] {
  ROOT %a.2 = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8], which: s32[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %which = s32[] parameter(1)
  %called = f32[8]{0} call(%x), to_apply=%callee
  %chosen = f32[8]{0} conditional(%which, %called, %called), \
branch_computations={%cheap, %callee}
  %moved = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%chosen)
  %there = f32[8]{0:S(1)} copy-done(%moved)
  %sent = ((f32[8]{0:S(1)}), f32[2]{0}, s32[]) slice-start(%there), slice={[0:2]}
  %part = f32[2]{0} slice-done(%sent)
  %run = ((f32[2]{0}), f32[8]{0}, s32[]) async-start(%part), calls=%callee
  %still = ((f32[2]{0}), f32[8]{0}, s32[]) async-update(%run)
  ROOT %out = f32[8]{0} async-done(%still)
}
"""
    kernels = [(k.name, k.read, k.written) for k in traffic(text).kernels]
    negative = ("negative", 32, 32)
    assert kernels == [negative, negative, ("moved", 32, 0), ("sent", 0, 8), negative]


def test_what_xla_writes_for_this_machine_is_read():
    def scan(x):
        return jax.lax.scan(lambda total, row: (total + row.sum(), row * 2), 0.0, x)

    x = jax.ShapeDtypeStruct((7, 300), "float32")
    found = traffic(jax.jit(scan).lower(x).compile().as_text())
    assert found.floor == 4 * (2 * 7 * 300 + 1)
    assert found.bytes >= found.floor


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        traffic("HloModule empty\n")


# ------------------------------------------------------------------------------------- command


@pytest.fixture
def here(monkeypatch):
    (device,) = jax.devices("cpu")[:1]
    sharding = jax.sharding.SingleDeviceSharding(device)
    monkeypatch.setattr(command, "DEVICES", {"h100": lambda: devices.Device("here", sharding)})


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(command, "ROWS", command.ROWS[:3])
    monkeypatch.setattr(command, "QUICK_ROW_SIZES", ((8, 16),))
    monkeypatch.setattr(command, "LAYER_SIZES", ((8, 4, 16),))
    monkeypatch.setattr(command, "ATTENTION_SIZES", ((24, 4, 5),))
    monkeypatch.setattr(command, "DTYPES", ("float32",))


@pytest.mark.usefixtures("here", "small")
def test_the_command_prints_a_table_and_keeps_the_programs(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert command.main(["--quick", "--markdown", "--dump", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("|")]
    programs = 2 * (len(command.ROWS) + len(command.LAYERS) + len(command.ATTENTION))
    assert len(lines) == programs + 6
    assert lines[0].startswith("| here, float32 |  | floor | 8×16 |")
    # Three queries and five keys of eight heads and four features; the scores are the unit.
    floor = (3 + 5 + 5 + 3) * 8 * 4 / (3 * 8 * 5)
    of_attention = [line.split(" | ") for line in lines if "| attention of 8 heads |" in line]
    assert [words[2] for words in of_attention] == [f"{floor:.1f}"] * 2
    assert printed.err == ""
    files = list(tmp_path.iterdir())
    assert len(files) == programs
    assert all(traffic(file.read_text()).launches for file in files)


@pytest.mark.parametrize(
    ("device", "package"), [("h100", "jax-cuda12-plugin"), ("tpu", "jax[tpu]")]
)
def test_a_missing_compiler_is_named(device, package, monkeypatch, capsys):
    monkeypatch.setattr(devices, "_version", lambda name: None)
    assert command.main(["--device", device]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{package}==" in printed.err
