"""ICD and M3ID: contrast with a disturbed instruction, and with the prompt without its image. Models as in vcd.py."""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

from contralto import testbed
from contralto.decoding import InstructionContrastiveDecodingLogitsProcessor, M3IDLogitsProcessor
from contralto.testbed import scenes

name, image = sys.argv[1:] or (testbed.path("vision-0"), next(scenes.scenes(0, "test")).image())
model = AutoModelForImageTextToText.from_pretrained(name, device_map="auto")
processor = AutoProcessor.from_pretrained(name)
question, seen = {"type": "text", "text": scenes.DESCRIBE}, {"type": "image", "image": image}
disturbed = {"type": "text", "text": "Is there no image? " + scenes.DESCRIBE}
how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs, confused, blind = (
    processor.apply_chat_template([{"role": "user", "content": said}], **how).to(model.device, dtype=model.dtype)
    for said in ([seen, question], [seen, disturbed], [question])
)
contrasts = InstructionContrastiveDecodingLogitsProcessor(model, confused), M3IDLogitsProcessor(model, blind, lam=0.02)
for contrast in contrasts:
    output = model.generate(**inputs, custom_generate=contrast.loop(), do_sample=False, max_new_tokens=40)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
