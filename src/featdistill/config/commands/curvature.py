"""The schema of `curvature`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from featdistill.config.commands.diagnostics import LossConfig, LossRunConfig
from featdistill.config.sections import Positive


class CurvatureRunConfig(LossRunConfig):
    """Where a curvature is written and what computes it."""

    precision: Literal["float32", "float64"] = Field(  # type: ignore[assignment]
        "float32", description="float32, or float64 for small models and small eigenvalues"
    )


class CurvatureConfig(LossConfig):
    """How sharply the loss bends around models' weights."""

    summary = "the steepest directions of the loss around models' weights (Hessian)"
    example = (
        "featdistill curvature --model runs/teacher-tuned --model runs/student-tuned "
        "--data LABELLED --out curvature"
    )
    flat = {
        **LossConfig.flat,
        "precision": "run.precision",
        "top": "top",
        "probes": "probes",
        "tolerance": "tolerance",
        "products": "products",
    }

    top: Positive = Field(5, description="eigenvalues to find, from the largest")
    probes: Annotated[int, Field(ge=0)] = Field(
        20, description="random vectors for the trace, each a product; 0: no trace"
    )
    tolerance: float = Field(
        1e-3, gt=0, lt=1, description="residual to reach, as a share of the eigenvalue"
    )
    products: Positive = Field(
        400, description="products with the Hessian that the search for eigenvalues may take"
    )
    run: CurvatureRunConfig

    @field_validator("probes")
    @classmethod
    def _with_an_error(cls, probes: int) -> int:
        if probes == 1:
            raise ValueError("given 1; expected 0, or at least 2: one has no standard error")
        return probes
