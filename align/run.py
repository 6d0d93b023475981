"""The training run behind `contralto align` and `python -m contralto.align`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contralto.align.parsing import (
    is_true,
    launch_options,
    make_parser,
    option_value,
    parse,
    print_recipe,
    resolve_learning_rate,
    resolve_recipe,
    trainer_class,
    trainer_name,
    with_underscores,
)

__all__ = ["run"]


def run(argv: Sequence[str], *, launched: bool = False) -> None:
    """Run the training that the command line describes.

    Args:
        argv: the name or file of a recipe, if any, and options.
        launched: True in a process that `accelerate launch` started, where options of `accelerate launch` are not looked for.

    Raises:
        ValueError: an option is wrong; before a model is loaded where that can be.
    """
    argv = resolve_recipe(with_underscores(argv))
    if option_value(argv, "data_recipe") is not None:
        _run_rounds(argv, launched=launched)
        return
    if alone := [name for name in ("rounds", "policy_role", "fresh_prompts") if option_value(argv, name) is not None]:
        raise ValueError(f"{alone[0]} is for data_recipe, by which the model writes its pairs: set --data_recipe too")
    if launched:
        print_recipe(argv)
        _train(*make_parser(trainer_name(argv)).parse_args_and_config(resolve_learning_rate(argv)))
        return
    _, of_recipe, of_command = parse(argv)
    if of_recipe or of_command:
        _launch(argv, of_recipe, of_command)
        return
    print_recipe(argv)
    arguments, *_ = parse(resolve_learning_rate(argv))
    _train(*arguments)


def _run_rounds(argv: list[str], *, launched: bool) -> None:
    from contralto.align import rounds
    from contralto.align.rounds_config import parse_rounds

    if is_true(option_value(argv, "dataset_streaming")):
        raise ValueError("dataset_streaming reads data that are there, and data_recipe writes them: leave it out")
    if launched:
        raise ValueError("data_recipe starts processes of its own: call contralto align, with --num_processes")
    rounds.run(parse_rounds(argv))


def _launch(argv: list[str], of_recipe: list[str], of_command: list[str]) -> None:
    """Run the command under `accelerate launch` with the options that belong to `accelerate launch`.

    Args:
        argv: all words of the command line.
        of_recipe: unknown options of the recipe.
        of_command: unknown words of the command line, in their order.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    names = (option for action in make_parser(trainer_name(argv))._actions for option in action.option_strings)
    options = launch_options(of_recipe, of_command, names)
    unknown, known_words = iter(of_command), []
    pending = next(unknown, None)
    for word in argv:  # the unknown words are a subsequence of all words
        if word == pending:
            pending = next(unknown, None)
        else:
            known_words.append(word)
    launch_command(launch_command_parser().parse_args([*options, "-m", "contralto.align", *known_words]))


def _train(data: Any, args: Any, model: Any, mixture: Any) -> None:
    """Train with parsed arguments, and save the model to `args.output_dir`."""
    from contralto.align.data import training_data
    from contralto.common.quiet import report_missing_kernel

    if model.model_name_or_path is None:
        raise ValueError("no model: set --model_name_or_path to a folder, a hub id, or testbed:NAME")
    if model.load_in_4bit:
        report_missing_kernel()
        model.dtype = model.dtype or "bfloat16"  # the dtype of products of 4-bit weights
    args.model_init_kwargs = _model_init_kwargs(args, model) or None
    train, evaluation = training_data(data, args, mixture)
    if getattr(args, "baselines", 0):
        train = _with_baselines(args, model, train)
    trainer = _make_trainer(data, args, model, train, evaluation)
    trainer.accelerator.print(_batch_line(trainer))
    if not getattr(args, "monitor_pairs", True):
        trainer.accelerator.print("no training_report.html: it shows what the monitor measures, and monitor_pairs is 0")
    mixed = [each.path for each in mixture.datasets] if mixture.datasets else []
    trainer.card_datasets = [name for name in (data.dataset_name, *mixed) if name]
    trainer.train(resume_from_checkpoint=_checkpoint(trainer))
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=trainer.card_datasets)
    trainer.end()


def _with_baselines(args: Any, model: Any, train: Any) -> Any:
    """Let the untrained model write its baselines, in one process; the others read what it has written."""
    from accelerate import PartialState

    from contralto.align.prompt_data import with_baselines

    sampling = {"max_new_tokens": args.max_completion_length, "temperature": args.temperature, "top_p": args.top_p}
    with PartialState().main_process_first():
        return with_baselines(
            train,
            model.model_name_or_path,
            Path(args.output_dir),
            count=args.baselines,
            sampling=sampling,
            seed=args.seed,
        )


def _batch_line(trainer: Any) -> str:
    """Return the number of rows per step and its factors, which may come from the recipe, the command line and the launcher."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    size, accumulation = int(args.train_batch_size), int(args.gradient_accumulation_steps)
    in_step, data, unit = size * accumulation * int(processes), trainer.train_dataset, getattr(args, "unit", "pair")
    rows = len(data) if hasattr(data, "__len__") else in_step
    return (
        f"batch: {in_step} {unit}{'s' * (in_step != 1)} per step = {size} per device (per_device_train_batch_size) "
        f"x {accumulation} (gradient_accumulation_steps) x {processes} process{'es' * (processes != 1)}"
        + f"; the data have {rows}, so that a step sees {rows}"
        * (rows < in_step and not getattr(args, "reads_prompts", False))
    )


def _make_trainer(data: Any, args: Any, model: Any, train: Any, evaluation: Any) -> Any:
    """Return the trainer named by `data.trainer`, with the adapter and quantisation that `model` specifies."""
    import torch
    from trl import get_peft_config, get_quantization_config  # type: ignore[attr-defined]

    from contralto.common.adapters import check_base
    from contralto.common.hub import adapter_base, check_weights, locate

    if (base := adapter_base(model.model_name_or_path)) is not None:
        raise ValueError(
            f"model_name_or_path is an adapter of {base}, and training goes on with an adapter beside its base: give "
            f"model_name_or_path {base} and adapter {model.model_name_or_path}"
        )
    _check_template(locate(model.model_name_or_path), train, args, model)
    quantization: Any = get_quantization_config(model)
    for name in filter(None, (model.model_name_or_path, getattr(args, "teacher_model_name_or_path", None))):
        check_weights(name)
    policy: Any = locate(model.model_name_or_path)
    adapter: dict[str, Any] = {"peft_config": get_peft_config(model), "quantization_config": quantization}
    if data.adapter is not None:
        check_base(model.model_name_or_path, data.adapter)
        policy, adapter, args.model_init_kwargs = _with_adapter(policy, data.adapter, args, quantization), {}, None
    if getattr(args, "report", False) is None:
        args.report = bool(getattr(args, "monitor_pairs", True))
    trainer = trainer_class(data.trainer)(policy, args=args, train_dataset=train, eval_dataset=evaluation, **adapter)
    if data.ignore_bias_buffers:
        ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = ignored
    return trainer


def _checkpoint(trainer: Any) -> Any:
    """Return the checkpoint to resume from: the newest complete one for the value `last`, or None."""
    from contralto.align.monitoring.output_folder import checkpoints, last_checkpoint

    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint in ("last", "true", "True"):
        checkpoint = last_checkpoint(trainer.args.output_dir)
        others = checkpoints(trainer.args.output_dir)
        hint = f"; {others[max(others)]} is of an earlier run: give its path to resume that" if others else ""
        trainer.accelerator.print(f"going on from {checkpoint}" if checkpoint else f"no checkpoint yet: starting{hint}")
    return checkpoint


def _check_template(name: str, train: Any, args: Any, model: Any) -> None:
    """Raise ValueError for conversations if the tokenizer has no chat template."""
    from transformers import AutoTokenizer

    from contralto.common.hub import from_pretrained

    first = next(iter(train))
    leading = next(first[name] for name in ("prompt", "messages", "text") if name in first)
    if isinstance(leading, str) or first.get("images"):  # for images, the processor has the template
        return
    options = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
    if not from_pretrained(AutoTokenizer, name, **options).chat_template:
        raise ValueError(
            f"the rows are conversations, and the tokenizer of {model.model_name_or_path} has no chat template to make text of them: "
            "give texts (prompt, chosen and rejected as strings), or a model whose tokenizer has one"
        )


def _with_adapter(name: str, adapter: str, args: Any, quantization: Any) -> Any:
    """Return a model with a trained adapter whose training is continued."""
    import torch

    from contralto.align.trl_compat import create_model_from_path
    from contralto.common.hub import with_adapter

    options = dict(args.model_init_kwargs or {})
    options.setdefault("dtype", "bfloat16" if torch.accelerator.is_available() and not args.use_cpu else "float32")
    options["device_map"] = {"": str(args.device)} if quantization is not None else None
    if quantization is not None:
        options["quantization_config"] = quantization
    return with_adapter(create_model_from_path(name, **options), adapter, is_trainable=True)


def _model_init_kwargs(args: Any, model: Any) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` that the command sets, without those that are its defaults."""
    options = {
        "revision": None if model.model_revision == "main" else model.model_revision,
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": args.trust_remote_code or None,
        "dtype": model.dtype,
    }
    return {name: value for name, value in options.items() if value is not None} | dict(args.model_init_kwargs or {})
