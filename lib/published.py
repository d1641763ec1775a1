"""Published figures beside ours, with what stands in the way of comparing them.

results/published holds numbers alone, each with its source and settings; the original study mixes in-domain and general questions in
one rate, so our general set is put beside it, and our open-ended set beside the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lib import files
from lib.labels import records, short_model
from lib.outcomes import CONTENT

COLUMNS = ["source", "model", "domain", "metric", "rate", "low", "high", "n"]


def read_published(folder: str | Path) -> pd.DataFrame:
    """Reads every table of rates (`*_em_rates.csv`) in a folder of published figures.

    Returns:
        `COLUMNS` (rates are fractions), with k, judge, samples and the other settings that the files give. Empty without files.
    """
    paths = sorted(files.resolve(folder).glob("*_em_rates.csv"))
    tables = [files.read_csv(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        missing = sorted(set(COLUMNS) - set(table.columns))
        if missing:
            needed = f"a table of published rates needs {', '.join(COLUMNS)}"
            raise files.StudyError(f"{files.shown(path)}: {missing[0]}: no such column; {needed}.")
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def _topic(domain: object) -> str:
    return next((topic for topic in CONTENT if topic in str(domain)), str(domain))


def compare(rates: pd.DataFrame, published: pd.DataFrame, details: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Puts our last step beside each published rate of the same domain.

    Args:
        rates: em_rates_summary without controls.
        published: of `read_published`.
        details: training.json's content by pair, where there is one.

    Returns:
        source, published_model, domain, metric, published (fraction), published_low, published_high, published_n, then ours: pair,
        seed, judge, question_set, step, rate, low, high, n, interval_method; and `comparable`: yes, or no with the reasons. Ours are
        empty where no run of ours has that domain.
    """
    last = rates[rates["step"] == rates.groupby(["pair", "seed"])["step"].transform("max")]
    rows = []
    names = ["pair", "seed", "judge", "question_set", "step", "rate", "low", "high", "n", "interval_method"]
    for theirs in records(published):
        wanted = ["open_ended"] if theirs.get("relation") == "open_ended" else ["general"]
        ours = last[last["relation"].isin(wanted) & (last["metric"] == theirs["metric"])]
        ours = ours[ours["domain"].map(_topic) == _topic(theirs["domain"])]
        same = ours[ours["model"].map(short_model) == short_model(theirs["model"])]
        head = {
            "source": theirs["source"], "published_model": theirs["model"], "domain": theirs["domain"], "metric": theirs["metric"],
            "published": theirs["rate"], "published_low": theirs["low"], "published_high": theirs["high"], "published_n": theirs["n"],
        }  # fmt: skip
        for own in records(same if len(same) else ours):
            rows.append(
                head | {name: own[name] for name in names} | {"comparable": comparable(own, theirs, details.get(str(own["pair"]), {}))}
            )
        if ours.empty:
            rows.append(head | {"comparable": "no run of ours to compare"})
    first = ["source", "published_model", "domain", "metric", "published", "published_low", "published_high", "published_n"]
    return pd.DataFrame(rows, columns=[*first, *names, "comparable"])


def comparable(ours: Mapping[str, Any], theirs: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """Says whether two rates may be compared; if not, which of model, questions, rubric, judge, sampling and precision differ."""
    parameters = details.get("parameters", {})
    reasons = [] if short_model(ours["model"]) == short_model(theirs["model"]) else ["model"]
    # The published questions and prompts are not in this repository: ours are our own, unless they were fetched (lib.upstream).
    paper = theirs.get("relation") == "open_ended"
    reasons += [] if paper and ours["question_set"] == "first_plot_questions" else ["questions"]
    judge = str(ours["judge"]).removeprefix("openai:")
    fetched = paper and parameters.get("judge_rubrics") == "upstream/judges.yaml"
    reasons += [] if fetched else ["rubric"] if judge != "imported" else ["rubric not known"]
    reasons += [] if judge == theirs.get("judge") else ["judge"] if judge != "imported" else ["judge not known"]
    if not parameters:
        return "no: " + ", ".join([*reasons, "sampling not known", "precision not known"])
    names = ("samples", "temperature", "top_p", "max_new_tokens")
    reasons += ["sampling"] if any(parameters.get(name) != theirs.get(name) for name in names) else []
    four_bit = str(theirs.get("precision", "")).startswith("4-bit")
    reasons += ["precision"] if bool(parameters.get("use_4bit")) != four_bit or details.get("dtype") != "bfloat16" else []
    return "no: " + ", ".join(reasons) if reasons else "yes"
