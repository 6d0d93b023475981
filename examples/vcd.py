"""Visual contrastive decoding: contrast an image with a noised copy, as two rows of one forward pass.

python examples/vcd.py                                               an embedded model and a drawn scene
python examples/vcd.py llava-hf/llava-1.5-7b-hf photo.jpg            any image-text model and image
"""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

from contralto import testbed
from contralto.decoding import VisualContrastiveDecodingLogitsProcessor
from contralto.decoding.images import noised
from contralto.testbed import scenes

name, image = sys.argv[1:] or (testbed.path("vision-0"), next(scenes.scenes(0, "test")).image())
model = AutoModelForImageTextToText.from_pretrained(name, device_map="auto")
processor = AutoProcessor.from_pretrained(name)
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": scenes.DESCRIBE}]}]
how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template(chat, **how).to(model.device, dtype=model.dtype)
contrast = VisualContrastiveDecodingLogitsProcessor(model, noised(inputs, step=500, seed=0), alpha=1.0, beta=0.1)
output = model.generate(**inputs, custom_generate=contrast.loop(), do_sample=False, max_new_tokens=40)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
