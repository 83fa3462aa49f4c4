"""The peak of matrix products of a training device: what MFU is a share of.

FLOP/s without sparsity, from NVIDIA's data sheets and architecture papers (figures that a sheet
gives with sparsity are halved). In float32 torch does not use TF32 unless it is asked to, and we do
not ask: those are the peaks of plain FP32. Of `bfloat16` it is the tensor cores with sums in FP32,
which on GeForce cards is half of the advertised FP16 rate.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """TFLOP/s of one kind of device."""

    name: str  # a pattern that is all of `torch.cuda.get_device_name()`, without the maker
    bfloat16: float
    float32: float


PEAKS = (
    # Blackwell data sheet, columns HGX B200 and GB200 NVL72; HGX B100: 28 PFLOPS of 8, sparse
    Peak(r"B200", 2250, 75),
    Peak(r"GB200", 2500, 80),
    Peak(r"B100", 1750, 60),
    # H100 data sheet: SXM, PCIe, NVL. SXM modules have HBM3 in their names, GH200 the same chip.
    Peak(r"H100( 80GB HBM3|-SXM5-\d+GB)|GH200 (120|480)GB", 989.4, 67),
    Peak(r"H100 (PCIe|80GB HBM2e)", 756, 51),
    Peak(r"H100 NVL", 835, 60),
    # H200 data sheet: SXM, NVL
    Peak(r"H200", 989.4, 67),
    Peak(r"H200 NVL", 835, 60),
    # H800 and H20: NVIDIA's sheets for China; the H800 is slower in FP64 and NVLink only
    Peak(r"H800", 989.4, 67),
    Peak(r"H800 PCIe", 756, 51),
    Peak(r"H20(-3e)?", 148, 44),
    # A100 data sheet: PCIe and SXM alike; the A800 is slower in NVLink only
    Peak(r"A[18]00-(SXM4|SXM|PCIE)-\d+GB|A[18]00 80GB PCIe|A800 40GB( Active| PCIe)", 312, 19.5),
    Peak(r"A30", 165, 10.3),
    Peak(r"A40", 149.7, 37.4),
    Peak(r"RTX A6000", 154.8, 38.7),  # GA102 paper 2.0, appendix C
    Peak(r"A10", 125, 31.2),
    Peak(r"A10G", 70, 35),  # of AWS: half the tensor cores' rate of an A10
    Peak(r"L40S", 362.05, 91.6),
    Peak(r"L40", 181.05, 90.5),
    Peak(r"L4", 121, 30.3),
    Peak(r"RTX 6000 Ada Generation", 364.2, 91.1),
    # Papers of GA102, AD102 and the RTX Blackwell architecture, appendix A, "FP32 accumulate"
    Peak(r"GeForce RTX 3090", 71, 35.6),
    Peak(r"GeForce RTX 4090", 165.2, 82.6),
    Peak(r"GeForce RTX 5090", 209.5, 104.8),
    # These have no tensor cores for bfloat16: the peak is that of FP16, and a run stays far below
    Peak(r"V100-SXM2-\d+GB|V100-SXM3-\d+GB", 125, 15.7),
    Peak(r"V100-PCIE-\d+GB", 112, 14),
    Peak(r"V100S-PCIE-\d+GB", 130, 16.4),
    Peak(r"T4", 65, 8.1),
)
MAKER = re.compile(r"^(NVIDIA |Tesla )+")


def gpu_peak(name: str, dtype: torch.dtype) -> float:
    """Peak of a GPU by its name, FLOP/s; 0 where it is not known.

    A part of one (MIG), a laptop's and any other variant are not the card: they are not known.

    Args:
        name: of `torch.cuda.get_device_name()`.
        dtype: float32 or bfloat16.
    """
    model = MAKER.sub("", name.strip())
    for peak in PEAKS:
        if re.fullmatch(peak.name, model):
            return 1e12 * (peak.bfloat16 if dtype == torch.bfloat16 else peak.float32)
    return 0.0


def peak_flops(device: str, dtype: torch.dtype, threads: int) -> float:
    """Peak of one training device, FLOP/s: by its name, or measured on a CPU in 0.2 s. 0 where it
    is not known.

    Args:
        device: cuda or cpu.
        dtype: float32 or bfloat16.
        threads: of a CPU.
    """
    if device == "cuda":
        return gpu_peak(torch.cuda.get_device_name(), dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = 0.0
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 2048 * 1024 * 1024 / (time.perf_counter() - begin))
    torch.set_num_threads(before)
    return best
