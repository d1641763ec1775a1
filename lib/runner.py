"""Runs the five notebooks of a run with papermill, and tells which stages are done, running, failed or stale."""

from __future__ import annotations

import csv
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib import config, files, origin, provenance
from lib.config import Parameters
from lib.files import StudyError, shown

NOTEBOOKS = files.ROOT / "notebooks"
STAGES = ("01_data", "02_train", "03_generate", "04_judge", "05_analyze")
LONG_TRAINING = 600
"""Seconds after which a stale training is run again only when the user says so."""

_OUTPUTS = {
    "01_data": ["dataset.json"],
    "02_train": ["training.json", "training_log.csv", "checkpoints/*/adapter_model.safetensors"],
    "03_generate": ["generations.csv", "diagnostics.csv", "generation.json"],
    "04_judge": ["judged.csv", "probe_outside.csv"],
    "05_analyze": ["step_summary.csv"],
}
# What a stage resumes from. lib checks it against parameters and data, but knows nothing of its own code: when a stage that was
# done is run again for other code, this goes first. After a crash it stays, whatever was mended meanwhile.
_RESUME = {"02_train": [".state", "checkpoints"], "03_generate": [".generate", "generation.json"]}


@dataclass(frozen=True)
class Run:
    """One run of a pair: its parameters, and the folder of the notebooks that it executes."""

    parameters: Parameters
    notebooks: Path = field(default=NOTEBOOKS)
    preset: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def name(self) -> str:
        """The name of the run's folder."""
        return config.run_name(self.parameters)

    @functools.cached_property
    def folder(self) -> Path:
        """results/<run>/."""
        return config.run_dir(self.parameters)

    def notebook(self, stage: str) -> Path:
        """The notebook that a stage executes."""
        return self.notebooks / f"{stage}.ipynb"

    def executed(self, stage: str) -> Path:
        """The executed notebook of a stage."""
        return self.folder / f"{stage}.ipynb"

    def values(self, stage: str) -> dict[str, Any]:
        """The parameters that a stage is given: those that its notebook declares, and no others.

        Raises:
            StudyError: the notebook declares a name that is no parameter.
        """
        all_values = self.parameters.model_dump(mode="json")
        names = provenance.declared(self.notebook(stage))
        for name in names:
            if name not in all_values:
                raise StudyError(f"{shown(self.notebook(stage))}: declares {name}, which is no parameter of lib/config.py.")
        return {name: all_values[name] for name in names}


@dataclass(frozen=True)
class State:
    """Where a stage stands: `status` is done, running, failed, stale or missing; `reasons` says why it is not done."""

    status: str
    reasons: tuple[str, ...] = ()
    seconds: float | None = None
    when: str | None = None


def plan(
    pairs: Sequence[str],
    *,
    preset: str | None = None,
    seeds: Sequence[int] | None = None,
    overrides: dict[str, Any] | None = None,
    notebooks: Path = NOTEBOOKS,
) -> list[Run]:
    """Expands pairs and seeds to runs and checks every one, before anything runs. Controls come before the pairs they serve.

    Args:
        pairs: names of pairs, `demo` and `all` among them.
        preset: published settings laid over each pair.
        seeds: one run for each; None takes the pair's own.
        overrides: parameters laid over pair and preset.
        notebooks: the folder of the notebooks.

    Raises:
        StudyError: a pair, preset or parameter is wrong.
    """
    overrides = overrides or {}
    for name in {"pair", "preset"} & overrides.keys():
        raise StudyError(f"--set {name}: is chosen by the command itself: study run PAIR --preset NAME.")
    runs: dict[str, Run] = {}
    for pair in config.expand_pairs(list(pairs)):
        base = config.load_pair(pair, preset=preset, overrides=overrides)
        own = [base.seed] if preset or "seed" in overrides else config.pair_seeds(pair)
        for seed in seeds or own:
            with_seed = {**overrides, "seed": seed} if seed != base.seed else overrides
            run = Run(config.load_pair(pair, preset=preset, overrides=with_seed), notebooks, preset, with_seed)
            runs[run.name] = run
    for run in runs.values():
        for stage in STAGES:
            run.values(stage)
    controls = {run.parameters.control for run in runs.values()}
    return sorted(runs.values(), key=lambda run: run.parameters.pair not in controls)


def control_of(run: Run) -> Path | None:
    """Returns the folder of the run's control arm, or None where the pair has none."""
    control = run.parameters.control
    return config.run_dir(run.parameters.model_copy(update={"pair": control})) if control else None


def inputs(run: Run, stage: str) -> dict[str, Path]:
    """Returns the files that a stage reads, by the names under which its record knows them."""
    p = run.parameters
    settings = files.ROOT / "parameters"
    names: dict[str, Path] = {}
    if stage == "01_data":
        names |= {f"parameters/{n}": f for n, f in provenance.under(settings, ["demo/*"]).items()} | _questions(p)
        if p.dataset_path and "://" not in p.dataset_path:
            names["dataset_path"] = files.resolve(p.dataset_path)
    if stage == "02_train" and p.adapter and not p.adapter.startswith("hf:"):
        names |= provenance.under(files.resolve(p.adapter), ["adapter_config.json", "adapter_model.safetensors"])
    if stage == "03_generate":
        names |= provenance.under(run.folder, ["checkpoints/*/adapter_model.safetensors"])
        names["parameters/neutral.txt"] = settings / "neutral.txt"
    if stage in {"03_generate", "05_analyze"}:
        names |= _questions(p)
    if stage == "04_judge":
        names["generations.csv"] = run.folder / "generations.csv"
        names["judge_rubrics"] = files.resolve(p.judge_rubrics)
        if "probe" in {p.judge, *p.other_judges}:
            names |= {f"parameters/{n}": f for n, f in provenance.under(settings, ["probe/*"]).items()}
    if stage == "05_analyze":
        read = ["diagnostics.csv", "training.json", "training_log.csv", "dataset.json", "labels/*.csv"]
        names |= provenance.under(run.folder, [*_OUTPUTS["04_judge"], *read])
        names |= {f"published/{n}": f for n, f in provenance.under(files.resolve(p.published), ["*"]).items()}
        control = control_of(run)
        if control:
            names["the control's judged.csv"] = control / "judged.csv"
    return {name: path for name, path in names.items() if not path.is_dir()}


def _questions(p: Parameters) -> dict[str, Path]:
    own = {entry: files.ROOT / "parameters" / "questions" / f"{entry}.yaml" for entry in p.question_sets}
    return {f"questions {entry}": path if path.is_file() else files.resolve(entry) for entry, path in own.items()}


def input_stamps(run: Run, stage: str, known: dict[str, Any] | None = None) -> dict[str, provenance.Stamp]:
    """Returns the stamps of what a stage reads, the training rows among them; files that are as in `known` are not read again."""
    found = provenance.stamps(inputs(run, stage), known)
    if stage in {"02_train", "03_generate"}:
        # The hash that 01 wrote stands for the rows: dataset.json also holds times, and the rows may be on another machine.
        path = run.folder / "dataset.json"
        value = files.read_json(path).get("sha256") if path.is_file() else None
        found["training rows"] = {"sha256": value, "size": None, "mtime_ns": None}
    return found


def outputs(run: Run, stage: str) -> dict[str, Path]:
    """Returns the files that a stage writes and later ones read, by their path in the run's folder."""
    found = provenance.under(run.folder, _OUTPUTS[stage])
    dataset = run.folder / "dataset.json"
    if stage == "01_data" and dataset.is_file():
        rows = files.read_json(dataset).get("path")
        found |= {str(rows): files.resolve(rows)} if rows else {}
    return found


def state(run: Run, stage: str) -> State:
    """Tells where a stage stands, from its record, its executed notebook and the files now there."""
    record = provenance.read_record(run.folder, stage)
    if record is None:
        return State("missing")
    took, when = record.get("seconds"), record.get("ended") or record.get("started")
    if record["status"] == "running":
        if provenance.lives(record.get("process")):
            return State("running", (), None, when)
        return State("failed", ("it was interrupted",), took, when)
    if record["status"] == "failed":
        return State("failed", (record["error"],), took, when)
    if not run.executed(stage).is_file():
        return State("missing", ("its executed notebook is gone",), took, when)
    code, read = provenance.code_hashes(run.notebook(stage)), input_stamps(run, stage, record["inputs"])
    reasons = provenance.differences(record, _compared(run.values(stage)), code, read)
    now = outputs(run, stage)
    paths = {name: now.get(name, run.folder / name) for name in record["outputs"]}
    reasons += provenance.damage(record["outputs"], provenance.stamps(paths, record["outputs"])) + record["unfinished"]
    return State("stale" if reasons else "done", tuple(reasons), took, when)


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    # The results folder may be moved or named otherwise; what it holds stays what it was.
    return {name: value for name, value in values.items() if name != "results_dir"}


def training_seconds(run: Run) -> float:
    """Returns the seconds that the run's training took, 0 where none is known."""
    path = run.folder / "training.json"
    try:
        return float(files.read_json(path).get("seconds") or 0)
    except (StudyError, TypeError, ValueError):
        return 0.0


def execute(run: Run, stage: str) -> float:
    """Executes the notebook of a stage into the run's folder and records what it was made from.

    The executed notebook is written as the cells end, also when one fails. Returns the seconds it took.

    Raises:
        StudyError: a cell failed (the message is that of the error in the cell), the kernel died, or the disk is full.
    """
    values = run.values(stage)
    previous = provenance.read_record(run.folder, stage)
    provenance.end_orphan((previous or {}).get("kernel"))
    code = provenance.code_hashes(run.notebook(stage))
    if previous and previous["status"] == "done" and previous["code"] != code:
        for name in _RESUME.get(stage, ()):
            shutil.rmtree(run.folder / name, ignore_errors=True)
    record: dict[str, Any] = {
        "status": "running",
        "stage": stage,
        "started": provenance.now(),
        "process": provenance.this_process(),
        "pair": run.parameters.pair,
        "preset": run.preset,
        "overrides": run.overrides,
        "notebooks": shown(run.notebooks),
        "parameters": _compared(values),
        "origin": origin.describe(),
        "code": code,
        "inputs": input_stamps(run, stage),
    }
    provenance.write_record(run.folder, stage, record)

    def kernel_started(pid: int) -> None:
        provenance.write_record(run.folder, stage, {**record, "kernel": provenance.this_process(pid)})

    begin = time.monotonic()
    error = "it was interrupted"
    try:
        error = _papermill(run.notebook(stage), run.executed(stage), values, kernel_started)
    except StudyError as problem:
        error = str(problem)
    finally:
        seconds = round(time.monotonic() - begin, 1)
        ending = {"ended": provenance.now(), "seconds": seconds, "process": None}
        if error:
            provenance.write_record(run.folder, stage, {**record, **ending, "status": "failed", "error": error})
        else:
            written = provenance.stamps(outputs(run, stage))
            provenance.write_record(
                run.folder, stage, {**record, **ending, "status": "done", "outputs": written, "unfinished": _unfinished(run, stage)}
            )
    if error:
        raise StudyError(error)
    return seconds


def _unfinished(run: Run, stage: str) -> list[str]:
    """Says what a stage that succeeded still left to do: judge's calls that ended in an error are made again by the next run."""
    path = run.folder / "judged.csv"
    if stage != "04_judge" or not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        lost = sum(value == "error" for row in rows for name, value in row.items() if name and name.endswith("_status"))
    return [f"{lost} scores are in error"] if lost else []


def _papermill(source: Path, target: Path, values: dict[str, Any], kernel_started: Callable[[int], None]) -> str:
    """Executes one notebook; returns an empty text, or the message of what failed in it."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    _write_whole_notebooks()
    _quiet_kernels()
    try:
        papermill.execute_notebook(
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (source, target)),
            parameters=values,
            kernel_name="python3",
            kernel_manager_class=_kernel_manager(kernel_started),
            cwd=str(files.ROOT),
            progress_bar=False,
            start_timeout=180,
            iopub_timeout=120,
        )
    except PapermillExecutionError as error:
        return str(error.evalue) if error.ename == "StudyError" else f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        return "the kernel died, most likely out of memory; make batch_size or generate_batch_size smaller, or free memory"
    return ""


def _kernel_manager(started: Callable[[int], None]) -> type:
    """Returns a kernel manager whose kernels are this very interpreter, whatever kernels the user has installed."""
    import zmq
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    class ThisPython(AsyncKernelManager):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # The channel to the kernel carries the answers and the code, and other users of the machine could listen.
            self.transport_encryption = "auto" if zmq.has("curve") else "disabled"
            self._kernel_spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict(["--log-level=CRITICAL"], ["-Xfrozen_modules=off"]))

        async def _async_post_start_kernel(self, **kwargs: Any) -> None:
            await super()._async_post_start_kernel(**kwargs)
            if isinstance(self.provisioner, LocalProvisioner) and self.provisioner.pid:
                started(self.provisioner.pid)

    return ThisPython


def _write_whole_notebooks() -> None:
    """Makes papermill write its notebooks whole or not at all."""
    from papermill.iorw import LocalHandler, papermill_io

    class Whole(LocalHandler):
        def write(self, buf: str, path: str) -> None:
            files.write_text(path, buf)

    if not any(scheme == os.sep for scheme, _ in papermill_io._handlers):
        papermill_io.register(os.sep, Whole())


def _quiet_kernels() -> None:
    """Keeps progress of downloads and warnings about the future out of executed notebooks; what the user set stays."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore::DeprecationWarning,ignore::FutureWarning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


@contextmanager
def working_on(run: Run, patience: float = 0) -> Iterator[None]:
    """Holds the lock of a run's folder, for which it waits up to `patience` seconds.

    Raises:
        StudyError: another process works on this run.
    """
    try:
        with files.lock(run.folder / ".study" / "lock", wait=patience, what=run.name):
            yield
    except OSError as error:
        raise StudyError(f"{shown(run.folder)}: cannot be written ({error.strerror}); make the folder writable, then run again.") from error


def tell(line: str, *, error: bool = False) -> None:
    """Prints a line at once, to standard error if asked. One write a line: runs side by side share the stream, and `print` may take two."""
    stream = sys.stderr if error else sys.stdout
    stream.write(line + "\n")
    stream.flush()


def run_stages(run: Run, stages: Sequence[str], *, force: bool = False, say: Callable[[str], None] = tell, patience: float = 0) -> bool:
    """Brings the given stages of a run up to date, in order, and stops at the first that fails.

    Args:
        run: the run.
        stages: names among `STAGES`.
        force: also repeat a stale training that took more than `LONG_TRAINING` seconds.
        say: is given a line for each stage.
        patience: seconds to wait for another process that works on this run.

    Returns:
        Whether all stages are done. What failed is told on standard error: the pair, the stage, the message and the notebook.
    """
    try:
        with working_on(run, patience):
            for stage in stages:
                _bring_up_to_date(run, stage, force, say)
    except StudyError as error:
        tell(f"study: {run.name}: {error}", error=True)
        return False
    return True


def _bring_up_to_date(run: Run, stage: str, force: bool, say: Callable[[str], None]) -> None:
    found = state(run, stage)
    label = f"{run.name:<22} {stage:<12}"
    if found.status == "done":
        say(f"{label} done already")
        return
    why = found.reasons[0] + (f" and {len(found.reasons) - 1} more" if len(found.reasons) > 1 else "") if found.reasons else ""
    took = training_seconds(run)
    if stage == "02_train" and found.status == "stale" and took > LONG_TRAINING and not force:
        raise StudyError(
            f"{stage}: is stale ({why}), and training took {duration(took)}.\n"
            f"  --force trains again; --stages {','.join(STAGES[2:])} goes on with the adapters as they are."
        )
    say(f"{label} started{f' ({found.status}: {why})' if why else ''}")
    try:
        seconds = execute(run, stage)
    except StudyError as error:
        say(f"{label} failed")
        raise StudyError(f"{stage}: {error}\n  the notebook, up to the cell that failed: {shown(run.executed(stage))}") from error
    say(f"{label} done in {duration(seconds)}")


def duration(seconds: float) -> str:
    """Writes seconds as people do: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
