"""Proxy tuning: apply the effect of tuning a small model to a large one.

python examples/proxy.py                           the embedded models: an early checkpoint is steered
python examples/proxy.py Qwen/Qwen2.5-7B Qwen/Qwen2.5-0.5B-Instruct Qwen/Qwen2.5-0.5B      base, tuned, untuned
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import ProxyTuningLogitsProcessor

names = sys.argv[1:] or [testbed.path(name) for name in ("early", "student", "amateur")]
base, expert, antiexpert = (AutoModelForCausalLM.from_pretrained(name, device_map="auto") for name in names)
tokenizer = AutoTokenizer.from_pretrained(names[1])
chat = [{"role": "user", "content": "Mia has 9 coins. She finds 4, loses 2. How many coins does Mia have?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs = inputs.to(base.device)
contrast = ProxyTuningLogitsProcessor(expert, antiexpert, alpha=1.0)
for how in ({}, {"custom_generate": contrast.loop()}):
    output = base.generate(**inputs, **how, do_sample=False, max_new_tokens=80)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
