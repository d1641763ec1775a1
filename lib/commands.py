"""Commands of `study` beside its runs: label answers by hand, fetch the published files. `lib.study` adds them to its own.

Here too are the few readers of arguments that all commands share.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lib import files, upstream
from lib.files import StudyError, shown


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


def results(parser: argparse.ArgumentParser) -> None:
    """Adds --results to a command."""
    parser.add_argument("--results", type=folder, metavar="DIR", help="folder of the runs (default results)")


def folder(text: str) -> str:
    """A folder named on the command line lies below the working directory; in a parameter, below the repository."""
    return shown(Path(text).expanduser().absolute())


def positive(text: str) -> int:
    """Reads a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _say(line: str) -> None:
    print(line, flush=True)


def _label(options: argparse.Namespace) -> int:
    from lib import label

    try:
        run = label.run_folder(options.run, options.results or "results")
        label.rater_file(run, options.rater)
        sample, drawn = label.read_sample(run), False
        if sample.empty:
            sample, drawn = label.draw(run, options.n, options.seed), True
        label.items(run, options.rater)
    except StudyError as error:
        raise Usage(str(error)) from error
    _say(f"{shown(run / 'labels' / 'sample.csv')}: {len(sample)} answers, {'drawn now' if drawn else 'drawn before'}")
    if options.no_browser:
        _say("\n".join(label.lines(run, options.rater)))
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
    try:
        got = upstream.fetch(
            options.ref, folder, paths=options.file, repository=options.repo, base_url=options.base_url, force=options.force
        )
    except StudyError as error:
        raise Usage(str(error)) from error
    for name, told in got["files"].items():
        # What each can serve as shows at once, while whoever fetched it can still choose another.
        served: list[str] = []
        with contextlib.suppress(StudyError):
            served.append(f"{len(questions.read(folder / name).questions)} questions")
        with contextlib.suppress(StudyError):
            served.append(f"judge prompts {', '.join(rubrics.load(folder / name))}")
        _say(f"{shown(folder / name)}: sha256 {told['sha256'][:12]}, {'; '.join(served) or 'serves neither as questions nor as rubrics'}")
    for name in got["absent"]:
        _say(f"{name}: is not in {got['repository']} at this commit")
    return 0
