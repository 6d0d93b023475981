"""Trainers on TRL: preferences, distillation, rewards and supervised fine-tuning by contrast."""

__all__ = ["TRAINERS"]

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
    "unpaired": (
        "contralto.align.trainers.unpaired:UnpairedTrainer",
        "contralto.align.trainers.unpaired_config:UnpairedConfig",
    ),
    "brio": (
        "contralto.align.trainers.brio:BrioTrainer",
        "contralto.align.trainers.brio:BrioConfig",
    ),
    "cont": (
        "contralto.align.trainers.cont:ContTrainer",
        "contralto.align.trainers.cont:ContConfig",
    ),
    "grpo": (
        "contralto.align.trainers.grpo_trainer:RewardsTrainer",
        "contralto.align.trainers.grpo_trainer:RewardsConfig",
    ),
    "simctg": ("contralto.align.trainers.sft:SimCTGTrainer", "contralto.align.trainers.sft:SimCTGConfig"),
    "cal": ("contralto.align.trainers.sft:CALTrainer", "contralto.align.trainers.sft:CALConfig"),
}
"""The values of the option `trainer`: trainer and configuration, each as `module:class`."""
