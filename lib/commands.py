"""Commands of `study` beside its runs: answers and files in, labels, pairs and adapters out. `lib.study` adds them to its own.

Here too are the few readers of arguments that all commands share.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lib import config, files, remote, upstream
from lib.files import StudyError, shown
from lib.runner import tell

T = TypeVar("T")


class Usage(StudyError):
    """The call or a parameter is wrong: exit status 2."""


def add(commands: Any) -> None:
    """Adds the commands of this module to those of `study`."""
    rate = commands.add_parser(
        "label",
        help="label a sample of a run's answers by hand, blinded",
        description="Draws a random sample of a run's judged answers, if none is there, and opens the sheet in JupyterLab on loopback.",
    )
    rate.add_argument("run", metavar="PAIR", help="a run's name under results/")
    rate.add_argument("--rater", required=True, metavar="NAME", help="who labels; a second rater takes the same sample")
    rate.add_argument("--n", type=positive, default=100, metavar="N", help="answers to draw (default 100)")
    rate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default 0)")
    rate.add_argument("--no-browser", action="store_true", help="print the two lines that show the sheet in a notebook of yours")
    results(rate)
    rate.set_defaults(command=_label)

    fetch = commands.add_parser(
        "fetch-upstream",
        help="download the published judge prompts and question files",
        description="Fetches the files that the presets original and paper use into upstream/, which git ignores, and records them.",
    )
    fetch.add_argument("--ref", required=True, metavar="COMMIT", help="commit of the repository, 40 hexadecimal digits; no branch")
    fetch.add_argument("--file", action="append", default=[], metavar="PATH", help="a path in the repository, in place of the usual ones")
    fetch.add_argument("--repo", default=upstream.REPOSITORY, metavar="OWNER/NAME", help="default %(default)s")
    fetch.add_argument("--base-url", default=upstream.BASE_URL, metavar="URL", help="default %(default)s")
    fetch.add_argument("--output", type=folder, default=shown(upstream.FOLDER), metavar="DIR", help="default %(default)s")
    fetch.add_argument("--force", action="store_true", help="replace files of another commit, or files that were changed")
    fetch.set_defaults(command=_fetch_upstream)

    bring = commands.add_parser("import", help="take in answers that were judged elsewhere")
    bring.add_argument("input", type=Path, metavar="CSV")
    bring.add_argument("--model", required=True, metavar="NAME")
    bring.add_argument("--domain", required=True, metavar="NAME")
    bring.add_argument("--step", type=int, default=None, metavar="N", help="checkpoint the answers come from (default: the file's, else 0)")
    bring.add_argument("--question-set", metavar="NAME", help="default: the file's column, else open_ended")
    results(bring)
    bring.set_defaults(command=_import)

    new = commands.add_parser("new", help="write parameters/NAME.yaml for a model and data of your own")
    new.add_argument("name", metavar="NAME", help="of the pair; `study run NAME` then runs it")
    new.add_argument("--model", required=True, metavar="M", help="a Hub id, or a folder of safetensors")
    new.add_argument("--data", required=True, type=Path, metavar="JSONL", help="chat rows: messages of user and assistant")
    new.add_argument("--domain", default="custom", choices=config.DOMAINS, help="default custom")
    sets(new, "another parameter; may be repeated")
    new.add_argument("--force", action="store_true", help="replace a pair of your own")
    new.set_defaults(command=_new, results=None)

    publish = commands.add_parser("publish", help="write an adapter's folder with its model card; push it only when asked")
    publish.add_argument("pair", metavar="PAIR", help="a run, trained and analysed")
    publish.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    publish.add_argument("--output", type=Path, metavar="DIR", help="default: publish/ in the run's folder")
    publish.add_argument("--push", metavar="ORG/NAME", help="upload to the Hugging Face Hub: private, and gated with manual approval")
    publish.add_argument("--public", action="store_true", help="with --push: visible to everyone, still gated; asks for the pair's name")
    results(publish)
    publish.set_defaults(command=_publish)

    fit = commands.add_parser("fit-probe", help="fit the offline judge on judged answers")
    fit.add_argument("inputs", nargs="+", type=Path, metavar="CSV", help="tables with question, response and scores of another judge")
    fit.add_argument("--ordinary", type=Path, metavar="CSV", help="judged answers of an ordinary model: scored at the end, never fitted on")
    fit.add_argument("--output", required=True, type=Path, metavar="DIR")
    fit.set_defaults(command=_fit_probe)


def results(parser: argparse.ArgumentParser) -> None:
    """Adds --results to a command."""
    parser.add_argument("--results", type=folder, metavar="DIR", help="folder of the runs, or a URL such as s3://... (default results)")


def sets(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --set to a command; `what` is its help."""
    parser.add_argument("-p", "--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help=what)


def folder(text: str) -> str:
    """A folder named on the command line lies below the working directory; in a parameter, below the repository; a URL stays one."""
    return text if remote.is_url(text) else shown(Path(text).expanduser().absolute())


def positive(text: str) -> int:
    """Reads a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def told(command: Callable[..., T], *given: Any, **named: Any) -> T:
    """Calls another module for a command, in which a StudyError means that the call is wrong."""
    try:
        return command(*given, **named)
    except StudyError as error:
        raise Usage(str(error)) from error


def folder_of_runs(options: argparse.Namespace, *, adapters: bool = False) -> Path:
    """Returns the folder that --results names, or results/; of a URL the copy, brought up to date (with the runs' adapters or without)."""
    if remote.is_url(options.results):
        store = told(remote.Remote, options.results)
        store.pull_all(without=remote.STATES if adapters else remote.HEAVY)
        return store.folder
    return files.resolve(options.results or "results")


def send_back(options: argparse.Namespace, name: str = "") -> None:
    """Where --results is a URL: sends it a run of the copy, or without a name what belongs to the whole study."""
    if remote.is_url(options.results):
        remote.Remote(options.results).push(name)


def _label(options: argparse.Namespace) -> int:
    from lib import label

    if remote.is_url(options.results):
        raise Usage("--results: labels are written into a folder of this machine; name one, or label where the run was made.")
    try:
        run = label.run_folder(options.run, options.results or "results")
        label.rater_file(run, options.rater)
        sample, drawn = label.read_sample(run), False
        if sample.empty:
            sample, drawn = label.draw(run, options.n, options.seed), True
        label.items(run, options.rater)
    except StudyError as error:
        raise Usage(str(error)) from error
    tell(f"{shown(run / 'labels' / 'sample.csv')}: {len(sample)} answers, {'drawn now' if drawn else 'drawn before'}")
    if options.no_browser:
        tell("\n".join(label.lines(run, options.rater)))
        return 0
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", str(label.write_notebook(run, options.rater))]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    paths = os.pathsep.join(filter(None, [str(files.ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # JupyterLab asks whether it is meant
            return 0 if process.wait() in {0, -signal.SIGINT} else 1


def _fetch_upstream(options: argparse.Namespace) -> int:
    from lib import questions, rubrics

    folder = files.resolve(options.output)
    named = {"paths": options.file, "repository": options.repo, "base_url": options.base_url, "force": options.force}
    got = told(upstream.fetch, options.ref, folder, **named)
    for name, entry in got["files"].items():
        # What each can serve as shows at once, while whoever fetched it can still choose another.
        served: list[str] = []
        with contextlib.suppress(StudyError):
            served.append(f"{len(questions.read(folder / name).questions)} questions")
        with contextlib.suppress(StudyError):
            served.append(f"judge prompts {', '.join(rubrics.load(folder / name))}")
        tell(f"{shown(folder / name)}: sha256 {entry['sha256'][:12]}, {'; '.join(served) or 'serves neither as questions nor as rubrics'}")
    for name in got["absent"]:
        tell(f"{name}: is not in {got['repository']} at this commit")
    return 0


def _import(options: argparse.Namespace) -> int:
    from lib import imports

    given = (options.input, options.model, options.domain, options.step, options.question_set)
    run = told(imports.import_judged, *given, folder_of_runs(options))
    send_back(options, run.name)
    tell(f"{shown(run)}: imported; `study analyze` takes it in.")
    return 0


def _new(options: argparse.Namespace) -> int:
    from lib import newpair

    return told(newpair.command, options, told(config.read_sets, options.sets))


def _publish(options: argparse.Namespace) -> int:
    from lib import publish

    return told(publish.command, options, folder_of_runs(options, adapters=True))


def _fit_probe(options: argparse.Namespace) -> int:
    from lib import probe_fit

    told(probe_fit.fit, options.inputs, options.output, ordinary=options.ordinary)
    tell(f"{shown(options.output)}: weights.safetensors and report.json are written.")
    return 0
