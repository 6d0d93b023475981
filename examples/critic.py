"""Critic-guided decoding: reweight the likeliest tokens by a critic's values.

python examples/critic.py                                an embedded model and a function that is tired of three words
python examples/critic.py Qwen/Qwen2.5-1.5B my-critic    a model and a token classifier with one label
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from contralto import testbed
from contralto.decoding import CriticGuidedLogitsProcessor

name, *critics = sys.argv[1:] or [testbed.path("expert")]
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
dull = tokenizer(" saw went looked", add_special_tokens=False, return_tensors="pt")["input_ids"]
mine = [AutoModelForTokenClassification.from_pretrained(critic) for critic in critics]
critic = mine[0] if mine else lambda ids, mask: -9.0 * torch.isin(ids[:, -1], dull)
inputs = tokenizer("Ben went out to the barn door. He", return_tensors="pt")
for processors in ([], [CriticGuidedLogitsProcessor(critic, k=10)]):
    output = model.generate(**inputs, logits_processor=processors, do_sample=False, max_new_tokens=20)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
