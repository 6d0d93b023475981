"""Score given answers under a contrastive method, to rank the options of a question. Models as in cd.py."""

import sys
from itertools import islice

from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor, score
from contralto.testbed import worlds

names = sys.argv[1:] or [testbed.path("expert"), testbed.path("amateur")]
expert, amateur = (AutoModelForCausalLM.from_pretrained(name, device_map="auto") for name in names)
tokenizer = AutoTokenizer.from_pretrained(names[0], padding_side="left")
contrast = ContrastiveDecodingLogitsProcessor(amateur, beta=0.5)
for item in islice(worlds.items(0, "test"), 3):
    prompt = tokenizer([item.context] * 4, return_tensors="pt").to(expert.device)
    how = {"return_tensors": "pt", "padding": True, "padding_side": "right", "add_special_tokens": False}
    options = tokenizer(list(item.endings), **how).to(expert.device)
    found = score(contrast, expert, prompt, options)
    totals = zip(found.total.tolist(), item.endings, strict=True)
    print(item.context, *(f"{total:8.2f}{text}" for total, text in totals), sep="\n")
