"""Contrast a tuned model with its base model: PEFT adapters on and off, without a second model in memory.

python examples/self_contrast.py                   an embedded model with random adapters, to see the call
python examples/self_contrast.py my-lora-folder    a model that was tuned with PEFT
"""

import sys

from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoTokenizer, set_seed

from contralto import testbed
from contralto.decoding import AdaptersOff, ContrastiveDecodingLogitsProcessor

set_seed(0)
adapters = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
tuned = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]) if sys.argv[1:] else None
tuned = tuned or get_peft_model(testbed.load("expert"), adapters)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] if sys.argv[1:] else testbed.path("expert"))
inputs = tokenizer("Ben went out to the barn door. He", return_tensors="pt").to(tuned.device)
contrast = ContrastiveDecodingLogitsProcessor(AdaptersOff(tuned), beta=0.5)
output = tuned.generate(**inputs, logits_processor=[contrast], do_sample=False, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
