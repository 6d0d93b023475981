"""Trainers on TRL: preferences, distillation, rewards and supervised fine-tuning by contrast."""
