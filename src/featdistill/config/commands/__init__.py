"""One schema a command, with the short names of its everyday options."""

from __future__ import annotations

from featdistill.config.commands.base import (
    Command,
    EvalRunConfig,
    EvalViewConfig,
)
from featdistill.config.commands.bench import BenchConfig
from featdistill.config.commands.comparison import (
    CompareConfig,
)
from featdistill.config.commands.curvature import CurvatureConfig
from featdistill.config.commands.diagnostics import DiagnoseConfig, LandscapeConfig, LossConfig
from featdistill.config.commands.distillation import (
    CheckConfig,
    CheckRunConfig,
    DistillConfig,
    DistillRunConfig,
)
from featdistill.config.commands.evaluation import (
    FeaturesConfig,
    FeaturesRunConfig,
    KnnCommandConfig,
    PredictConfig,
)
from featdistill.config.commands.probing import ProbeCommandConfig
from featdistill.config.commands.segmentation import SegmentConfig
from featdistill.config.commands.training import (
    FinetuneConfig,
    PretrainConfig,
)
from featdistill.config.commands.utilities import (
    ExportConfig,
    ModelsConfig,
    QuickstartConfig,
    RecipesConfig,
    ReportConfig,
)

COMMANDS: dict[str, type[Command]] = {
    "quickstart": QuickstartConfig,
    "check": CheckConfig,
    "distill": DistillConfig,
    "compare": CompareConfig,
    "finetune": FinetuneConfig,
    "probe": ProbeCommandConfig,
    "knn": KnnCommandConfig,
    "predict": PredictConfig,
    "features": FeaturesConfig,
    "segment": SegmentConfig,
    "diagnose": DiagnoseConfig,
    "landscape": LandscapeConfig,
    "curvature": CurvatureConfig,
    "pretrain": PretrainConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "models": ModelsConfig,
    "recipes": RecipesConfig,
    "bench": BenchConfig,
}

__all__ = [
    "COMMANDS",
    "BenchConfig",
    "CheckConfig",
    "CheckRunConfig",
    "Command",
    "CompareConfig",
    "CurvatureConfig",
    "DiagnoseConfig",
    "DistillConfig",
    "DistillRunConfig",
    "EvalRunConfig",
    "EvalViewConfig",
    "ExportConfig",
    "FeaturesConfig",
    "FeaturesRunConfig",
    "FinetuneConfig",
    "KnnCommandConfig",
    "LandscapeConfig",
    "LossConfig",
    "ModelsConfig",
    "PredictConfig",
    "PretrainConfig",
    "ProbeCommandConfig",
    "QuickstartConfig",
    "RecipesConfig",
    "ReportConfig",
    "SegmentConfig",
]
