"""The Triton kernels: their numbers in the interpreter, and their code for GPUs, without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.loss.dino import dino_span
from pipeline.loss.form import Kernels, fused
from pipeline.loss.prototypes import Span, cross_entropy
from pipeline.loss.target import sinkhorn_targets, softmax_targets

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# What Triton is given: the goldens and all that the eager form is held against.
INTERPRETED = ["loss/interpreted", "loss/test_terms", "loss/test_target", "loss/test_row_weights"]
INTERPRETED += ["train/test_step_golden", "train/test_image_weights"]
POINTERS = {"row", "prototype", "weight", "partial", "length", "masses", "upstream", "loss"}
POINTERS |= {"sums", "entropy"}
KERNELS: tuple[Kernels, Kernels] = ("triton", "eager")
INTEGERS = {"first", "images", "blocks", "rows", "splits"}


@pytest.mark.slow
def test_all_losses_in_the_interpreter() -> None:
    """By `auto`, which takes Triton where it is interpreted."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "not gpu"]
    command += [f"tests/{name}.py" for name in INTERPRETED]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", ran.stdout)[-1]) > 90


def test_the_form_that_is_asked_for() -> None:
    x = torch.randn(4, 3)
    assert not fused("auto", x) and not fused("eager", x)
    with pytest.raises(PipelineError) as error:
        softmax_targets([x], torch.zeros(3), 0.1, kernels="triton")
    assert error.value.what.startswith("train.loss_kernels is triton, but the logits are on cpu")
    assert "train.loss_kernels=auto" in error.value.hint


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("prototypes", [129, 65536])
def test_on_a_gpu_they_are_the_eager_form(
    prototypes: int, centring: str, dtype: torch.dtype
) -> None:
    """On the last GPU, which is not the current one where there are several."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, device=device)

    images, patches = 5, 37
    teacher, student = (draw(rows, prototypes).to(dtype) for rows in (10 + patches, 40 + patches))
    weights = (torch.arange(images, device=device) != 1).float()
    centre, each = draw(prototypes), draw(patches).abs()
    results: list[list[torch.Tensor]] = []
    for kernels in KERNELS:
        logits, rows = [teacher[:10], teacher[10:]], [weights.repeat(2), None]
        crops, hidden = (
            softmax_targets(logits, centre, 0.07, rows, kernels)
            if centring == "softmax"
            else sinkhorn_targets(logits, 0.07, 3, rows, kernels)
        )
        leaf = student.clone().requires_grad_()
        spans = [dino_span(crops, local_crops=6), Span(hidden, each, (2,), first=40)]
        sums = cross_entropy(leaf, spans, 3, 0.1, kernels=kernels)
        sums.backward(torch.tensor([1.0, 2.0, 0.5], device=device))
        numbers = [sums.detach(), *crops.mean(), crops.entropy(), crops.prototypes_used()]
        results.append([*numbers, hidden.entropy(), leaf.grad.float()])
    *numbers, gradient = results[0]
    *others, other = results[1]
    for own, theirs in zip(numbers, others, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    rounding = 4 * torch.finfo(dtype).eps  # the eager form rounds the gradient twice
    torch.testing.assert_close(gradient, other, rtol=max(rounding, 1e-3), atol=1e-6)


def compiled(kernel: Any, constants: dict[str, Any], logits: str, arch: int, warps: int) -> Any:
    """What Triton hands to a GPU; pointers are aligned as torch aligns them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        pointer = "*fp32" if name in POINTERS else "*i64" if name == "likeliest" else f"*{logits}"
        kind = "i32" if name in INTEGERS else "fp32" if name in ("scale", "sharp") else pointer
        signature[name] = "constexpr" if name in constants else kind
        if signature[name].startswith("*"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": warps})


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills_and_read_16_bytes_at_once(
    arch: int, logits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.loss import row_kernels as of_rows
    from pipeline.loss import target_kernels as of_targets

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    cases: list[tuple[Any, dict[str, Any], int]] = []
    for terms, targets in (((0, 0, *[1] * 8), 2), ((2,), 1)):
        shared = len(terms) > 1
        sizes = {"K": 65536, "G": targets, "OTHERS": shared, "ROWS": 16}
        sizes |= {"BLOCK": of_rows.TILE // 16}
        cases.append((of_rows.scan_kernel, sizes | {"CROPS": len(terms)}, of_rows.WARPS))
        cases.append((of_rows.gradient_kernel, sizes | {"TERMS": terms}, of_rows.WARPS))
    tile = {"K": 65536, "ROWS": of_targets.ROWS, "BLOCK": of_targets.BLOCK}
    facts = tile | {"SUMS": True, "WEIGHTED": True}
    cases.append((of_targets.facts_kernel, facts, of_rows.WARPS))
    cases.append((of_targets.column_kernel, tile, of_rows.WARPS))
    cases.append((of_rows.join_kernel, {"BLOCK": of_rows.JOINED}, 4))
    cases.append((of_targets.join_facts_kernel, {"BLOCK": of_rows.JOINED}, 4))
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    for kernel, constants, warps in cases:
        binary = compiled(kernel, constants, logits, arch, warps)
        code = tmp_path / "kernel.cubin"
        code.write_bytes(binary.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", code], capture_output=True, text=True).stdout
        usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
        print(kernel.__name__, arch, logits, usage)
        assert usage["LOCAL"] == 0 == usage["STACK"], (kernel.__name__, usage)
        assert usage["REG"] <= 128, (kernel.__name__, usage)  # two programs a multiprocessor
        if "K" in constants:
            assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", binary.asm["ptx"]), kernel.__name__
