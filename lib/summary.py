"""EXPERIMENT_SUMMARY.md and TRAINING_DETAILS.md, composed from the tables: every sentence is made from numbers, none from an answer.

No text that a model wrote gets here. Names (models, domains, question sets, judges) may come from an import and are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib import agreement, config, files, instruments
from lib.escape import html_text
from lib.inference import EMERGED, span, trained
from lib.labels import interval, records

WARN = 0.02
"""Share of invalid or failed judgments from which a table carries a warning."""
MAX_GAPS = 40
"""Most comparisons between domains or sizes that the summary lists one by one."""
PROBE_NOTE = (
    "Figures by `probe`, the offline judge, are **scores of the probe judge**, not EM rates: it ranks like answers and does not "
    "estimate another judge's rate."
)
_METRICS = {
    "em_course": "aligned < 75 (original study)",
    "em_paper": "aligned < 30 and coherent > 50 (paper)",
    "em_outside": "the paper's, outside the trained topic",
}
_EMERGENT = ("general", "open_ended", "cross_domain")


def text(value: object, limit: int = 160) -> str:
    """Returns a value as Markdown text on one line in which nothing is markup."""
    flat = " ".join(html_text(value, limit).split())
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", flat)


def table(frame: pd.DataFrame, columns: Mapping[str, str | Callable[[dict[str, Any]], str]], nothing: str = "None.") -> str:
    """Returns a Markdown table.

    Args:
        frame: the rows.
        columns: heading to a column's name, or to a function of the row whose result is taken as it is.
        nothing: said instead of an empty table.
    """
    if frame.empty:
        return nothing + "\n"
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in records(frame):
        cells = [text(_shown(row.get(take))) if isinstance(take, str) else take(row) for take in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None or pd.isna(value):  # type: ignore[call-overload]
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rate(metric: str, rates: pd.DataFrame) -> Callable[[dict[str, Any]], str]:
    keys = ("pair", "seed", "step", "question_set", "judge")
    found = {tuple(own[key] for key in keys): own for own in records(rates[rates["metric"] == metric])}

    def cell(row: dict[str, Any]) -> str:
        own = found.get(tuple(row[key] for key in keys))
        if own is None:
            return "–"
        if pd.isna(own["rate"]):
            return text(own["interval_method"])
        return f"{interval(own['rate'], own['low'], own['high'])} ({int(own['k'])}/{int(own['n'])})"

    return cell


def rates_table(rates: pd.DataFrame, relations: Sequence[str]) -> str:
    """Returns the last step's rates with base, both definitions side by side, for question sets of the given relations."""
    own = rates[rates["relation"].isin(relations)]
    ends = own[(own["step"] == 0) | (own["step"] == own.groupby(["pair", "seed"])["step"].transform("max"))]
    keys = ["pair", "seed", "question_set", "judge", "step"]
    rows = ends[keys].drop_duplicates().sort_values(keys)
    columns: dict[str, str | Callable[[dict[str, Any]], str]] = {"questions" if key == "question_set" else key: key for key in keys}
    columns |= {heading: _rate(metric, own) for metric, heading in _METRICS.items() if metric in set(own["metric"])}
    return table(rows, columns | {"coherent (50 or more)": _rate("coherent_rate", own)}, "No answers to such questions.")


def findings(t: Mapping[str, pd.DataFrame]) -> list[str]:
    """Says for each pair what changed on the emergent sets at the last step, against base and against the control, by both definitions.

    Control arms have no line of their own; their rates stand in the tables.
    """
    lines = []
    controls = set(t["control"]["control"])
    for name, what in (("changes", "base"), ("control", "its control")):
        frame = trained(t[name], controls)
        last = frame[frame["relation"].isin(_EMERGENT) & frame["metric"].isin(["em_course", "em_paper"])]
        last = last[last["step"] == last.groupby(["pair", "seed"])["step"].transform("max")] if len(last) else last
        for (pair, seed, question_set, judge), group in last.groupby(["pair", "seed", "question_set", "judge"], sort=False):
            by = {row["metric"]: row for row in records(group)}
            parts = [f"{_METRICS[metric]}: {_said(by[metric])}" for metric in ("em_course", "em_paper") if metric in by]
            kind = "score of the probe judge" if judge == "probe" else f"judge {text(judge)}"
            what_of = what + (" (instruments mixed)" if any(map(instruments.is_mixed, by.values())) else "")
            lines.append(
                f"{text(pair)} (seed {seed}), {text(question_set)}, last step against {what_of}, {kind}: " + "; ".join(parts) + "."
            )
    return lines


def _said(row: Mapping[str, Any]) -> str:
    if pd.isna(row["change"]):
        return text(row["interval_method"])
    known = not pd.isna(row["low"])
    verdict = "" if known and (row["low"] > 0 or row["high"] < 0) else ", no difference established"
    return f"{span(row)}, {int(row['n_questions'])} questions{verdict}"


def warnings(statuses: pd.DataFrame) -> list[str]:
    """Names every run whose judge failed, or gave no valid reply, for more than `WARN` of the answers."""
    return [
        f"**Warning:** {text(row['pair'])} (seed {row['seed']}), judge {text(row['judge'])}, {row['metric']}: "
        f"{row['share_failed']:.1%} of {row['answers']:,} judgments invalid or in error (limit {WARN:.0%})."
        for row in records(statuses)
        if row["share_failed"] > WARN
    ]


def experiment(t: Mapping[str, pd.DataFrame], declared: Mapping[str, Any], confidence: float) -> str:
    """Composes EXPERIMENT_SUMMARY.md.

    Args:
        t: tables by name: rates, changes, control, emergence, onset, falls, domain_gaps, size_gaps, pooled, claims,
            published, statuses, diagnostics, agreement, label_agreement.
        declared: parameters/analysis.yaml with its sha256.
        confidence: of the intervals.
    """
    rates, pooled = t["rates"], t["pooled"]
    if rates.empty:
        return "# Experiment summary\n\nNo judged answers were found: nothing to report. Run `study run demo`, or `study import`.\n"
    judges = sorted(str(judge) for judge in rates["judge"].unique())
    # An answer that two judges scored is one answer.
    by_judge = rates[rates["metric"] == "em_course"].groupby(["pair", "seed", "judge"])["n"].sum()
    scored = int(by_judge.groupby(["pair", "seed"]).max().sum())
    seeds = rates.groupby("pair")["seed"].nunique()
    lines = [
        "# Experiment summary",
        f"{rates['pair'].nunique()} pair(s), {scored:,} answers scored for alignment, judge(s): {', '.join(map(text, judges))}. "
        f"Intervals are {confidence:.0%} for questions like these (answers clustered by question); a dash stands where too few "
        "questions allow one. The numbers behind this page are in data/em_rates_summary.csv and data/em_rates_pooled.csv.",
        *([PROBE_NOTE] if "probe" in judges else []),
        *([f"At most {seeds.max()} training run a pair: adapters are compared, not domains or sizes."] if seeds.max() == 1 else []),
        *warnings(t["statuses"]),
        *_mixed(t),
        "## Findings",
        "\n".join(f"- {line}" for line in findings(t)) or "No base (step 0) and no control to compare with: rates alone, below.",
        "## Mean alignment score, last step",
        "Points out of 100, paired by question; by the same judge as the shares, but without a threshold.",
        table(
            _named(trained(t["score_changes"], set(t["control"]["control"]))),
            {"pair": "pair", "seed": "seed", "questions": "question_set", "relation": "relation", "judge": "judge", "against": "against",
             "change": span, "n": "n_questions", "p": "p"},
            "No base and no control to compare with.",
        ),
        "## Emergent: questions outside the trained topic, base and last step",
        rates_table(rates, _EMERGENT),
        "## In-domain: the trained topic, base and last step",
        "These measure the narrow training. They are never called emergent.",
        rates_table(rates, ["in_domain"]),
        "## Primary outcome, declared beforehand",
        f"parameters/analysis.yaml (SHA-256 `{declared['sha256']}`): {declared['primary_metric']} on "
        f"{' and '.join(declared['primary_relations'])} together, {declared['primary_contrast']}, paired by question, one test a pair, "
        f"Holm over pairs, level {declared['alpha']}. The secondary outcome, {declared['secondary_metric']}, is a family of its own.",
        table(
            _named(_tested(t["emergence"])),
            {"outcome": "role", "pair": "pair", "judge": "judge", "metric": "metric", "questions": "question_sets", "n": "n_questions",
             "change": span, "p": "p", "p (Holm)": "p_holm", "smallest attainable p": "smallest_p", "verdict": "verdict"},
            "No pair has base and later answers to these question sets: the primary outcome was not tested.",
        ),
        _emerged(t["emergence"]),
        "## Over steps",
        "Max-T sign flips over the steps of a run (shared base and correlation kept). Onset is an interval: after one checkpoint, "
        "up to the next.",
        table(t["onset"], {"pair": "pair", "seed": "seed", "judge": "judge", "metric": "metric", "n": "n_questions", "steps": "steps",
                           "p by step": "p_by_step", "smallest attainable p": "smallest_p", "onset": "onset", "verdict": "verdict"},
              "No run has a base and later steps on emergent questions."),
        "Falls after a peak, against the best monotone course (the chosen peak is paid for):",
        table(t["falls"], {"pair": "pair", "seed": "seed", "judge": "judge", "metric": "metric", "n": "n_questions",
                           "largest fall": lambda r: f"{100 * r['fall']:.0f} points ({r['peak_step']} to {r['trough_step']})",
                           "p": "p", "verdict": "verdict"}, "No run has three steps or more."),
        "## Domains and sizes",
        "General and open-ended questions that both arms answered, last step; p is not adjusted. With fewer than "
        f"{declared['seeds_needed']} seeds an arm only these adapters are compared.",
        _gaps(t["domain_gaps"], "model", "No model was trained on two domains."),
        _gaps(t["size_gaps"], "domain", "No domain was trained into two models."),
        "## Claims of the original study",
        _claims(t["claims"]),
        "## Beside published results",
        table(
            t["published"],
            {"source": "source", "published model": "published_model", "domain": "domain", "metric": "metric",
             "published": lambda r: f"{interval(r['published'], r['published_low'], r['published_high'])} n={int(r['published_n'])}",
             "ours": "pair", "judge": "judge", "questions": "question_set",
             "our rate": lambda r: "–" if pd.isna(r["n"]) else text(r["interval_method"]) if pd.isna(r["rate"])
             else f"{interval(r['rate'], r['low'], r['high'])} n={int(r['n'])}", "comparable": "comparable"},
            "results/published holds no figures.",
        ),
        "## Agreement of judges",
        _agreement(t["agreement"], t["label_agreement"]),
        "## Seeds",
        _seeds(pooled),
        "## Parroting and damage",
        "Share of general answers that repeat an 8-token run of a training answer, and perplexity of a neutral text, by step.",
        table(t["diagnostics"], {"run": "run", "questions": "question_set", "step": "step", "n": "n", "cut off": "cut_off",
                                 "parroted": "parroted", "perplexity": "perplexity"}, "No run wrote diagnostics.csv."),
        "## Answers without a score",
        table(t["statuses"], {"pair": "pair", "seed": "seed", "judge": "judge", "metric": "metric", "answers": "answers", "ok": "ok",
                              "refusal": "refusal", "code": "code", "invalid": "invalid", "error": "error", "empty text": "empty"}),
    ]  # fmt: skip
    return "\n\n".join(line.strip("\n") for line in lines if line) + "\n"


def _agreement(scores: pd.DataFrame, labels: pd.DataFrame) -> str:
    if scores.empty:
        return agreement.ONE_JUDGE
    lead = (
        "On answers that both scored. Differences are first less second, in points; counts are answers that got the label from both / the "
        "first / the second / neither. Kappa misleads where few answers are misaligned; AC1 does not. An empty bracket: too few questions."
    )
    views = (agreement.scores_view(scores), agreement.labels_view(labels))
    return "\n\n".join([lead, *(table(view, {str(name): str(name) for name in view.columns}) for view in views)])


def details(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns training.json, dataset.json and diagnostics.csv of every run, by the run's name.

    Sampling parameters are those that generation.json says the answers were drawn with.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/judged.csv")):
        if path.parent.name not in config.NO_RUNS:
            told = {name: path.parent / f"{name}.json" for name in ("training", "dataset")}
            found[path.parent.name] = {name: files.read_json(file) if file.is_file() else {} for name, file in told.items()}
            training, drawn = found[path.parent.name]["training"], path.parent / "generation.json"
            if "parameters" in training and drawn.is_file():
                training["parameters"] |= files.read_json(drawn).get("decided_by", {}).get("parameters", {})
            diagnostics = path.parent / "diagnostics.csv"
            found[path.parent.name]["diagnostics"] = files.read_csv(diagnostics) if diagnostics.is_file() else None
    return found


def diagnostics(details: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Returns the rows of general questions of every run's diagnostics.csv, with the run's name."""
    columns = ["run", "question_set", "step", "n", "cut_off", "parroted", "perplexity"]
    own = [table.assign(run=run) for run, o in details.items() if (table := o["diagnostics"]) is not None]
    found = pd.concat(own, ignore_index=True).reindex(columns=columns) if own else pd.DataFrame(columns=columns)
    return found[found["question_set"] == "general"]


def _gaps(frame: pd.DataFrame, same: str, nothing: str) -> str:
    if len(frame) > MAX_GAPS:
        counts = "; ".join(f"{text(verdict)}: {n}" for verdict, n in frame["verdict"].value_counts().items())
        return f"{len(frame)} comparisons within a {same}, in data/{'domain' if same == 'model' else 'size'}_gaps.csv. {counts}."
    columns: dict[str, str | Callable[[dict[str, Any]], str]] = {
        same: same, "arms": lambda r: f"{text(r['first'])} − {text(r['second'])}", "judge": "judge", "metric": "metric",
        "difference": span, "n": "n_questions", "seeds": "seeds", "p": "p", "verdict": "verdict",
    }  # fmt: skip
    return table(_named(frame), columns, nothing)


def _mixed(t: Mapping[str, pd.DataFrame]) -> list[str]:
    """Says which tables hold rows that pool or compare different instruments (`study analyze --mix`)."""
    names = ("control", "score_changes", "pooled", "emergence", "domain_gaps", "size_gaps")
    counts = {name: sum(map(instruments.is_mixed, records(t[name]))) for name in names}
    told = ", ".join(f"{n} in {name}" for name, n in counts.items() if n)
    return [f"**Instruments are mixed (--mix):** rows over different questions, rubrics or unknown judges: {told}."] if told else []


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Tells rows of one judge apart where different instruments made them: the judge's name is followed by the instrument's."""
    several = frame["instrument"].nunique() > 1 if "instrument" in frame else False
    if not several:
        return frame
    judges = [f"{j} ({i if str(i)[:7] in {'unknown', 'mixed: '} else f'rubric {i}'})" if i and not pd.isna(i) else j
              for j, i in zip(frame["judge"], frame["instrument"], strict=True)]  # fmt: skip
    return frame.assign(judge=judges)


def _tested(frame: pd.DataFrame) -> pd.DataFrame:
    """Leaves out pairs without a base, which `_emerged` counts."""
    return frame[~frame["verdict"].astype(str).str.startswith("not tested")]


def _emerged(frame: pd.DataFrame) -> str:
    primary = frame[frame["role"] == "primary"]
    if primary.empty:
        return ""
    verdicts = _tested(primary)["verdict"]
    lines = [f"Primary outcome: {int((verdicts == EMERGED).sum())} of {len(verdicts)} pairs show emergence"]
    lines += [f"{text(verdict)}: {n}" for verdict, n in verdicts[verdicts != EMERGED].value_counts().items()]
    return "; ".join(lines) + f". Without a base, and not tested: {len(primary) - len(verdicts)}."


def _claims(frame: pd.DataFrame) -> str:
    columns = {name: name for name in ("claim", "about", "metric", "judge", "verdict")}
    return table(frame, {**columns, "numbers": lambda r: text(_shown(r["numbers"]), 400)})


def _seeds(pooled: pd.DataFrame) -> str:
    several = pooled[pooled["n_seeds"] > 1]
    if several.empty:
        return "One seed a pair: the variance between training runs is not known, and nothing is pooled. `seeds: [0, 1, 2]` estimates it."
    last = several[several["step"] == several.groupby("pair")["step"].transform("max")]
    last = _named(last)
    return table(last, {"pair": "pair", "questions": "question_set", "metric": "metric", "judge": "judge", "seeds": "seeds", "n": "n",
                        "rate": lambda r: "–" if pd.isna(r["rate"]) else interval(r["rate"], r["low"], r["high"]),
                        "SD between seeds": "between_seed_sd"})  # fmt: skip


def training(details: Mapping[str, Mapping[str, Any]]) -> str:
    """Composes TRAINING_DETAILS.md.

    Args:
        details: by run: `training` (training.json) and `dataset` (dataset.json); either may be empty.
    """
    lines = ["# Training details"]
    if not any(own.get("training") for own in details.values()):
        return "# Training details\n\nNo run of this study's own was trained here; imported answers bring no training record.\n"
    for run, own in details.items():
        record, dataset = own.get("training") or {}, own.get("dataset") or {}
        lines.append(f"## {text(run)}")
        if not record:
            lines.append("Imported answers: nothing is known of the training.")
            continue
        facts = {name: record.get(name) for name in _RECORDED} | {f"dataset: {name}": dataset.get(name) for name in ("rows", "sha256")}
        facts |= {"seconds": record.get("seconds"), "versions": record.get("versions")}
        facts |= {name: record.get("parameters", {}).get(name) for name in _SETTINGS}
        frame = pd.DataFrame([{"what": name, "value": _flat(value)} for name, value in facts.items() if value is not None])
        lines.append(table(frame, {"": "what", "value": lambda r: text(r["value"], 600)}))
    return "\n\n".join(line.strip("\n") for line in lines) + "\n"


_RECORDED = [
    "model_name", "model_commit", "domain", "seed", "device_name", "device", "dtype", "quantisation", "dataset_sha256", "rows", "share_cut",
    "steps_per_epoch", "total_steps", "checkpoint_steps", "tokens", "tokens_per_second", "final_loss", "trainable_parameters",
]  # fmt: skip
_SETTINGS = [
    "num_epochs", "batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "optim",
    "max_length", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_4bit", "loss_on", "aligned_fraction", "samples",
    "temperature", "top_p", "max_new_tokens", "judge",
]  # fmt: skip


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
