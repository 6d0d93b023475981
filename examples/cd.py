"""Contrastive decoding: prefer tokens that are likelier under an expert than under an amateur.

python examples/cd.py                                               the embedded models
python examples/cd.py Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-0.5B-Instruct   any two models of one tokenizer
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor

names = sys.argv[1:] or [testbed.path("expert"), testbed.path("amateur")]
expert, amateur = (AutoModelForCausalLM.from_pretrained(name, device_map="auto") for name in names)
tokenizer = AutoTokenizer.from_pretrained(names[0])
chat = [
    {"role": "user", "content": "Mia has 9 coins. She finds 4, loses 2, wins 5, sells 3. How many coins does Mia have?"}
]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs = inputs.to(expert.device)
contrast = ContrastiveDecodingLogitsProcessor(amateur, beta=0.5, alpha=0.1)
for how in ({}, {"custom_generate": contrast.loop()}, {"logits_processor": [contrast], "num_beams": 3}):
    output = expert.generate(**inputs, **how, do_sample=False, max_new_tokens=80)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
