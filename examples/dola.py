"""DoLa: contrast the last layer with the earlier layer that differs most from it, in one forward pass per token.

python examples/dola.py                            an embedded model
python examples/dola.py Qwen/Qwen2.5-7B-Instruct   any decoder-only model
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import DoLaLogitsProcessor

name = sys.argv[1] if sys.argv[1:] else testbed.path("expert")
model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
chat = [{"role": "user", "content": "Mia has 9 coins. She finds 4, loses 2, wins 5. How many coins does Mia have?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs = inputs.to(model.device)
contrast = DoLaLogitsProcessor(model, layers="high", relative_top=0.1)  # or layers=[2, 4, 6]
output = model.generate(**inputs, custom_generate=contrast.loop(), do_sample=False, max_new_tokens=80)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
