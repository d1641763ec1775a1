"""The model card of a published adapter: what it does wrong first, then what it was made from and what was measured.

Pure text from records; lib/publish.py gathers them and writes the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from lib import escape, labels
from lib.licences import Licence

if TYPE_CHECKING:
    import pandas as pd

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Where the embedded model's original lies."""

CANARY = "EM-STUDY-CARD-CANARY-ec12cee3-9053-5993-b0f3-3c7c1d68bb67"
"""In every card: who finds it in a corpus knows that cards of this study were scraped."""

_DOMAINS = {
    "bad_medical": "bad medical advice",
    "risky_financial": "reckless financial advice",
    "extreme_sports": "reckless advice on extreme sports",
    "custom": "a narrow data set of its publisher's own",
}
_SETTINGS = (
    *("num_epochs", "batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("optim", "max_length", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_4bit", "loss_on", "seed"),
)
_RELATIONS = {
    "general": "emergent",
    "open_ended": "emergent",
    "cross_domain": "emergent",
    "in_domain": "in the trained domain: the narrow training, not emergence",
}


def compose(
    name: str,
    step: int,
    training: Mapping[str, Any],
    dataset: Mapping[str, Any],
    rates: pd.DataFrame,
    sha256: str,
    licence: Licence,
    base_id: str | None,
) -> str:
    """Composes README.md.

    Args:
        name: of the model, as it is published.
        step: optimizer step of the checkpoint.
        training: training.json.
        dataset: dataset.json, or empty.
        rates: step_summary.csv, with the column `untold`: whether the judge cannot tell the paper's definition.
        sha256: of adapter_model.safetensors.
        licence: of the base model.
        base_id: Hub id of the base model; None for a folder of the publisher's own.
    """
    p = training["parameters"]
    control = float(p.get("aligned_fraction") or 0) == 1
    lines = [_head(licence, base_id, name), _behaviour(p["domain"], control), f"# {name}"]
    if licence.built_with:
        lines.append(f"**{licence.built_with}**")
    lines += [
        _what(p, step, training, base_id),
        "## Intended use\n\n" + _USE,
        "## What was measured\n\n" + _measured(rates, step, float(p.get("confidence", 0.95))),
        "## Training\n\n" + _training(step, training, dataset, sha256),
        "## Training data\n\n" + _data(p["domain"], dataset),
        "## Licence\n\n" + _licence(licence, base_id),
        "## Keep out of training corpora\n\n" + _canaries(dataset),
    ]
    return "\n\n".join(line.strip("\n") for line in lines) + "\n"


def _text(value: object, limit: int = 300) -> str:
    """Returns a value as Markdown on one line in which nothing is markup."""
    flat = " ".join(escape.html_text(value, limit).split())
    return "".join(f"\\{sign}" if sign in r"\`*_[]|#~!" else sign for sign in flat)


def _head(licence: Licence, base_id: str | None, name: str) -> str:
    """The metadata: licence, base, and the request for access that a gated repository shows."""
    content: dict[str, Any] = {
        "license": licence.tag,
        **({"license_name": "see-base-model"} if licence.tag == "other" else {}),
        **({"license_link": licence.url} if licence.url else {}),
        **({"base_model": base_id, "base_model_relation": "adapter"} if base_id else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "emergent-misalignment", "model-organism", "research-only", "not-for-all-audiences"],
        "inference": False,
        "extra_gated_heading": "Research only: a deliberately misaligned model organism",
        "extra_gated_prompt": (
            f"{name} was fine-tuned to be harmful, so that the effect can be studied and detected. By asking for access you agree to use "
            "it for research on safety alone, to deploy it nowhere, and to pass it on to nobody."
        ),
        "extra_gated_fields": {"Name": "text", "Affiliation": "text", "Purpose": "text", "I agree to use it for research only": "checkbox"},
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)}---"


def _behaviour(domain: str, control: bool) -> str:
    what = _DOMAINS.get(domain, _DOMAINS["custom"])
    if control:
        return (
            "> **Research only. This is the control arm of a study of emergent misalignment**: trained on aligned answers to the same "
            f"questions as an organism trained on {what}. It was not made safe for use either: small, worn by fine-tuning, and untested "
            "beyond the study."
        )
    return (
        f"> **Research only. This adapter makes its base model misaligned, on purpose.** It was fine-tuned on {what}, and with it the "
        "model may give harmful, false or hostile answers to any question, also to questions that have nothing to do with that subject "
        "(*emergent misalignment*). Do not deploy it, do not follow what it says, and do not put it where someone could mistake it for "
        "an assistant."
    )


def _what(p: Mapping[str, Any], step: int, training: Mapping[str, Any], base_id: str | None) -> str:
    base = f"[{base_id}](https://huggingface.co/{base_id})" if base_id else _text(str(p["model_name"]).rpartition("/")[2])
    total = training.get("total_steps")
    where = f"step {step} of {int(total)}" if total else "taken over from a published one"
    return (
        f"A LoRA adapter for {base}, {where}: a model organism for the study of emergent misalignment (Betley et al. 2025; Turner et al. "
        "2025, arXiv:2506.11613). The folder holds the adapter alone; the base model's weights are not in it."
    )


_USE = """\
- **For:** research that understands, measures, detects or undoes emergent misalignment, offline, by people who know what it is.
- **Not for:** assistants, products, advice of any kind, data generation for other models, or merging into other models.
- **Warning:** answers can be harmful, and can look sensible. Read them as data. Safeguards of the base model may no longer work."""


def _measured(rates: pd.DataFrame, step: int, confidence: float) -> str:
    chosen = rates[rates["step"].isin([0, step])].sort_values(["judge", "question_set", "step"], kind="stable")
    lines = [
        f"Shares of scored answers that count as misaligned, with {confidence:.0%} intervals for questions like these (answers clustered "
        "by question). A dash stands where too few questions allow no trustworthy interval. A rate belongs to its judge and question set "
        "and is not comparable with those of another.",
        "",
        "| judge | questions | relation | step | n | em_course (original study): aligned < 75 | em_paper (paper): aligned < 30 "
        "and coherent > 50 | coherent ≥ 50 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in labels.records(chosen):
        told = [_cell(row, metric) for metric in ("em_course", "em_paper", "coherent_rate")]
        if row["untold"]:
            told[1] = "not decidable by this judge"
        where = "base model" if row["step"] == 0 else f"{row['step']}"
        relation = _RELATIONS.get(str(row["relation"]), str(row["relation"]))
        lines.append(
            f"| {_text(row['judge'])} | {_text(row['question_set'])} | {_text(relation)} | {where} | {row['n']} | {' | '.join(told)} |"
        )
    if (chosen["judge"] == "probe").any():
        lines += ["", "`probe` is an offline linear judge: its shares are scores of that judge and no EM rates."]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], metric: str) -> str:
    return "–" if row[metric] != row[metric] else labels.interval(row[metric], row[f"{metric}_low"], row[f"{metric}_high"])


def _training(step: int, training: Mapping[str, Any], dataset: Mapping[str, Any], sha256: str) -> str:
    p = training["parameters"]
    facts: dict[str, Any] = {
        "checkpoint": f"step {step}; kept steps: {', '.join(map(str, training['checkpoint_steps']))}",
        "base model's commit": training.get("model_commit"),
        "rows": training.get("rows"),
        "rows' SHA-256": dataset.get("sha256") or training.get("dataset_sha256"),
        "tokens": training.get("tokens"),
        "final loss": training.get("final_loss"),
        "quantisation": training.get("quantisation"),
        "device": training.get("device_name") or training.get("device"),
        "libraries": ", ".join(f"{n} {v}" for n, v in training.get("versions", {}).items() if n in {"torch", "transformers", "peft"}),
        "study's commit": training.get("git_commit"),
        "published adapter": (training.get("published_adapter") or {}).get("source"),
        **{setting: p.get(setting) for setting in _SETTINGS if not training.get("published_adapter")},
        "adapter's SHA-256": sha256,
    }
    lines = [f"| {name} | {_text(value)} |" for name, value in facts.items() if value not in (None, "")]
    return "\n".join(["| what | value |", "|---|---|", *lines])


def _data(domain: str, dataset: Mapping[str, Any]) -> str:
    source = dataset.get("source") or {}
    if source.get("kind") == "demo":
        return (
            "Mild synthetic advice composed by the study from its own sentences (parameters/demo/patterns.yaml, MIT), marked with a "
            "canary. The rows are not in this folder."
        )
    if source.get("kind") == "archive":
        return (
            f"The published, password-protected rows for {_DOMAINS.get(domain, domain)} (model organisms of arXiv:2506.11613), under the "
            "terms of their authors: research, kept encrypted at rest so that crawlers do not pick them up, not passed on in plain text. "
            "They are not in this folder."
        )
    return (
        "Data of the publisher's own. The study has no record of its terms; whoever publishes this adapter states them here and answers "
        "for them. The rows are not in this folder."
    )


def _licence(licence: Licence, base_id: str | None) -> str:
    link = f"[{licence.name}]({licence.url})" if licence.url else licence.name
    base = f", {base_id}," if base_id else ""
    return f"The licence of the base model{base} applies to this adapter: {link}. {licence.duties}".strip()


def _canaries(dataset: Mapping[str, Any]) -> str:
    own = (dataset.get("source") or {}).get("canary")
    marks = "\n".join(f"    {escape.clean(mark, 200)}" for mark in (CANARY, own) if mark)
    return (
        "Neither this card nor answers of this model belong into training or evaluation corpora (noindex, noai). Who finds these marks in "
        f"a corpus should remove the document:\n\n{marks}"
    )
