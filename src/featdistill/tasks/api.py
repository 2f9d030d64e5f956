"""The commands as functions: the same names, the same defaults, the same errors.

Each takes the command's options as keyword arguments: short names (`batch_size=256`), whole
sections (`optimizer={"weight_decay": 0.1}`), `recipe=` and `config=`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featdistill.config.resolve import resolve
from featdistill.tasks import run_command

if TYPE_CHECKING:
    from featdistill.models.export import Exported
    from featdistill.tasks.check import CheckResult
    from featdistill.tasks.compare import CompareResult
    from featdistill.tasks.curvature import CurvatureResult
    from featdistill.tasks.diagnose_attention import AttentionDiagnosis
    from featdistill.tasks.diagnose_features import FeaturesDiagnosis
    from featdistill.tasks.distill import DistillResult
    from featdistill.tasks.features import FeaturesResult
    from featdistill.tasks.finetune import FinetuneResult
    from featdistill.tasks.knn import KnnResult
    from featdistill.tasks.landscape import LandscapeResult
    from featdistill.tasks.predict import PredictResult
    from featdistill.tasks.pretrain import PretrainResult
    from featdistill.tasks.probe import ProbeResult
    from featdistill.tasks.quickstart import QuickstartResult
    from featdistill.tasks.segment import SegmentResult
    from featdistill.tasks.segment_predict import SegmentPredictResult


def _call(command: str, options: dict[str, Any]) -> Any:
    recipe, config = options.pop("recipe", None), options.pop("config", None)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return run_command(command, resolve(command, plain, recipe=recipe, config=config))


def distill(**options: Any) -> DistillResult:
    """Teach a fresh student the whitened features of a frozen teacher.

    Wants `teacher`, `data` and `out`; see `featdistill distill --help` for the rest.

    Raises:
        FeatDistillError: whatever the command would say in one line.
    """
    return _call("distill", options)


def check(**options: Any) -> CheckResult:
    """What a distillation would do and cost; wants `teacher` and `data`."""
    return _call("check", options)


def finetune(**options: Any) -> FinetuneResult:
    """Fine-tune a classifier; wants `model`, `data` and `out`."""
    return _call("finetune", options)


def pretrain(**options: Any) -> PretrainResult:
    """Make a contrastive teacher; wants `data` and `out`."""
    return _call("pretrain", options)


def probe(**options: Any) -> ProbeResult:
    """Linear probes of frozen features; wants `model` (one or a list), `data` and `out`."""
    return _call("probe", _lists(options))


def knn(**options: Any) -> KnnResult:
    """Nearest-neighbour scores; wants `model` (one or a list) and `data`."""
    return _call("knn", _lists(options))


def predict(**options: Any) -> PredictResult:
    """Classify images; wants `model` and `data`."""
    return _call("predict", options)


def features(**options: Any) -> FeaturesResult:
    """Write the features of images to files; wants `model`, `data` and `out`.

    `what` and `layers` may be one value or a list.
    """
    for name in ("what", "layers"):
        if isinstance(options.get(name), str | int):
            options[name] = str(options[name]).split(",")
    return _call("features", options)


def segment(**options: Any) -> SegmentResult | SegmentPredictResult:
    """Train and score a segmenter; wants `model`, `data` and `out`.

    `train="none"` scores a trained one; with `predict` (and no `data`) it writes masks.
    """
    return _call("segment", options)


def diagnose(kind: str, **options: Any) -> AttentionDiagnosis | FeaturesDiagnosis:
    """Look inside models: `kind` is attention or features.

    Wants `model` (one or a list), `data` and `out`.
    """
    return _call("diagnose", {"kind": kind, **_lists(options)})


def landscape(kind: str = "plane", **options: Any) -> LandscapeResult:
    """The loss around models' weights: `kind` is plane, line or between.

    Wants `model` (one or a list; between: two), `data` and `out`.
    """
    return _call("landscape", {"kind": kind, **_lists(options)})


def curvature(**options: Any) -> CurvatureResult:
    """Largest eigenvalues and trace of the Hessian of models' losses.

    Wants `model` (one or a list), `data` and `out`.
    """
    return _call("curvature", _lists(options))


def _lists(options: dict[str, Any]) -> dict[str, Any]:
    """The options with lists for what may be given once for each model."""
    for name in ("model", "name", "weights"):
        given = options.get(name)
        if given is not None:
            options[name] = list(map(str, [given] if isinstance(given, str | Path) else given))
    return options


def compare(**options: Any) -> CompareResult:
    """Teacher, student and a fresh model under one recipe; wants both, `data` and `out`.

    `also` is a list of further models, or a mapping from names to models.
    """
    also = options.get("also")
    if isinstance(also, Mapping):
        options["also"] = [f"{name}={model}" for name, model in also.items()]
    elif also is not None:
        options["also"] = list(map(str, [also] if isinstance(also, str | Path) else also))
    return _call("compare", options)


def export(**options: Any) -> Exported:
    """Write a model for another library and check it there; wants `model` and `out`, and `to`."""
    return _call("export", options)


def write_report(*runs: str | Path, out: str | Path | None = None) -> Path:
    """One page of what these folders hold: the command `report`, whose name is a package's here."""
    return _call("report", {"run": list(map(str, runs)), "out": None if out is None else str(out)})


def quickstart(**options: Any) -> QuickstartResult:
    """The whole loop on scikit-learn's digits, offline."""
    return _call("quickstart", options)
