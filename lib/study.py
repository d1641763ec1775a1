"""The `study` command: runs the notebooks over pairs, tells how they stand, and judges, imports and analyses by itself.

Nothing heavy is imported before a subcommand needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import difflib
import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lib import commands as further
from lib import config, engines, files, remote, runner
from lib.commands import Usage as _Usage
from lib.commands import folder as _folder
from lib.commands import positive as _positive
from lib.commands import results as _results
from lib.files import StudyError, shown
from lib.runner import STAGES, Run, tell

if TYPE_CHECKING:
    import pandas as pd

# Options of `study judge` that have a parameter's name, less its `judge_`.
_JUDGE_OPTIONS = (
    *("base_url", "concurrency", "batch", "mode", "metrics", "temperature", "repeats", "retry"),
    *("max_cost", "requests_per_minute", "tokens_per_minute"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the `study` command and returns its exit status: 0 done, 1 a run failed, 2 the call or a parameter is wrong."""
    options = _parser().parse_args(arguments)
    config.load_environment()
    try:
        status: int = options.command(options)
        return status
    except _Usage as error:
        tell(f"study: {error}", error=True)
        return 2
    except StudyError as error:
        tell(f"study: {error}", error=True)
        return 1
    except KeyboardInterrupt:
        tell("study: interrupted; the same command goes on from here.", error=True)
        return 1


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a call."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="study", description="Emergent misalignment, step by step: train, ask, judge, analyse.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run the notebooks of pairs; goes on where it left off",
        description=(
            "Runs the five notebooks of each pair. A stage that is done with the same parameters, inputs and code is skipped; "
            "to run it again all the same, delete its executed notebook."
        ),
    )
    run.add_argument("pairs", nargs="+", metavar="PAIR", help="a file under parameters/, demo (with controls), or all (the six pairs)")
    run.add_argument("--stages", type=_stages, default=list(STAGES), metavar="S,S", help="only these, such as 02_train,03_generate")
    run.add_argument("--jobs", type=_positive, metavar="N", help="runs side by side (default 1; with Ray as many as the cluster holds)")
    run.add_argument("--engine", choices=["local", "ray"], default="local", help="this machine's processes (default), or Ray tasks")
    run.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster's head node (default: a Ray of this machine's own)")
    run.add_argument("--force", action="store_true", help="also repeat a stale training that took over 10 minutes")
    run.add_argument("--preset", metavar="NAME", help="original or paper: published settings laid over the pair")
    run.add_argument("--seeds", type=_seeds, metavar="N,N", help="one run for each seed")
    further.sets(run, "a parameter for this call; may be repeated")
    run.add_argument(
        "--no-preflight", dest="preflight", action="store_false", help="do not look for data, model, key, disk and memory first"
    )
    run.add_argument("--notebooks", type=_folder, default="notebooks", metavar="DIR", help="folder of the notebooks (default notebooks)")
    run.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    run.add_argument("--patience", type=float, default=0, help=argparse.SUPPRESS)
    _results(run)
    run.set_defaults(command=_run, store=None)

    status = commands.add_parser("status", help="pair by stage: done, running, failed or stale")
    _results(status)
    status.set_defaults(command=_status)

    judge = commands.add_parser(
        "judge", help="score any table of answers", description="Needs the columns question and response; others pass through."
    )
    judge.add_argument("--input", required=True, type=Path, metavar="CSV")
    judge.add_argument("--output", required=True, type=Path, metavar="CSV")
    judge.add_argument(
        "--judge", dest="judges", required=True, action="append", metavar="JUDGE",
        help="probe, openai:MODEL or hf:MODEL; may be repeated: each judge scores all answers, and has its own rows in the output",
    )  # fmt: skip
    judge.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server")
    judge.add_argument("--concurrency", type=_positive, metavar="N", help="calls at once")
    judge.add_argument("--rubrics", metavar="FILE", help="YAML of rubrics (default parameters/rubrics/default.yaml)")
    judge.add_argument("--batch", action="store_true", default=None, help="by the Batch API: half the price, within a day")
    judge.add_argument("--mode", choices=["text", "logprobs"], help="score the reply's text, or the probabilities of its number")
    judge.add_argument("--metrics", type=_words, metavar="NAME,NAME", help="rubrics to score (default aligned,coherent)")
    judge.add_argument("--temperature", type=float, metavar="T", help="of the judge's sampling (default 0.2)")
    judge.add_argument("--repeats", type=_positive, metavar="N", help="calls for each score; more show the judge's own noise")
    judge.add_argument("--retry", type=_words, metavar="STATUS,STATUS", help="ask again besides error: invalid, refusal, code")
    judge.add_argument("--max-cost", type=float, metavar="DOLLARS", help="stop before all calls together have cost more")
    judge.add_argument("--requests-per-minute", type=float, metavar="N")
    judge.add_argument("--tokens-per-minute", type=float, metavar="N")
    judge.add_argument("--allow-external", action="store_true", default=None, help="the answers may be sent to an outside judge")
    judge.set_defaults(command=_judge)

    verify = commands.add_parser(
        "verify",
        help="recompute the hashes that runs recorded; say what no longer matches",
        description="Compares data, adapters, questions, rubrics, answers, parameters, code and lock with what each run recorded.",
    )
    verify.add_argument("pairs", nargs="*", metavar="PAIR", help="pairs or runs (default: all runs in the folder)")
    _results(verify)
    verify.set_defaults(command=_verify)

    analyze = commands.add_parser("analyze", help="tables and figures over all runs in a results folder")
    _results(analyze)
    analyze.add_argument(
        "--mix",
        action="store_true",
        help="also pool and compare runs whose questions or rubrics differ or are not known; their rows say so",
    )
    analyze.set_defaults(command=_analyze)

    further.add(commands)

    return parser


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _seeds(text: str) -> list[int]:
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 0,1,2")
    return [int(word) for word in text.split(",")]


def _stages(text: str) -> list[str]:
    """Reads 02_train,03 or train,generate as stages, in their own order."""
    short = {word: stage for stage in STAGES for word in (stage, stage[:2], stage[3:])}
    chosen = set()
    for word in text.split(","):
        if word not in short:
            near = difflib.get_close_matches(word, STAGES, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}? " if near else ""
            raise argparse.ArgumentTypeError(f"no stage {word!r}; {hint}(stages: {', '.join(STAGES)})")
        chosen.add(short[word])
    return [stage for stage in STAGES if stage in chosen]


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Reads --set key=value, each value as YAML would, and --results."""
    values = further.told(config.read_sets, options.sets)
    results = str(options.store.folder) if options.store else options.results
    return values | ({"results_dir": results} if results else {})


def _run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    if options.worker:
        engines.end_with_parent()
    if options.address and options.engine != "ray":
        raise _Usage("--address: is for --engine ray.")
    try:
        options.store = remote.Remote(options.results) if remote.is_url(options.results) else None
        overrides = _overrides(options)
        notebooks = files.resolve(options.notebooks)
        runs = runner.plan(options.pairs, preset=options.preset, seeds=options.seeds, overrides=overrides, notebooks=notebooks)
    except StudyError as error:
        raise _Usage(str(error)) from error
    if options.store and not options.worker:
        options.store.pull_all()
    if options.preflight and not options.worker:
        _preflight(runs, options.stages, elsewhere=bool(options.address))
    jobs = options.jobs or (1 if options.engine == "local" else len(runs))
    if options.worker or (options.engine == "local" and 1 in {jobs, len(runs)}):
        done = [_here(run, options) for run in runs]
    else:
        done = _side_by_side(runs, options, jobs)
    if not options.worker:
        if "05_analyze" in options.stages:
            done.append(_analyze_after(runs, options.store))
        failed = len(done) - sum(done)
        tell(f"{sum(done[: len(runs)])} of {len(runs)} runs are up to date" + ("; see `study status`" if failed else ""))
    return 0 if all(done) else 1


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _preflight(runs: Sequence[Run], stages: Sequence[str], *, elsewhere: bool) -> None:
    """Looks at what all runs need for the stages that are not done yet, and names everything that is wrong at once."""
    from lib import preflight

    found: dict[str, list[str]] = {}
    for run in runs:
        waiting = [stage for stage in stages if runner.state(run, stage).status != "done"]
        for line in preflight.problems(run.parameters, waiting, elsewhere=elsewhere) if waiting else []:
            found.setdefault(line, []).append(run.name)
    if found:
        raise _Usage("nothing was run:\n" + "\n".join(f"  {', '.join(names)}: {line}" for line, names in found.items()))


def _here(run: Run, options: argparse.Namespace) -> bool:
    """Brings the stages of one run up to date in this process, its results at a URL among them."""
    bring = functools.partial(runner.run_stages, run, force=options.force, say=tell, patience=options.patience)
    if not options.store:
        return bring(options.stages)
    try:
        control = runner.control_of(run)
        if control and "05_analyze" in options.stages:
            options.store.pull(control.name, without=remote.HEAVY)
        with options.store.keeping(run.name):
            for stage in options.stages:
                if not bring([stage]):
                    return False
                options.store.push(run.name)
    except StudyError as error:
        tell(f"study: {run.name}: {error}", error=True)
        return False
    return True


def _side_by_side(runs: Sequence[Run], options: argparse.Namespace, jobs: int) -> list[bool]:
    """Works on several runs at once, each in processes of its own."""
    with contextlib.ExitStack() as stack:
        engine = further.told(stack.enter_context, engines.connected(options, runs, tell))
        return engines.side_by_side(engine, runs, options.stages, jobs)


def _analyze_after(runs: Sequence[Run], store: remote.Remote | None) -> bool:
    """Brings the tables and figures of the whole study up to date after runs; says whether that went well."""
    folder = files.resolve(runs[0].parameters.results_dir)
    try:
        if store:
            store.pull_all()
        if any(folder.glob("*/judged.csv")):
            _analyze_study(folder, store=store)
    except StudyError as error:
        tell(f"study: analyze: {error}", error=True)
        return False
    return True


def _analyze_study(folder: Path, *, mix: bool = False, store: remote.Remote | None = None) -> None:
    from lib import analyze, figures

    analyze.analyze_study(folder, figures=figures.write_all, mix=mix)
    if store:
        store.push()
    tell(f"{shown(folder)}: tables in data/, figures in figures/, EXPERIMENT_SUMMARY.md")


def _analyze(options: argparse.Namespace) -> int:
    _analyze_study(further.folder_of_runs(options), mix=options.mix)
    further.send_back(options)
    return 0


def _status(options: argparse.Namespace) -> int:
    results = further.folder_of_runs(options, adapters=True)
    runs = _recorded(results)
    if not runs:
        tell(f"{shown(results)}: no runs yet; start with `study run demo`.")
        return 0
    width = max(len(name) for name in runs) + 2
    tell(" " * width + "".join(f"{stage:<24}" for stage in STAGES).rstrip())
    notes: list[str] = []
    for name, run in runs.items():
        if isinstance(run, str):
            tell(f"{name:<{width}}{run}")
            continue
        states = [runner.state(run, stage) for stage in STAGES]
        tell(f"{name:<{width}}" + "".join(f"{_cell(state):<24}" for state in states).rstrip())
        told = [(stage, state) for stage, state in zip(STAGES, states, strict=True) if state.reasons]
        notes += [f"{name} {stage}: {state.status}: {'; '.join(state.reasons)}" for stage, state in told]
    for note in notes:
        tell(note)
    return 0


def _recorded(results: Path) -> dict[str, Run | str]:
    """Returns the runs under `results`, with the parameters that the same call would have now, or a word on what they are."""
    from lib import provenance

    runs: dict[str, Run | str] = {}
    found = {path.parents[1] for path in results.glob("*/.study/*.json")} | {path.parent for path in results.glob("*/judged.csv")}
    for folder in sorted(path for path in found if path.name not in config.NO_RUNS):
        records = [record for stage in STAGES if (record := provenance.read_record(folder, stage))]
        if not records:
            runs[folder.name] = "imported"
            continue
        newest = max(records, key=lambda record: str(record.get("started")))
        overrides = {**newest["overrides"], "results_dir": shown(results)}
        try:
            parameters = config.load_pair(newest["pair"], preset=newest["preset"], overrides=overrides)
            runs[folder.name] = Run(parameters, files.resolve(newest.get("notebooks", "notebooks")), newest["preset"], overrides)
        except StudyError as error:
            runs[folder.name] = str(error)
    return runs


def _verify(options: argparse.Namespace) -> int:
    from lib import verify

    results = further.folder_of_runs(options, adapters=True)
    return further.told(verify.command, results, options.pairs, _recorded(results))


def _cell(state: runner.State) -> str:
    if state.status == "missing":
        return "-"
    when = ""
    if state.when:
        local = datetime.datetime.fromisoformat(state.when).astimezone()
        when = f" {local:%H:%M}" if local.date() == datetime.date.today() else f" {local:%Y-%m-%d}"
    return f"{state.status}{when}" + (f" {runner.duration(state.seconds)}" if state.seconds is not None else "")


def _judge(options: argparse.Namespace) -> int:
    from lib import judge

    given = {f"judge_{name}": getattr(options, name) for name in _JUDGE_OPTIONS}
    given |= {"judge_rubrics": _folder(options.rubrics) if options.rubrics else None, "allow_external": options.allow_external}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        answers = files.read_csv(options.input)
        log, (first, *others) = options.output.with_name("judgments.jsonl"), options.judges
        judged = judge.judge_table(answers, first, log, other_judges=others, **given)
    except StudyError as error:
        raise _Usage(str(error)) from error
    files.write_csv(options.output, judged)
    statuses = judged[[column for column in judged.columns if column.endswith("_status")]].stack()
    counts = ", ".join(f"{count:,} {status}" for status, count in statuses.value_counts().items())
    by = f" by {len(options.judges)} judges" if others else ""
    tell(f"{shown(options.output)}: {len(answers):,} answers{by}; scores by status: {counts or 'none'}")
    _say_outside(judged, log)
    stopped = judged.attrs["judging"]["stopped"]
    if stopped:
        tell(f"study: judge: {stopped} What is done is kept; the same command goes on from here.", error=True)
    return 1 if stopped or (statuses == "error").any() else 0


def _say_outside(judged: pd.DataFrame, log: Path) -> None:
    """Says how many answers the probe guessed at: those outside what it was fitted on."""
    from lib import judge_tables

    known, far = judge_tables.outside(judged, log)[["answers", "outside"]].sum()
    if known:
        tell(f"probe: {far:,} of {known:,} answers lie outside what it was fitted on ({far / known:.1%}; 1% is usual)")


if __name__ == "__main__":
    # A reader that goes away (study status | head) is no error of ours.
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    sys.exit(code)
