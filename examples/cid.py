"""Contrastive input decoding: prefer tokens that one prompt makes likelier than another.

python examples/cid.py                             an embedded model
python examples/cid.py Qwen/Qwen2.5-1.5B           any model
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import ContrastiveInputDecodingLogitsProcessor

name = sys.argv[1] if sys.argv[1:] else testbed.path("expert")
model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
texts = ("Mia went to the barn. She", "Ben went to the barn. He")
prompt, other = (tokenizer(text, return_tensors="pt").to(model.device) for text in texts)
for lam in (0.0, 5.0, 50.0):
    contrast = ContrastiveInputDecodingLogitsProcessor(model, other, lam=lam)
    output = model.generate(**prompt, custom_generate=contrast.loop(), do_sample=False, max_new_tokens=20)
    print(f"lam {lam:g}: {tokenizer.decode(output[0], skip_special_tokens=True)}")
