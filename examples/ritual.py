"""RITUAL: add the logits for a randomly transformed image. The models and images are those of vcd.py."""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

from contralto import testbed
from contralto.decoding import RitualLogitsProcessor
from contralto.decoding.images import ritual_transform
from contralto.testbed import scenes

name, image = sys.argv[1:] or (testbed.path("vision-0"), next(scenes.scenes(0, "test")).image())
image, model = load_image(image), AutoModelForImageTextToText.from_pretrained(name, device_map="auto")
processor = AutoProcessor.from_pretrained(name)
how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
view, inputs = ritual_transform(image, seed=0), []
for shown in (image, view.image):
    chat = [{"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": scenes.DESCRIBE}]}]
    inputs.append(processor.apply_chat_template(chat, **how).to(model.device, dtype=model.dtype))
contrast = RitualLogitsProcessor(model, inputs[1], kappa=3.0, beta=0.1)
output = model.generate(**inputs[0], custom_generate=contrast.loop(), do_sample=False, max_new_tokens=40)
print(
    view.transform, processor.decode(output[0, inputs[0]["input_ids"].shape[1] :], skip_special_tokens=True), sep=": "
)
