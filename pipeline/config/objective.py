"""What the student learns: the loss, its teacher, or a frozen one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.section import Fraction, NonNegative, Range, Section


class Loss(Section):
    """The objective (DINOv2 paper, section 4)."""

    dino_weight: NonNegative = Field(1.0, description="weight of the DINO terms")
    ibot_weight: NonNegative = Field(1.0, description="weight of the iBOT term")
    koleo_weight: NonNegative = Field(0.1, description="weight of the KoLeo term")
    centring: Literal["softmax", "sinkhorn"] = Field(
        "softmax", description="how targets are balanced; sinkhorn in the long recipe"
    )
    centre_momentum: float = Field(0.9, ge=0, lt=1, description="EMA of the softmax centre")
    student_temperature: float = Field(0.1, gt=0, description="temperature of the student")
    mask_probability: Fraction = Field(0.5, description="share of global crops that are masked")
    mask_ratio: Range = Field((0.1, 0.5), description="share of patches hidden in a masked crop")

    @model_validator(mode="after")
    def _something(self) -> Loss:
        if not self.dino_weight and not self.ibot_weight:
            raise ValueError("dino_weight and ibot_weight are both 0: nothing would be learnt")
        if self.mask_ratio[0] > self.mask_ratio[1]:
            raise ValueError("mask_ratio must be low, high")
        return self


class Teacher(Section):
    """The EMA of the student and its temperature."""

    momentum: Fraction = Field(0.992, description="EMA momentum at the start; .994 long recipe")
    momentum_end: Fraction = Field(1.0, description="EMA momentum at the end")
    temperature: float = Field(0.04, gt=0, description="temperature at the start")
    temperature_end: float = Field(0.07, gt=0, description="temperature after its warm-up")
    temperature_warmup: Fraction = Field(
        0.3, description="share of the steps with rising temperature; .06 long recipe"
    )


class Distill(Section):
    """Learning from a frozen, larger teacher (DINOv2 paper, section 5)."""

    teacher: str = Field(
        "", description="run folder or checkpoint of the frozen teacher; empty: self-distillation"
    )
