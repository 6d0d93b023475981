"""SID, AVISC, PAI and ONLY: contrast what the model's own attention makes of the image. Models as in vcd.py."""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

from contralto import decoding, testbed
from contralto.testbed import scenes

name, image = sys.argv[1:] or (testbed.path("vision-0"), next(scenes.scenes(0, "test")).image())
model = AutoModelForImageTextToText.from_pretrained(name, device_map="auto")
processor = AutoProcessor.from_pretrained(name)
question, seen = {"type": "text", "text": scenes.DESCRIBE}, {"type": "image", "image": image}
how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs, blind = (
    processor.apply_chat_template([{"role": "user", "content": said}], **how).to(model.device, dtype=model.dtype)
    for said in ([seen, question], [question])
)
small = {"start_layer": 1}  # of a model of 2 layers and 16 image tokens: leave it and `keep` out for LLaVA-1.5
contrasts = [decoding.SIDLogitsProcessor(model, inputs, keep=4, **small), decoding.AVISCLogitsProcessor(model, inputs)]
contrasts += [decoding.PAILogitsProcessor(model, inputs, blind, **small), decoding.ONLYLogitsProcessor(model, inputs)]
for contrast in contrasts:
    output = model.generate(**inputs, custom_generate=contrast.loop(), do_sample=False, max_new_tokens=40)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
