"""Peaks of devices by the names that torch gives them."""

from __future__ import annotations

import re

import pytest
import torch

from pipeline.train.speed import peaks

# Names as drivers report them, and bfloat16 TFLOP/s of the data sheet
REAL = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H800": 989.4,
    "NVIDIA H20": 148,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "A100-SXM4-40GB": 312,  # drivers before 470 name no maker
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A800 80GB PCIe": 312,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 181.05,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-32GB": 112,
    "Tesla T4": 65,
}
UNKNOWN = (
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA L400",
    "NVIDIA A1000",
    "NVIDIA A80",
    "NVIDIA H2000",
    "AMD Instinct MI300X",
    "Another",
    "",
)


def test_real_names() -> None:
    assert {name: peaks.gpu_peak(name, torch.bfloat16) / 1e12 for name in REAL} == pytest.approx(
        REAL
    )


def test_what_is_not_the_card_is_not_known() -> None:
    assert {name: peaks.gpu_peak(name, torch.bfloat16) for name in UNKNOWN} == dict.fromkeys(
        UNKNOWN, 0.0
    )


def test_each_name_is_of_one_row() -> None:
    for name in REAL:
        model = peaks.MAKER.sub("", name)
        assert sum(re.fullmatch(peak.name, model) is not None for peak in peaks.PEAKS) == 1, name


def test_float32_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peaks.peak_flops("cuda", torch.float32, 1) == 67e12
    assert peaks.peak_flops("cuda", torch.bfloat16, 1) == 989.4e12


def test_no_row_is_faster_in_float32_than_in_bfloat16() -> None:
    assert all(peak.bfloat16 > peak.float32 for peak in peaks.PEAKS)


def test_the_peak_of_this_cpu_is_a_plausible_number() -> None:
    threads = torch.get_num_threads()
    assert 1e8 < peaks.peak_flops("cpu", torch.float32, 1) < 1e14
    assert torch.get_num_threads() == threads
