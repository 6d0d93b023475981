"""Speculative contrastive decoding: the completions of cd.py in fewer forward passes of the expert."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import SpeculativeContrastiveDecoding

names = sys.argv[1:] or [testbed.path("expert"), testbed.path("amateur")]
expert, amateur = (AutoModelForCausalLM.from_pretrained(name, device_map="auto") for name in names)
tokenizer = AutoTokenizer.from_pretrained(names[0])
chat = [
    {"role": "user", "content": "Mia has 9 coins. She finds 4, loses 2, wins 5, sells 3. How many coins does Mia have?"}
]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs = inputs.to(expert.device)
fast = SpeculativeContrastiveDecoding(amateur, beta=0.5, alpha=0.1)
output = expert.generate(**inputs, custom_generate=fast, do_sample=False, max_new_tokens=80)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"{fast.statistics.tokens} tokens in {fast.statistics.expert_forwards} forwards of the expert")
