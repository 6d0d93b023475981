"""Context-aware decoding: amplify the effect of the context on the answer. A batch of two, padded on the left.

python examples/cad.py                             an embedded model
python examples/cad.py Qwen/Qwen2.5-1.5B           any model
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import ContextAwareDecodingLogitsProcessor

name = sys.argv[1] if sys.argv[1:] else testbed.path("expert")
model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
contexts = ["Mia went to the barn. She fed the old horse.", "Ben went out to the red barn."]
questions = ["Mia went to the barn. She", "Ben went to the river. He"]
full = [f"{context} {question}" for context, question in zip(contexts, questions, strict=True)]
with_context, without = (tokenizer(t, return_tensors="pt", padding=True).to(model.device) for t in (full, questions))
contrast = ContextAwareDecodingLogitsProcessor(model, without, alpha=0.5)
output = model.generate(**with_context, custom_generate=contrast.loop(), do_sample=False, max_new_tokens=20)
print(*tokenizer.batch_decode(output, skip_special_tokens=True), sep="\n")
