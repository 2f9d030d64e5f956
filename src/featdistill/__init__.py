"""featdistill: feature distillation for vision backbones (Wei et al. 2022, arXiv 2205.14141).

The commands are functions here too, and take the same names:

    import featdistill

    result = featdistill.distill(
        teacher="timm/vit_base_patch16_224.dino", student="vit-b", data="images", out="runs/d"
    )
    model = featdistill.load_backbone(result.export)

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load_backbone": "featdistill.models.load",
    "Backbone": "featdistill.models.backbone",
    "Features": "featdistill.core.types",
    "FeatDistillError": "featdistill.core.errors",
    "capture_attention": "featdistill.diagnostics.capture",
    "check": "featdistill.tasks.api",
    "compare": "featdistill.tasks.api",
    "curvature": "featdistill.tasks.api",
    "diagnose": "featdistill.tasks.api",
    "distill": "featdistill.tasks.api",
    "export": "featdistill.tasks.api",
    "features": "featdistill.tasks.api",
    "finetune": "featdistill.tasks.api",
    "knn": "featdistill.tasks.api",
    "landscape": "featdistill.tasks.api",
    "predict": "featdistill.tasks.api",
    "pretrain": "featdistill.tasks.api",
    "probe": "featdistill.tasks.api",
    "quickstart": "featdistill.tasks.api",
    "segment": "featdistill.tasks.api",
    "write_report": "featdistill.tasks.api",
}
__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from featdistill.core.errors import FeatDistillError
    from featdistill.core.types import Features
    from featdistill.diagnostics.capture import capture_attention
    from featdistill.models.backbone import Backbone
    from featdistill.models.load import load_backbone
    from featdistill.tasks.api import (
        check,
        compare,
        curvature,
        diagnose,
        distill,
        export,
        features,
        finetune,
        knn,
        landscape,
        predict,
        pretrain,
        probe,
        quickstart,
        segment,
        write_report,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featdistill' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
