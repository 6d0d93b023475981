"""Trainers that write contralto's model card in place of TRL's."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from contralto.align.cards.model_card import TrainedCard, write_model_card
from contralto.align.monitoring.output_folder import OutputFolder, last_checkpoint, set_adapter_aside

__all__ = ["CardMixin"]

logger = logging.getLogger(__name__)


class CardMixin:
    """Write a model card with method, paper, data, settings, figures and versions, where TRL writes its draft.

    TRL calls `create_model_card` at every checkpoint and before a push to the hub. What an earlier run left in the output folder is kept
    apart, see `OutputFolder`.

    Args:
        args: see the trainer that the class is mixed into.
        kwargs: its other arguments.

    Attributes:
        card_datasets: the data sets as the user named them.
    """

    card_datasets: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["callbacks"] = [OutputFolder(), *(kwargs.get("callbacks") or ())]
        super().__init__(*args, **kwargs)

    def describe_training(self) -> TrainedCard:
        """Return what the card says of the method."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, and resume a run only from its own checkpoints.

        Args:
            resume_from_checkpoint: True takes the newest complete checkpoint of the latest run in the output folder; a path that one.
            kwargs: the other arguments of `transformers.Trainer.train`.

        Raises:
            ValueError: there is no such checkpoint.
        """
        if resume_from_checkpoint is True:
            folder: Any = self.args.output_dir  # type: ignore[attr-defined]  # of the trainer
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"the latest run in {folder} has no complete checkpoint: leave resume_from_checkpoint out, or give the path of one"
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, **kwargs: Any) -> None:
        """Save the model, and its card if the folder is the output folder.

        Args:
            output_dir: see `transformers.Trainer.save_model`.
            kwargs: its other arguments.
        """
        super().save_model(output_dir, **kwargs)  # type: ignore[misc]  # of the trainer that the class is mixed into
        own: Any = self
        if own.is_world_process_zero() and not is_peft_model(own.accelerator.unwrap_model(own.model)):
            set_adapter_aside(Path(output_dir or own.args.output_dir))
        if Path(output_dir or own.args.output_dir).resolve() == Path(own.args.output_dir).resolve():
            # peft has just written a draft, with the path of the base model:
            # https://github.com/huggingface/transformers/pull/27754
            self.create_model_card()

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        """Write README.md into the output folder; a card that fails costs no checkpoint.

        Args:
            model_name: the title of the card; None takes the name of the output folder.
            dataset_name: the data set or data sets; None takes `card_datasets`.
            tags: further tags.
        """
        names = dataset_name or self.card_datasets
        try:
            write_model_card(self, self.describe_training(), model_name=model_name, dataset_name=names, tags=tags)
        except Exception as error:  # noqa: BLE001 (a card must not cost a trained model)
            logger.warning("the model card could not be written: %s; trainer.create_model_card() tries again", error)
