"""Contrastive search: choose among the k likeliest tokens one dissimilar to the context; one forward pass per token.

python examples/search.py                          an embedded model
python examples/search.py Qwen/Qwen2.5-1.5B        any model
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import ContrastiveSearch

name = sys.argv[1] if sys.argv[1:] else testbed.path("expert")
model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
inputs = tokenizer("Ben went out to the barn door. He", return_tensors="pt").to(model.device)
for how in ({}, {"custom_generate": ContrastiveSearch(alpha=0.6, k=4)}):
    output = model.generate(**inputs, **how, do_sample=False, max_new_tokens=40)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
