"""Train an amateur on the texts of its expert, with the distillation trainer; interrupted training resumes from a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from contralto.align.amateur.settings import AmateurConfig
from contralto.align.amateur.texts import Text

__all__ = ["train_amateur"]

CHECKPOINTS = 10
"""Number of checkpoints of a training, of which the newest is kept."""


def train_amateur(config: AmateurConfig, student: Path, texts: Sequence[Text], output: Path) -> None:
    """Train the student on texts of the expert by forward KL, and save it with its tokenizer.

    Args:
        config: what to make.
        student: the folder of the untrained amateur.
        texts: texts of the expert.
        output: the folder for checkpoints and for the trained model; a complete checkpoint in it is resumed.
    """
    from datasets import Dataset

    from contralto.align.monitoring.output_folder import last_checkpoint
    from contralto.align.trainers.distillation import DistillationPairTrainer
    from contralto.align.trainers.distillation_config import DistillationConfig

    accelerated = torch.accelerator.is_available()
    steps = config.steps if config.steps is not None else -1
    per_epoch = max(1, len(texts) // config.batch_size)
    planned = steps if steps > 0 else round(per_epoch * config.epochs)
    teacher: dict[str, Any] = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}} if config.bf16 else {}
    args = DistillationConfig(
        str(output),
        loss_type=["forward_kl"],
        teacher_model_name_or_path=config.model,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, planned // 20),
        max_steps=steps,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        max_length=config.max_length,
        bf16=config.bf16,
        use_cpu=not accelerated,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=accelerated,
        save_steps=max(1, planned // CHECKPOINTS),
        save_total_limit=1,
        logging_steps=max(1, planned // 50),
        report_to="none",
        audit="off",  # its texts may end at the limit
        seed=config.seed,
        **teacher,
    )
    rows = [{"prompt": text.prompt, "chosen": text.completion, "rejected": text.completion} for text in texts]
    trainer = DistillationPairTrainer(str(student), args=args, train_dataset=Dataset.from_list(rows))
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainer.save_model(str(output))
