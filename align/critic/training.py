"""Train a critic: a frozen language model, adapters or none, and a head with one value per token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForTokenClassification, Trainer, TrainingArguments

from contralto.align.critic.returns import critic_loss
from contralto.align.critic.settings import CriticConfig
from contralto.align.critic.texts import ScoredText
from contralto.common.hub import from_pretrained
from contralto.common.quiet import quiet

__all__ = ["CriticTrainer", "collate_texts", "train_critic", "untrained_critic"]

CHECKPOINTS = 10
"""Number of checkpoints of a training, of which the newest is kept."""
REPORT = ("transformers.modeling_utils", "LOAD REPORT")
"""The report of transformers that the head is new."""
HEADS = ("score", "classifier")
"""The names of the heads of token classifiers."""


def collate_texts(texts: Sequence[ScoredText], *, pad: int = 0) -> dict[str, Tensor]:
    """Return a batch of texts, padded on the right.

    Args:
        texts: the texts.
        pad: the token of the padding, which no state reads.

    Returns:
        `input_ids`, `attention_mask` and `states`, each `(B, T)`, and `rewards` `(B,)`. `states` is 1 from the last token of the prompt
        on: the states before and after each token of the completion.
    """
    rows = [torch.tensor([*text.prompt, *text.completion]) for text in texts]
    starts = torch.tensor([len(text.prompt) - 1 for text in texts])
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    states = mask * (torch.arange(ids.shape[1])[None] >= starts[:, None])
    rewards = torch.tensor([text.reward for text in texts])
    return {"input_ids": ids, "attention_mask": mask, "states": states, "rewards": rewards}


def untrained_critic(config: CriticConfig, mean: float) -> Any:
    """Return the language model with a head of zeros, whose value is the mean reward everywhere.

    Args:
        config: what to make.
        mean: the mean reward.

    Raises:
        ValueError: the model has no token classifier.
    """
    settings = from_pretrained(AutoConfig, config.model, num_labels=1)
    settings.classifier_dropout = 0.0  # before the head, 0.1 in most classifiers of transformers
    with quiet(REPORT):
        critic, loaded = from_pretrained(
            AutoModelForTokenClassification,
            config.model,
            config=settings,
            dtype=torch.float32,
            output_loading_info=True,
        )
    head = next((name for name in HEADS if isinstance(getattr(critic, name, None), nn.Linear)), None)
    if head is None or any(name.split(".")[0] != head for name in loaded["missing_keys"]):
        raise ValueError(
            f"{type(critic).__name__} has no linear head of its own: no critic can be made of {config.model}"
        )
    layer = getattr(critic, head)
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, torch.tensor(mean).clamp(1e-3, 1 - 1e-3).logit().item())
    critic.config.name_or_path = ""
    return critic


def _trainable(critic: Any, config: CriticConfig) -> Any:
    """Freeze the language model; the head stays trainable, and so do adapters of its layers."""
    head = next(name for name in HEADS if isinstance(getattr(critic, name, None), nn.Linear))
    if config.lora_r:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            task_type="TOKEN_CLS",
            r=config.lora_r,
            lora_alpha=2 * config.lora_r,
            lora_dropout=0.0,
            target_modules="all-linear",
            exclude_modules=[head],
            modules_to_save=[head],
        )
        return get_peft_model(critic, lora)
    for name, weight in critic.named_parameters():
        weight.requires_grad_(name.startswith(f"{head}."))
    return critic


class CriticTrainer(Trainer):
    """`transformers.Trainer` with the loss of a critic, see `critic_loss`.

    Args:
        args: see `transformers.Trainer`.
        lam: see `lambda_returns`.
        gamma: see `lambda_returns`.
        kwargs: see `transformers.Trainer`.
    """

    def __init__(self, *args: Any, lam: float = 1.0, gamma: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lam, self._gamma = lam, gamma

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch.

        Args:
            model: the critic.
            inputs: see `collate_texts`.
            return_outputs: return the outputs of the critic, too.
            num_items_in_batch: not read: every batch is a mean over its states.
        """
        states, rewards = inputs["states"], inputs["rewards"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = critic_loss(outputs.logits[..., 0], rewards, states, lam=self._lam, gamma=self._gamma)
        return (loss, outputs) if return_outputs else loss


def train_critic(config: CriticConfig, tokenizer: Any, texts: Sequence[ScoredText], output: Path) -> None:
    """Train a critic on texts, and save it as a whole model, its adapters merged, with its tokenizer.

    Args:
        config: what to make.
        tokenizer: of the model.
        texts: texts with rewards.
        output: the folder for checkpoints and for the trained model; a complete checkpoint in it is resumed.
    """
    from functools import partial

    from contralto.align.monitoring.output_folder import last_checkpoint

    critic = _trainable(untrained_critic(config, sum(text.reward for text in texts) / len(texts)), config)
    planned = max(1, round(-(-len(texts) // config.batch_size) * config.epochs))
    args = TrainingArguments(
        str(output),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, planned // 20),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        bf16=bool(config.bf16),
        use_cpu=not torch.accelerator.is_available(),
        save_steps=max(1, planned // CHECKPOINTS),
        save_total_limit=1,
        logging_steps=max(1, planned // 20),
        remove_unused_columns=False,
        report_to="none",
        seed=config.seed,
    )
    collate = partial(collate_texts, pad=tokenizer.pad_token_id or 0)
    trainer = CriticTrainer(
        model=critic, args=args, train_dataset=list(texts), data_collator=collate, lam=config.lam, gamma=config.gamma
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    critic = trainer.accelerator.unwrap_model(trainer.model)
    critic = critic.merge_and_unload() if config.lora_r else critic
    critic.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
