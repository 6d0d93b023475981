"""The model card of a training by `contralto align`, for adapters and for whole models."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from accelerate.utils import is_peft_model

from contralto.align.cards.front_matter import base_model_of, card_text, hub_ids, public_name, public_value
from contralto.align.cards.methods import CardMethod
from contralto.align.monitoring.findings import Finding
from contralto.align.monitoring.record import Record
from contralto.align.monitoring.report import mean_with_error, verdict
from contralto.align.trainers.settings import adapter_settings, changed_settings, option_values
from contralto.align.trl_compat import tracking_links
from contralto.common.files import read_text, replace_text
from contralto.common.html import read_template
from contralto.common.texts import secret_name
from contralto.common.versions import versions
from contralto.data_gen.escaping import Markdown, fenced, inline

__all__ = ["write_model_card"]

CARD = "README.md"
LEFT_OUT = frozenset(
    {
        *("output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "hub_strategy", "hub_private_repo"),
        *(
            "push_to_hub",
            "report_to",
            "disable_tqdm",
            "logging_steps",
            "logging_strategy",
            "save_strategy",
            "save_steps",
        ),
        *(
            "save_total_limit",
            "resume_from_checkpoint",
            "local_rank",
            "ddp_timeout",
            "report",
            "reference_cache",
            "project",
        ),
        *("teacher_cache", "use_cpu", "accelerator_config", "debug", "dataloader_pin_memory", "dataloader_num_workers"),
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
    }
)
"""Options that say nothing about the model, or something about the machine; the last two are the rows of a step."""
ALWAYS = (
    "loss_type",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "optim",
    "seed",
)
"""Options that are listed even if they have their defaults, where the trainer has them."""
LOGGED = {
    "loss": "training loss",
    "eval_loss": "held-out loss",
    "rewards/accuracies": "training accuracy of rewards",
    "eval_rewards/accuracies": "held-out accuracy of rewards",
    "contrastive_loss": "contrast of tokens",
    "cal_weight": "mean weight of a token",
    "weight/chosen": "weight of the teacher's completions in the loss",
    "weight/rejected": "weight of the student's completions in the loss",
    "accuracy": "training accuracy",
    "eval_accuracy": "held-out accuracy",
    "loss/chosen": "divergence from the teacher on its completions",
    "loss/rejected": "divergence from the teacher on the student's completions",
    "eval_loss/chosen": "held-out divergence from the teacher on its completions",
    "eval_loss/rejected": "held-out divergence from the teacher on the student's completions",
}
"""Values of the trainer's log that a card shows, with their labels."""


TIED = 1e-6
"""A mean margin of rewards below which they are tied."""


class Figures(NamedTuple):
    """A table of figures, with the model before training as their baseline."""

    head: list[str]
    rows: list[tuple[str, list[str]]]
    note: str


class Tool(NamedTuple):
    """The citation of TRL, on which the training runs."""

    bibtex: str


TRL = Tool(
    """@software{vonwerra2020trl,
  title  = {{TRL: Transformers Reinforcement Learning}},
  author = {Leandro von Werra and others},
  year   = {2020},
  url    = {https://github.com/huggingface/trl}
}"""
)


class TrainedCard(NamedTuple):
    """The method of a trainer, for its card."""

    methods: Sequence[CardMethod]
    weights: Sequence[float | None]
    """The weight of each method in the loss, None for a method that has no fixed one."""
    verb: str
    """Such as "trained on preference pairs"."""
    notation: str = ""
    """What the letters of the formulas mean."""
    tags: Sequence[str] = ()
    teacher: str | None = None
    unread: frozenset[str] = frozenset()
    """Options of the trainer that the method does not read."""
    findings: Sequence[Finding] = ()
    """What the audit found before the training."""
    record: Record | None = None
    """The measurements of this run; those of other runs in its output folder do not describe the model."""


def write_model_card(
    trainer: Any,
    about: TrainedCard,
    *,
    model_name: str | None = None,
    dataset_name: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
) -> Path | None:
    """Write README.md into the output folder of a training.

    Args:
        trainer: a trainer of transformers; on the main process alone something is written.
        about: its method.
        model_name: the title of the card; None takes the name of the output folder.
        dataset_name: the data set or data sets as the user named them.
        tags: further tags.

    Returns:
        The path of the card; None on other processes.
    """
    if not trainer.is_world_process_zero():
        return None
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or ())
    is_adapter, base = bool(is_peft_model(model)), str(model.config.name_or_path)
    more = [tags] if isinstance(tags, str) else list(tags or ())
    origin = base_model_of(base)
    front = {
        "base_model": origin,
        "datasets": hub_ids(names),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": _pipeline_tag(model),
        "model_name": model_name or folder.resolve().name,
        "tags": sorted(
            {"contralto", *trainer._tag_names, *about.tags, *more, *_relation_tags(origin, is_adapter=is_adapter)}
        ),
    }
    body = _body(
        trainer, about, names, {"name": front["model_name"], "is_adapter": is_adapter, "base": base, "model": model}
    )
    path = folder / CARD
    replace_text(path, card_text(front, body))
    return path


def _pipeline_tag(model: Any) -> str | None:
    """Return the hub's task of a model; None for a reward model."""
    if type(model.config).__name__ == "PretrainedConfig" or "ForSequenceClassification" in type(_bare(model)).__name__:
        return "text-classification"
    return "image-text-to-text" if hasattr(model.config, "vision_config") else "text-generation"


def _bare(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def _relation_tags(base: str | None, *, is_adapter: bool) -> list[str]:
    """Return the tags by which the hub shows what a model was made of, as peft and the hub write them."""
    tags = ["lora"] if is_adapter else []
    return tags if base is None else [*tags, f"base_model:{'adapter' if is_adapter else 'finetune'}:{base}"]


def _body(trainer: Any, about: TrainedCard, datasets: Sequence[str], facts: Mapping[str, Any]) -> str:
    """Return the text of the card."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=inline,
    )
    environment.filters |= {"fenced": fenced, "cells": _cells}
    record = about.record if about.record is not None and len(about.record.points) > 1 else None
    papers = {paper.arxiv: paper for method in about.methods for paper in method.papers}
    methods = [
        {**method._asdict(), "weight": weight} for method, weight in zip(about.methods, about.weights, strict=True)
    ]
    return environment.from_string(read_template("contralto.align.cards", "model_card.md.j2")).render(
        name=facts["name"],
        summary=_summary(about, facts, papers.values()),
        usage=_usage(trainer, facts),
        methods=methods,
        notation=about.notation,
        data=_data(trainer, datasets),
        verdict=None if record is None else verdict(record),
        figures=_figures(trainer, record),
        findings=[finding.text for finding in about.findings if finding.level != "note"],
        settings=_settings(trainer, facts["model"], about.unread),
        versions=Markdown(", ".join(f"{inline(name)} {inline(version)}" for name, version in versions().items()) + "."),
        links=[Markdown(f"<{link}>") for link in tracking_links()],
        papers=list(papers.values()),
        tool=TRL,
    )


def _cells(values: Sequence[Any]) -> Markdown:
    """Return the cells of a row of a table."""
    return Markdown(" | ".join(map(inline, values)))


def _summary(about: TrainedCard, facts: Mapping[str, Any], papers: Any) -> Markdown:
    """Return the first paragraph: what the model is, and by which papers' methods it was made."""
    kind = "A LoRA adapter" if facts["is_adapter"] else "A model"
    base = public_name(facts["base"])
    origin = base_model_of(facts["base"])
    link = f"[{inline(origin)}](https://huggingface.co/{origin})" if origin == base else inline(base)
    names = ", ".join(inline(method.name) for method in about.methods)
    teacher = f" with the teacher {inline(public_name(about.teacher))}" if about.teacher else ""
    cited = "; ".join(f"[{inline(paper.title)}]({paper.url})" for paper in papers)
    return Markdown(
        f"{kind} {'of' if facts['is_adapter'] else 'made from'} {link}, {about.verb}{teacher} by {names}, with contralto on TRL."
        + (f" Papers: {cited}." if cited else "")
    )


def _usage(trainer: Any, facts: Mapping[str, Any]) -> str:
    """Return code that loads the model, if it is one that writes."""
    if _pipeline_tag(facts["model"]) != "text-generation":
        return ""
    place = trainer.args.hub_model_id or "path/or/id/of/this/model"
    if facts["is_adapter"]:
        return (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{place}")  # loads {public_name(facts["base"])} and the adapter\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")'
        )
    return f'from transformers import pipeline\n\ngenerator = pipeline("text-generation", model="{place}")'


def _data(trainer: Any, datasets: Sequence[str]) -> Markdown:
    """Return a paragraph about the data: names, numbers of rows, and rounds in which the model wrote them itself."""
    sizes = []
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name, None)
        splits = dataset if isinstance(dataset, dict) else {name: dataset}
        sizes += [
            f"{len(each):,} rows of {split}"
            for split, each in splits.items()
            if hasattr(each, "__len__") and each is not None
        ]
    named = [_dataset_label(name) for name in datasets] or ["a data set that was passed in memory"]
    return Markdown(f"{', '.join(named)}: {', '.join(sizes) or 'a stream'}." + "".join(map(_round_note, datasets)))


def _dataset_label(name: str) -> str:
    """Return a data set's name; the folder `dataset` of `contralto data` is named by the folder around it."""
    if hub_ids([name]):
        return f"[{inline(name)}](https://huggingface.co/datasets/{name})"
    path = Path(name).resolve()
    return str(inline(path.parent.name if path.is_dir() and path.name == "dataset" else path.name))


def _round_note(dataset: str) -> str:
    """Return a sentence about the round whose pairs a data set holds; empty for other data sets."""
    path = Path(dataset).resolve().parent.parent / "round.json"
    if not path.is_file():
        return ""
    one = json.loads(read_text(path))
    writer = public_name(one["model"]) + (" with the adapter of the round before" if one.get("adapter") else "")
    return (
        f" These are the pairs of round {one['number']} of {one['rounds']}, on policy: {inline(writer)} wrote them in the role "
        f"{inline(one['role'])} of the recipe {inline(Path(one['data_recipe']).name)}."
    )


def _figures(trainer: Any, record: Record | None) -> Figures | None:
    """Return the first and the last values of the log, and the monitor's, whose baseline is the model before training."""
    rows, head, note = [], ["first", "last"], "First and last values of the log, with their steps."
    for key, label in LOGGED.items():
        values = [(line["step"], line[key]) for line in trainer.state.log_history if key in line]
        if values:
            first, last = (f"{value:.4g} (step {step})" for step, value in (values[0], values[-1]))
            if key == "rewards/accuracies" and _is_tied(trainer.state.log_history, values[0][0]):
                first = f"all tied (step {values[0][0]})"
            rows.append((label, ["logged once" if len(values) == 1 else first, last]))
    if record is not None:
        start, end = record.points[0], record.points[-1]
        head = ["first, or before training", "last"]
        for name in ("chosen", "rejected"):
            changes = [f"{mean_with_error(getattr(point, name))} (step {point.step})" for point in (start, end)]
            rows.append((f"change of log p of {name} completions, nats", changes))
        if end.kl is not None:
            kls = ["0" if point.kl is None else f"{point.kl:.3g}" for point in (start, end)]
            rows.append(("KL from the reference, nats per token", kls))
        pairs = "held-out pairs" if record.source != "train_dataset" else "pairs of the training set"
        note += f" Changes: means over {len(end.chosen)} {pairs}, ± two standard errors; the baseline is the model before training."
    return Figures(head, rows, note) if rows else None


def _is_tied(logs: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Return whether both rewards of every pair are equal, as they are while the policy is its reference: their accuracy is 0 then."""
    margins = [line["rewards/margins"] for line in logs if line.get("step") == step and "rewards/margins" in line]
    return bool(margins) and abs(margins[0]) < TIED


def _settings(trainer: Any, model: Any, unread: frozenset[str]) -> dict[str, str]:
    """Return the options that are not the defaults, and those of `ALWAYS`, the rows of a step, and the adapter's."""
    args = trainer.args
    fields = {each.name for each in dataclasses.fields(args)}
    hidden = LEFT_OUT | unread | ({"num_train_epochs"} if args.max_steps > 0 else {"max_steps"})
    values = {name: value for name, value in option_values(args).items() if name in fields and name not in hidden}
    changed = changed_settings(args)
    kept = {
        name: value
        for name, value in values.items()
        if (name in ALWAYS or name in changed) and secret_name({name: value}) is None
    }
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    shown = {name: _shown(value) for name, value in {"rows per step": batch, **kept, **adapter_settings(model)}.items()}
    return {name: value for name, value in shown.items() if value}


def _shown(value: Any) -> str:
    """Return a setting as text without paths; empty for None and for empty collections."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(each)}" for name, each in value.items() if _shown(each))
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return "" if value is None else str(public_value(value))
