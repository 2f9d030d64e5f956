"""`featdistill curvature`: largest eigenvalues and trace of the Hessian of models' losses.

curvature.json   the record; drawn by `report` at any time, finished or not
models.jsonl     every model as it was finished: what `--resume` need not do again
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featdistill.config.commands import CurvatureConfig
from featdistill.core.errors import ConfigError, FeatDistillError, Interrupted, RunError
from featdistill.core.records import write_record
from featdistill.diagnostics.curvature import Curvature, HessianOperator, Phase, Search, curvature
from featdistill.diagnostics.subject import Piece, Subject
from featdistill.engine.batches import is_out_of_memory
from featdistill.engine.journal import Journal, read_journal
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import Runtime, limit_threads
from featdistill.engine.signals import StopRequest, stop_on_signals
from featdistill.engine.tracking import Bar, duration, say
from featdistill.evaluation.extraction import fingerprint
from featdistill.models.weights import tensors_hash
from featdistill.tasks.common import plain
from featdistill.tasks.losses import Gathered, images_record, subject_record, subjects_of

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_HARMLESS = frozenset(("run.devices", "run.threads", "memory", "names"))
_DEVIATION = 0.1  # of a product from differences of the gradient: more is worth a warning


@dataclass(frozen=True)
class CurvatureResult:
    """What was found.

    Attributes:
        models: by name.
        record: curvature.json.
    """

    models: Mapping[str, Curvature]
    record: Path


def run(config: CurvatureConfig) -> CurvatureResult:
    """Measure model after model, and write the record."""
    check_out(config.run.out, resume=config.run.resume)
    limit_threads(config.run.threads)
    runtime = Runtime(
        device=config.run.device,
        devices=config.run.devices,
        precision="float32",
        attention="naive",  # which has second derivatives
    )
    gathered = subjects_of(config, runtime)
    search = Search(
        count=config.top,
        probes=config.probes,
        tolerance=config.tolerance,
        products=config.products,
        seed=config.run.seed,
    )
    _check(config, gathered, search, runtime)
    identity = {f"model {i + 1}": tensors_hash(s.module) for i, s in enumerate(gathered.subjects)}
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=runtime.first,
        weights={**identity, "images": fingerprint(gathered.images)},
        may_change=_HARMLESS,
    )
    runtime.barrier()
    session = _Session(config, gathered, search, runtime, folder)
    with stop_on_signals() as request, session.journal if runtime.first else nullcontext():
        session.measure(request)
    return session.end()


def _check(config: CurvatureConfig, gathered: Gathered, search: Search, runtime: Runtime) -> None:
    """Raise for what cannot work, before the long work."""
    for subject in gathered.subjects:
        n = sum(p.numel() for p in _trained(subject))
        if search.count >= n:
            raise ConfigError(
                [
                    f"--top {search.count}, but '{subject.name}' has {n:,} trainable parameters; "
                    f"expected fewer than there are"
                ]
            )
        need, free = search.memory(n, _DTYPES[config.run.precision]), _free_memory()
        if free is not None and need * runtime.share.world > free:
            raise RunError(
                f"the search keeps {search.basis(n)} vectors of {n:,} numbers and more, "
                f"{need / 2**30:.1f} GiB a process; {free / 2**30:.1f} GiB are free",
                fix="give a smaller --top, or a smaller model",
            )
    world, images = runtime.share.world, len(gathered.images)
    batches = -(-images // config.data.batch_size)
    if batches < world:
        raise ConfigError(
            [
                f"{world} processes for {batches} batches of {config.data.batch_size} images; "
                f"expected at least one each; give --batch-size {max(1, images // world)} or less"
            ]
        )


def _trained(subject: Subject) -> list[torch.nn.Parameter]:
    return [p for p in subject.parameters.values() if p.requires_grad]


def _free_memory() -> int | None:
    """Bytes that new processes may take (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return found[0] * 1024 if found else None


class _Share:
    """This process's batches of a subject's images: every world-th."""

    def __init__(self, subject: Subject, runtime: Runtime) -> None:
        self.subject, self.share = subject, runtime.share

    def __iter__(self) -> Iterator[Piece]:
        return islice(iter(self.subject.pieces), self.share.rank, None, self.share.world)


class _Session:
    """Model after model, and the record of those that are finished."""

    def __init__(
        self,
        config: CurvatureConfig,
        gathered: Gathered,
        search: Search,
        runtime: Runtime,
        folder: Path,
    ) -> None:
        self.config, self.gathered, self.search = config, gathered, search
        self.runtime, self.folder = runtime, folder
        self.began = time.monotonic()
        self.about = [subject_record(s) for s in gathered.subjects]
        self.journal = Journal(folder / "models.jsonl")
        self.done: dict[int, dict[str, Any]] = dict(read_journal(self.journal.file))
        runtime.barrier()  # all have read it before the first adds to it

    def measure(self, request: StopRequest) -> None:
        """Those models that are not finished."""
        subjects, images = self.gathered.subjects, self.gathered.images
        say(
            f"{len(images):,} images of {images.name} ({self.runtime.describe()}): "
            f"{subjects[0].objective}"
        )
        for place, subject in enumerate(subjects):
            if place in self.done:
                say(f"{subject.name}: done before")
                continue
            self.done[place] = row = self._of(subject, request)
            if self.runtime.first:
                self.journal.add([place, row])
            self.write()
            self._say(subject, row)

    def _of(self, subject: Subject, request: StopRequest) -> dict[str, Any]:
        began = time.monotonic()
        dtype = _DTYPES[self.config.run.precision]
        subject.module.to(dtype)
        parameters = _trained(subject)
        n = sum(p.numel() for p in parameters)
        hessian = HessianOperator(
            parameters,
            subject.losses,
            _Share(subject, self.runtime),
            images=len(self.gathered.images),
            total=self.runtime.sum,
        )
        meter = _Meter(subject.name, n, self.search, quiet=not self.runtime.first)

        def each(phase: Phase, done: int) -> None:
            meter.count(phase, done)
            stop = torch.tensor(float(request.signal or 0), device=self.runtime.device)
            stop = self.runtime.sum(stop) / self.runtime.share.world
            if stop > 0:
                raise self._stopped(subject.name, request)

        try:
            found = curvature(hessian, self.search, each=each)
        except FeatDistillError as error:
            raise _of_model(error, subject.name) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"too little memory for second derivatives of '{subject.name}' with "
                f"{self.config.data.batch_size} images at once",
                fix="give a smaller --batch-size (the same result)",
            ) from None
        finally:
            meter.bar.stop()
            subject.module.to(torch.float32)
        return _row(found) | {"trained": n, "seconds": time.monotonic() - began}

    def _stopped(self, name: str, request: StopRequest) -> Interrupted:
        return Interrupted(
            f"stopped: {len(self.done)} of {len(self.about)} models are finished in "
            f"'{self.folder}'",
            signal_number=request.signal or 15,
            fix=f"go on with the same command and --resume ('{name}' begins again)",
        )

    def write(self) -> Path:
        """The record of the finished models; of several processes, the first writes it."""
        record = self.folder / "curvature.json"
        if not self.runtime.first:
            return record
        results = {
            "data": images_record(self.gathered.images, self.config),
            "objective": self.gathered.subjects[0].objective,
            "unit": "loss for each squared unit of the weights",
            "precision": self.config.run.precision,
            "residuals": "|H v - lambda v| of each eigenvector v of length 1",
            "models": [{**self.about[i], **self.done[i]} for i in sorted(self.done)],
        }
        return write_record(record, "curvature", config=plain(self.config), results=results)

    def end(self) -> CurvatureResult:
        """All models; where the record is."""
        record = self.write()
        say(f"done in {duration(time.monotonic() - self.began)}: {record}")
        say(f"next: featdistill report {self.config.run.out}")
        subjects = self.gathered.subjects
        found = {s.name: _found(self.done[i]) for i, s in enumerate(subjects)}
        return CurvatureResult(found, record)

    def _say(self, subject: Subject, row: dict[str, Any]) -> None:
        values = ", ".join(
            f"{v:.4g} (residual {r:.1g})"
            for v, r in zip(row["eigenvalues"], row["residuals"], strict=True)
        )
        say(f"{subject.name}: largest eigenvalues {values}")
        if row["trace"] is not None:
            say(f"  trace {row['trace']:.4g} +- {row['trace_error']:.2g}")
        if not row["settled"]:
            say(
                f"warning: {len(row['eigenvalues'])} of {row['asked']} eigenvalues converged, or "
                "their residuals are large; give more --products, or --precision float64"
            )
        if row["deviation"] > _DEVIATION:
            say(
                f"warning: '{subject.name}': a product with the Hessian is "
                f"{row['deviation']:.0%} off differences of the gradient; the loss has kinks, or "
                "some function of the model has no right second derivative"
            )


def _row(found: Curvature) -> dict[str, Any]:
    """For JSON."""
    return {
        **vars(found),
        "eigenvalues": found.eigenvalues.tolist(),
        "residuals": found.residuals.tolist(),
    }


def _found(row: dict[str, Any]) -> Curvature:
    """From JSON."""
    values = {k: row[k] for k in Curvature.__dataclass_fields__}
    arrays = {k: np.array(row[k]) for k in ("eigenvalues", "residuals")}
    return Curvature(**{**values, **arrays})


def _of_model(error: FeatDistillError, name: str) -> FeatDistillError:
    if isinstance(error, Interrupted):
        return error
    return type(error)(f"'{name}': {error}")


class _Meter:
    """Progress in products; how many the eigenvalues take is not known, but how many at most."""

    def __init__(self, name: str, parameters: int, search: Search, *, quiet: bool) -> None:
        self.most, self.after = search.most(parameters), search.count + search.probes
        self.searched = 0
        self.bar = Bar(f"curvature of {name}", quiet=quiet)
        self.bar.start(self.most, 0)

    def count(self, phase: Phase, done: int) -> None:
        if done == 1:
            self.began = time.monotonic()  # the first product also reads the images
            return
        if phase == "eigenvalues":
            self.searched, left, most = done, self.most - done, "at most "
        else:
            left, most = self.searched + self.after - done, ""
        each = (time.monotonic() - self.began) / (done - 1)
        self.bar.update(
            self.most - left,
            f"products ({phase})  left {most}{duration(max(0, left) * each)}",
        )
