"""`contralto align`: train on pairs of texts, from a recipe, with the flags of `trl dpo`.

    contralto align apo_zero --model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl --use_peft --output_dir out
    contralto align distill --teacher_model_name_or_path Qwen/Qwen3-8B --model_name_or_path ... --dataset_name ... --output_dir out
    contralto align on_policy --data_recipe judged.yaml --rounds 3 --model_name_or_path ... --output_dir out
    contralto align my_recipe.yaml --learning_rate 1e-5
    accelerate launch -m contralto.align my_recipe.yaml

A recipe is a YAML file of flags, or the name of one that comes with contralto (`contralto.align.recipes`). Flags on the command line win.
Its key `trainer` says what is trained: `preference` (default) by `PreferenceTrainer`, `distill` by `DistillationPairTrainer`, `reward`
by `MarginRewardTrainer`; each has its own flags. Its key `lora_learning_rate` takes the place of `learning_rate` where an adapter is
trained and the command line gives no rate. Beyond `trl dpo`: models are also spelled `testbed:NAME`; a file, a folder or a data set in any
published form is read by `contralto.data_gen.dataset.load_pairs`, texts as texts unless `--conversations` is given, `--dataset_streaming` row
by row; `--eval_dataset_name` names other data to evaluate on; `--adapter` goes on training a LoRA adapter;
`--resume_from_checkpoint last` goes on with the newest whole checkpoint in `--output_dir`, or starts if there is none;
`--data_recipe` and `--rounds` let the model write the data itself, see `contralto.align.rounds`. Flags of `accelerate launch`, such as
`--num_processes`, are passed on to it, as `trl dpo` does.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from contralto.common.errors import guarded

__all__ = ["TRAINERS", "parse", "recipes", "run"]

TRAINERS = {
    "preference": (
        "contralto.align.trainers.preference:PreferenceTrainer",
        "contralto.align.trainers.config:PreferenceConfig",
    ),
    "distill": (
        "contralto.align.trainers.distillation:DistillationPairTrainer",
        "contralto.align.trainers.distillation_config:DistillationConfig",
    ),
    "reward": (
        "contralto.align.trainers.reward:MarginRewardTrainer",
        "contralto.align.trainers.reward:MarginRewardConfig",
    ),
}
"""What the key `trainer` may say: a trainer and its options."""


def recipes() -> dict[str, Path]:
    """The recipes that come with contralto, by name.

    Examples:
        >>> "apo_zero" in recipes()
        True
    """
    from contralto import align

    folder = Path(align.__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def run(argv: Sequence[str], *, launched: bool = False) -> None:
    """Train as the arguments say.

    Args:
        argv: a recipe's name or file, if any, and flags.
        launched: this process was started by `accelerate launch`, so flags of that are not looked for.

    Raises:
        ValueError: whatever is wrong, in one sentence; before a model is loaded where that can be.
    """
    argv = _with_recipe(list(argv))
    if told(argv, "data_recipe") is not None:
        from contralto.align import rounds as iterate

        if is_true(told(argv, "dataset_streaming")):
            raise ValueError("dataset_streaming reads data that are there, and data_recipe writes them: leave it out")

        if launched:
            raise ValueError("data_recipe starts processes of its own: call contralto align, with --num_processes")
        iterate.run(argv)
        return
    if alone := [flag for flag in ("rounds", "policy_role", "fresh_prompts") if told(argv, flag) is not None]:
        raise ValueError(
            f"{alone[0]} is for data_recipe, by which the model writes its pairs: give --data_recipe as well"
        )
    if launched:
        parsed = _parser(trainer_of(argv)).parse_args_and_config(_with_rate(argv))
    else:
        _, of_recipe, of_command = parse(argv)
        if of_recipe or of_command:
            _launch(argv, of_recipe, of_command)
            return
        parsed, *_ = parse(_with_rate(argv))
    _train(*parsed)


def parse(argv: list[str]) -> tuple[tuple[Any, ...], list[str], list[str]]:
    """Flags as data, training, model and mixture arguments; and the words that are not ours, of the recipe and of the command.

    Args:
        argv: with the recipe as `--config`.
    """
    *parsed, of_recipe, of_command = _parser(trainer_of(argv)).parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    return tuple(parsed), of_recipe, of_command


def trainer_of(argv: Sequence[str]) -> str:
    """What is to be trained: the flag `trainer`, or the recipe's key, or preferences.

    Args:
        argv: with the recipe as `--config`.

    Raises:
        ValueError: something else than `TRAINERS`.

    Examples:
        >>> trainer_of(["--beta", "0.1"]), trainer_of(["--trainer=distill"])
        ('preference', 'distill')
    """
    name: str | None = told(argv, "trainer")
    if name is not None and name not in TRAINERS:
        raise ValueError(f"there is no trainer {name!r}; there are {', '.join(TRAINERS)}")
    return name or "preference"


def told(argv: Sequence[str], flag: str) -> Any:
    """What a flag says, or else the recipe's key, or else None.

    Args:
        argv: with the recipe as `--config`.
        flag: without dashes.
    """
    looking = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for each in {flag, "config"}:
        looking.add_argument(f"--{each}", nargs="?", const="true")
    found, _ = looking.parse_known_args(list(argv))
    said = getattr(found, flag)
    return read_recipe(found.config).get(flag) if said is None and found.config is not None else said


def read_recipe(path: str) -> dict[str, Any]:
    """The keys of a recipe."""
    from contralto.common.yaml_file import read_yaml

    said = read_yaml(path)
    if not isinstance(said, dict):
        text = f"{path} holds no flags: a recipe is a YAML mapping such as `learning_rate: 1.0e-6`"
        raise ValueError(text)  # noqa: TRY004 (a wrong recipe is a ValueError like any other mistake in it)
    return said


def _named(name: str) -> Any:
    """What `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _with_recipe(argv: list[str]) -> list[str]:
    """The first argument, if it is no flag, as `--config`."""
    if not argv:
        return ["--help"]
    if argv[0].startswith("-"):
        return argv
    if "--config" in argv:
        raise ValueError(f"there are two recipes, {argv[0]} and that of --config: give one")
    path = recipes().get(argv[0], Path(argv[0]))
    if not path.is_file():
        raise ValueError(f"there is no recipe {argv[0]}: give a YAML file, or one of {', '.join(recipes())}")
    return ["--config", str(path), *argv[1:]]


def _with_rate(argv: list[str]) -> list[str]:
    """Add the learning rate for adapters, where one is trained and the command line gives no other rate.

    Raises:
        ValueError: a rate for adapters on the command line, and no adapter.
    """
    own = _without_recipe(argv)
    rate, trains = (
        told(argv, "lora_learning_rate"),
        is_true(told(argv, "use_peft")) or told(argv, "adapter") is not None,
    )
    if told(own, "lora_learning_rate") is not None and not trains:
        raise ValueError(
            "lora_learning_rate is for an adapter: give use_peft or adapter as well, or learning_rate instead"
        )
    if rate is None or not trains or told(own, "learning_rate") is not None:
        return argv
    if os.environ.get("RANK", "0") == "0":
        print(f"learning_rate {float(rate):g}: the recipe's for adapters; --learning_rate gives another")
    return [*argv, "--learning_rate", str(rate)]


def _without_recipe(argv: Sequence[str]) -> list[str]:
    """The words of the command line but for `--config`."""
    looking = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    looking.add_argument("--config", nargs="?")
    return looking.parse_known_args(list(argv))[1]


def is_true(said: Any) -> bool:
    """Whether a flag or a key of YAML says yes.

    Args:
        said: its value, or None.

    Examples:
        >>> is_true("True"), is_true(True), is_true("no"), is_true(None)
        (True, True, False, False)
    """
    return str(said).lower() in ("true", "1", "yes", "y", "t")


def _parser(trainer: str = "preference") -> Any:
    try:
        from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError("contralto align trains with TRL: pip install 'contralto[align]'") from error

    @dataclass
    class DataArguments(ScriptArguments):
        trainer: str = field(
            default="preference", metadata={"help": "What is trained, and by which flags.", "choices": list(TRAINERS)}
        )
        eval_dataset_name: str | None = field(
            default=None, metadata={"help": "Other data to evaluate on, spelled like dataset_name."}
        )
        conversations: bool = field(
            default=False,
            metadata={
                "help": "Make conversations of texts: the prompt is the user's turn, chosen and rejected are the assistant's. "
                "Otherwise texts stay texts, as with trl dpo."
            },
        )
        lora_learning_rate: float | None = field(
            default=None,
            metadata={
                "help": "Of a recipe: the learning rate where an adapter is trained and learning_rate is not given."
            },
        )
        adapter: str | None = field(
            default=None,
            metadata={"help": "A LoRA adapter of the model, which is trained on; use_peft is ignored then."},
        )
        data_recipe: str | None = field(
            default=None,
            metadata={
                "help": "A recipe of contralto data by which the model writes the pairs itself, round after round."
            },
        )
        rounds: int = field(default=1, metadata={"help": "Of data_recipe: how often to write and train."})
        policy_role: str | None = field(
            default=None,
            metadata={"help": "Of data_recipe: whose text the model writes (default: student, or else target)."},
        )
        fresh_prompts: bool = field(
            default=False, metadata={"help": "Of data_recipe: each round takes other prompts; otherwise all take all."}
        )

    @dataclass
    class ModelArguments(ModelConfig):
        dtype: str | None = field(
            default=None,
            metadata={
                "help": "The dtype of the weights (default: bfloat16 for an adapter on an accelerator, else float32).",
                "choices": ["auto", "bfloat16", "float16", "float32"],
            },
        )

    kinds: Any = (DataArguments, _named(TRAINERS[trainer][1]), ModelArguments, DatasetMixtureConfig)
    return TrlParser(
        kinds,
        prog="contralto align",
        usage="contralto align [RECIPE] [flags]",
        epilog=f"Recipes: {', '.join(recipes())}.",
    )


def _launch(argv: list[str], of_recipe: list[str], of_command: list[str]) -> None:
    """The same command under `accelerate launch`, which takes the flags that are not ours."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    flags = check_launch_flags(of_recipe, of_command)
    unknown, own = iter(of_command), []
    pending = next(unknown, None)
    for word in argv:  # what is not ours is a subsequence of what was given
        if word == pending:
            pending = next(unknown, None)
        else:
            own.append(word)
    launch_command(launch_command_parser().parse_args([*flags, "-m", "contralto.align", *own]))


def check_launch_flags(of_recipe: list[str], of_command: list[str]) -> list[str]:
    """The words that are not ours, as flags of `accelerate launch`.

    Raises:
        ValueError: one of them is no flag of that either.
    """
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    flags: list[str] = resolve_accelerate_config_argument(of_recipe + of_command)
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    if strange := [word for word in flags if word.startswith("--") and word.split("=")[0] not in known]:
        raise ValueError(f"{strange[0]} is no flag of contralto align or of accelerate launch; --help lists them")
    return flags


def _train(data: Any, args: Any, model: Any, mixture: Any) -> None:
    import torch
    from trl import get_peft_config, get_quantization_config  # type: ignore[attr-defined]

    from contralto.align.trainers.seams import last_checkpoint
    from contralto.common.hub import check_weights, locate

    if model.model_name_or_path is None:
        raise ValueError("which model? give --model_name_or_path: a folder, a hub id, or testbed:NAME")
    if model.load_in_4bit and model.dtype is None:
        model.dtype = "bfloat16"  # what four bits are multiplied in
    args.model_init_kwargs = _init_kwargs(args, model)
    train, evaluation = _datasets(data, args, mixture)
    _check_template(locate(model.model_name_or_path), train, args, model)
    quantization: Any = get_quantization_config(model)
    for name in filter(None, (model.model_name_or_path, getattr(args, "teacher_model_name_or_path", None))):
        check_weights(name)
    policy: Any = locate(model.model_name_or_path)
    adapter: dict[str, Any] = {"peft_config": get_peft_config(model), "quantization_config": quantization}
    if data.adapter is not None:
        policy, adapter, args.model_init_kwargs = _with_adapter(policy, data.adapter, args, quantization), {}, None
    if getattr(args, "report", False) is None:
        args.report = bool(args.monitor_pairs)
    trainer = _named(TRAINERS[data.trainer][0])(
        policy, args=args, train_dataset=train, eval_dataset=evaluation, **adapter
    )
    if data.ignore_bias_buffers:
        ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = ignored
    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("last", "true", "True"):
        checkpoint = last_checkpoint(args.output_dir)
        trainer.accelerator.print(f"going on from {checkpoint}" if checkpoint else "no checkpoint yet: starting")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.end()


def _check_template(name: str, train: Any, args: Any, model: Any) -> None:
    """Raise for conversations without a template that makes text of them."""
    from transformers import AutoTokenizer

    from contralto.common.hub import from_pretrained

    first = next(iter(train))
    if isinstance(first["prompt"], str) or first.get("images"):  # of images, the processor has the template
        return
    options = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
    if not from_pretrained(AutoTokenizer, name, **options).chat_template:
        raise ValueError(
            f"the rows are conversations, and the tokenizer of {model.model_name_or_path} has no chat template to make text of them: "
            "give texts (prompt, chosen and rejected as strings), or a model whose tokenizer has one"
        )


def _with_adapter(name: str, adapter: str, args: Any, quantization: Any) -> Any:
    """A model with a trained adapter that is to be trained on."""
    import torch

    from contralto.align.trainers.seams import create_model_from_path
    from contralto.common.hub import with_adapter

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} holds no adapter: there is no adapter_config.json")
    options = dict(args.model_init_kwargs)
    options.setdefault("dtype", "bfloat16" if torch.accelerator.is_available() and not args.use_cpu else "float32")
    options["device_map"] = {"": str(args.device)} if quantization is not None else None
    if quantization is not None:
        options["quantization_config"] = quantization
    return with_adapter(create_model_from_path(name, **options), adapter, is_trainable=True)


def _init_kwargs(args: Any, model: Any) -> dict[str, Any]:
    asked = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }
    given = asked | ({} if model.dtype is None else {"dtype": model.dtype})
    return given | dict(args.model_init_kwargs or {})


def _datasets(data: Any, args: Any, mixture: Any) -> tuple[Any, Any]:
    """What to train and to evaluate on."""
    if mixture.datasets:
        train, test = _mixed(data, mixture)
    elif data.dataset_name is None:
        raise ValueError("which pairs? give --dataset_name: a JSONL, JSON or parquet file, a folder, or a hub id")
    else:
        train, test = _pairs(data, data.dataset_name, data.dataset_train_split), None
    if args.eval_strategy == "no":
        return train, None
    if data.eval_dataset_name is not None:
        return train, _pairs(data, data.eval_dataset_name, data.dataset_test_split)
    if test is None and mixture.datasets:
        raise ValueError("datasets has no split to evaluate on: give --test_split_size or --eval_dataset_name")
    if test is None and Path(data.dataset_name).is_file():
        raise ValueError(f"{data.dataset_name} is one file, without a split to evaluate on: give --eval_dataset_name")
    return train, _pairs(data, data.dataset_name, data.dataset_test_split) if test is None else test


def _mixed(data: Any, mixture: Any) -> tuple[Any, Any]:
    """What a mixture of data sets has to train and to evaluate on."""
    from trl import get_dataset  # type: ignore[attr-defined]

    if data.dataset_name is not None:
        raise ValueError(
            "datasets and dataset_name are both given, and only one of them can be trained on: leave one out"
        )
    splits = get_dataset(mixture)
    if data.dataset_train_split not in splits:
        raise ValueError(f"datasets has no split {data.dataset_train_split!r}; it has {', '.join(splits)}")
    test = data.dataset_test_split if data.dataset_test_split in splits else None
    data.dataset_config, data.dataset_streaming = None, mixture.streaming
    named = (data.dataset_train_split, test)
    train, evaluation = (None if name is None else _pairs(data, splits[name], name) for name in named)
    return train, evaluation


def _pairs(data: Any, source: Any, split: str) -> Any:
    from contralto.data_gen.dataset import load_pairs, stream_pairs

    read = stream_pairs if data.dataset_streaming else load_pairs
    return read(source, split=split, config=data.dataset_config, conversations=data.conversations)


def main() -> int:
    """`python -m contralto.align`, as `accelerate launch` starts it: a mistake is one sentence, from the first process alone."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    first = os.environ.get("RANK", "0") == "0"
    return guarded("align", lambda: run(argv, launched=True), debug="--debug" in sys.argv, quiet=not first)
