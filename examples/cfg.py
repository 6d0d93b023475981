"""Classifier-free guidance: towards the prompt, away from a negative one; with beams too.

python examples/cfg.py                             an embedded model
python examples/cfg.py Qwen/Qwen2.5-1.5B           any model
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import ClassifierFreeGuidanceLogitsProcessor

name = sys.argv[1] if sys.argv[1:] else testbed.path("expert")
model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
prompt = tokenizer("Mia went to the barn. She", return_tensors="pt").to(model.device)
negative = tokenizer("Ben went to the river. She", return_tensors="pt").to(model.device)
for inputs in (None, negative):  # None: away from the prompt's last token alone
    contrast = ClassifierFreeGuidanceLogitsProcessor(model, inputs, guidance_scale=1.5)
    output = model.generate(**prompt, logits_processor=[contrast], num_beams=3, do_sample=False, max_new_tokens=20)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
