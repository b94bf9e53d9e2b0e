"""Copies in HLO text, and ptxas' reports."""

import pytest

from pallas_kernels.aot import memory, ptxas

HLO = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.2: bf16[4096,4096]) -> bf16[4096,4096] {
  %param_0.2 = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.9 = bf16[4096,4096]{0,1:T(8,128)(2,1)} copy(%param_0.2)
}

%body.7 (arg: (s32[], bf16[2,64,2,8,16,128])) -> (s32[], bf16[2,64,2,8,16,128]) {
  %arg = (s32[]{:T(128)}, bf16[2,64,2,8,16,128]{5,4,3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %get.1 = bf16[2,64,2,8,16,128]{5,4,3,2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %copy.3 = bf16[2,64,2,8,16,128]{5,4,3,2,1,0:T(8,128)(2,1)} copy(%get.1)
  ROOT %tuple.4 = (s32[]{:T(128)}, bf16[2,64,2,8,16,128]{5,4,3,2,1,0:T(8,128)(2,1)}) tuple(%get.2, %copy.3)
}

ENTRY %main.4 (x.1: bf16[4096,4096], small.1: f32[8,128]) -> bf16[4096,4096] {
  %x.1 = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %copy_fusion = bf16[4096,4096]{0,1:T(8,128)(2,1)} fusion(%x.1), kind=kLoop, calls=%fused_computation.1
  %add_copy_fusion = bf16[4096,4096]{0,1:T(8,128)(2,1)} fusion(%x.1), kind=kLoop, calls=%fused_computation.2
  %copy-start = (s8[4096,4096]{1,0:T(32,128)(4,1)S(1)}, s8[4096,4096]{1,0}, u32[]{:S(2)}) copy-start(%w.1)
  %copy-start.1 = (s8[4096,4096]{1,0:T(32,128)(4,1)}, s8[4096,4096]{1,0}, u32[]{:S(2)}) copy-start(%w.1)
  %copy-done.1 = s8[4096,4096]{1,0:T(32,128)(4,1)} copy-done(%copy-start.1)
  %copy.5 = f32[8,128]{0,1:T(8,128)} copy(%small.1)
  ROOT %transpose.1 = bf16[4096,4096]{1,0:T(8,128)(2,1)} transpose(%copy_fusion), dimensions={1,0}
}
"""

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for kernel_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 140 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 30.845 ms
something else
ptxas info    : Compiling entry function 'other_kernel' for 'sm_90a'
ptxas info    : Function properties for other_kernel
    468 bytes stack frame, 516 bytes spill stores, 468 bytes spill loads
ptxas info    : Used 232 registers, used 1 barriers
"""


def test_large_copies_are_found_in_loop_bodies_too():
    found = {copy.name: copy for copy in memory.copies(HLO, 1 << 20)}
    assert set(found) == {"copy.3", "copy_fusion", "copy-start.1", "transpose.1"}
    assert found["copy.3"].computation == "body.7"
    assert found["copy.3"].num_bytes == 2 * 64 * 2 * 8 * 16 * 128 * 2
    assert found["copy-start.1"].num_bytes == 4096 * 4096


def test_small_copies_count_when_asked_for():
    assert "copy.5" in {copy.name for copy in memory.copies(HLO, 4096)}
    assert "copy.5" not in {copy.name for copy in memory.copies(HLO, 4097)}


@pytest.mark.parametrize(("dtype", "dims", "num_bytes"), [("bf16", "8,128", 2048), ("f32", "", 4), ("s4", "3", 2),
                                                         ("f8e4m3fn", "7", 7)])  # fmt: skip
def test_bytes_of_an_array(dtype, dims, num_bytes):
    assert memory.array_bytes(dtype, dims) == num_bytes


def test_ptxas_report():
    first, second = ptxas.read(PTXAS)
    assert (first.name, first.architecture, first.registers) == ("kernel_mosaic_gpu_kernel", "sm_90a", 140)
    assert (first.spill_stores, first.static_shared_memory) == (0, 1)
    assert (second.stack_frame, second.spill_stores, second.spill_loads, second.registers) == (468, 516, 468, 232)
    assert second.static_shared_memory == 0


def test_half_a_report_is_an_error():
    with pytest.raises(ValueError, match="not complete"):
        ptxas.read(PTXAS.replace("Used 232 registers", ""))
