"""`contralto align`: train on preference pairs, or distil a teacher, from a recipe, with the options of `trl dpo`.

    contralto align apo_zero --model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl --use_peft --output_dir out
    contralto align distill --teacher_model_name_or_path Qwen/Qwen3-8B --model_name_or_path ... --dataset_name ... --output_dir out
    contralto align on_policy --data_recipe judged.yaml --rounds 3 --model_name_or_path ... --output_dir out
    contralto align my_recipe.yaml --learning_rate 1e-5
    contralto align report out-dpo out-apo
    accelerate launch -m contralto.align my_recipe.yaml

`report` writes one page about several trainings, see `contralto.cli.align_report`.

A recipe is a YAML file of options, or the name of one that comes with contralto (`contralto.align.parsing.recipes`). Options on the
command line win. The option `trainer` chooses the trainer, each with options of its own: `preference` (default, `PreferenceTrainer`),
`distill` (`DistillationPairTrainer`), `reward` (`MarginRewardTrainer`), `unpaired` (`UnpairedTrainer`: completions with labels), `brio` and
`cont` (`BrioTrainer`, `ContTrainer`: ranked candidates).
`lora_learning_rate` in a recipe replaces `learning_rate` where an adapter is trained and the command line gives no rate.

Beyond `trl dpo`:

- models are also spelled `testbed:NAME`;
- a file, a folder or a dataset in any published form is read by `contralto.data_gen.dataset.load_pairs`; strings stay strings unless
  `--conversations` is given; `--dataset_streaming` reads row by row; `--eval_dataset_name` names other data to evaluate on;
- `--adapter` continues the training of a LoRA adapter;
- `--resume_from_checkpoint last` resumes from the newest complete checkpoint in `--output_dir`, or starts if there is none;
- `--data_recipe` and `--rounds` let the model generate the data itself, see `contralto.align.rounds`.

Options of `accelerate launch`, such as `--num_processes`, are passed on to it, as `trl dpo` does.
"""

from collections.abc import Sequence

from contralto.align.parsing import option_value, read_recipe, resolve_recipe, trainer_name, with_underscores
from contralto.align.run import run as train
from contralto.cli import align_report
from contralto.cli.align_help import cached_help

__all__ = ["run"]


def run(argv: Sequence[str]) -> None:
    """Train as the command line describes, or write the report of trainings.

    Args:
        argv: the words after `contralto align`.
    """
    if argv[:1] == ["report"]:
        align_report.run(argv[1:])
    elif not argv or {*argv} & {"-h", "--help"}:
        words = resolve_recipe(with_underscores(argv))
        path = option_value(words, "config")
        print(cached_help(trainer_name(words), {} if path is None else read_recipe(path)), end="")
    else:
        train(argv)
