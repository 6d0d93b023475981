"""Alignment by contrast: preference training, distillation, reward models and supervised fine-tuning on TRL.

- `losses`: the losses, pure functions of log-probabilities and hidden states; none of them knows a trainer.
- `trainers`: the trainers and their configurations.
- `caches`: references and teachers that are computed once and kept on disk.
- `monitoring`: the audit before training, the measurements during training, and the report after it.
- `rounds`: on-policy rounds, in which the trained model generates the next data.
- `recipes`: configurations of `contralto align`; `parsing`, `arguments`, `data` and `run` are the command's core.
- `trl_compat`: every contact with private parts of TRL and transformers.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.align.losses.loss import Loss as Loss
    from contralto.align.losses.objective import Objective as Objective
    from contralto.align.losses.registry import LOSSES as LOSSES
    from contralto.align.losses.registry import register as register
    from contralto.align.losses.unpaired import UNPAIRED as UNPAIRED
    from contralto.align.losses.unpaired import UnpairedLoss as UnpairedLoss
    from contralto.align.trainers.brio import BrioConfig as BrioConfig
    from contralto.align.trainers.brio import BrioTrainer as BrioTrainer
    from contralto.align.trainers.config import PreferenceConfig as PreferenceConfig
    from contralto.align.trainers.constraints import ConstrainedRewards as ConstrainedRewards
    from contralto.align.trainers.constraints import ThresholdSearch as ThresholdSearch
    from contralto.align.trainers.cont import ContConfig as ContConfig
    from contralto.align.trainers.cont import ContTrainer as ContTrainer
    from contralto.align.trainers.distillation import DistillationPairTrainer as DistillationPairTrainer
    from contralto.align.trainers.distillation_config import DistillationConfig as DistillationConfig
    from contralto.align.trainers.grpo import ContrastiveReward as ContrastiveReward
    from contralto.align.trainers.grpo_trainer import RewardsConfig as RewardsConfig
    from contralto.align.trainers.grpo_trainer import RewardsTrainer as RewardsTrainer
    from contralto.align.trainers.preference import PreferenceTrainer as PreferenceTrainer
    from contralto.align.trainers.reward import MarginRewardConfig as MarginRewardConfig
    from contralto.align.trainers.reward import MarginRewardTrainer as MarginRewardTrainer
    from contralto.align.trainers.sft import CALConfig as CALConfig
    from contralto.align.trainers.sft import CALTrainer as CALTrainer
    from contralto.align.trainers.sft import SimCTGConfig as SimCTGConfig
    from contralto.align.trainers.sft import SimCTGTrainer as SimCTGTrainer
    from contralto.align.trainers.unpaired import UnpairedTrainer as UnpairedTrainer
    from contralto.align.trainers.unpaired_config import UnpairedConfig as UnpairedConfig

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "losses.loss": ["Loss"],
        "losses.objective": ["Objective"],
        "losses.registry": ["LOSSES", "register"],
        "losses.unpaired": ["UNPAIRED", "UnpairedLoss"],
        "trainers.brio": ["BrioConfig", "BrioTrainer"],
        "trainers.config": ["PreferenceConfig"],
        "trainers.cont": ["ContConfig", "ContTrainer"],
        "trainers.distillation": ["DistillationPairTrainer"],
        "trainers.distillation_config": ["DistillationConfig"],
        "trainers.constraints": ["ConstrainedRewards", "ThresholdSearch"],
        "trainers.grpo": ["ContrastiveReward"],
        "trainers.grpo_trainer": ["RewardsConfig", "RewardsTrainer"],
        "trainers.preference": ["PreferenceTrainer"],
        "trainers.reward": ["MarginRewardConfig", "MarginRewardTrainer"],
        "trainers.sft": ["CALConfig", "CALTrainer", "SimCTGConfig", "SimCTGTrainer"],
        "trainers.unpaired": ["UnpairedTrainer"],
        "trainers.unpaired_config": ["UnpairedConfig"],
    },
)
