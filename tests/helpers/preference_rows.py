"""Rows of preference data: published schemas, texts, tools, and columns whose values differ in shape."""

Q, GOOD, BAD = "What is 2 + 2?", "It is 4.", "It is 5."


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


ASKED, CHOSEN, REJECTED = [user(Q)], [said(GOOD)], [said(BAD)]
SCHEMAS = {
    "UltraFeedback-CLAIR": {"prompt": Q, "chosen": ASKED + CHOSEN, "rejected": ASKED + REJECTED, "rational": "Sum."},
    "distilabel": {
        "prompt": Q,
        "prompt_id": "5f3c",
        "chosen": ASKED + CHOSEN,
        "chosen_model": "a",
        "chosen_rating": 4.5,
        "rejected": ASKED + REJECTED,
        "rejected_model": "b",
        "rejected_rating": 2,
    },
    "DistiLLM-2": {"prompt": Q, "chosen": ASKED + CHOSEN, "rejected": ASKED + REJECTED},
    "implicit prompt": {"chosen": ASKED + CHOSEN, "rejected": ASKED + REJECTED},
    "plain strings": {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    "explicit prompt": {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED},
    "UltraFeedback-binarized": {
        "prompt": Q,
        "chosen": ASKED + CHOSEN,
        "rejected": ASKED + REJECTED,
        "messages": ASKED + CHOSEN,
        "score_chosen": 8.0,
    },
    "transcripts": {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}",
    },
    "prompt as transcript": {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": GOOD, "rejected": BAD},
    "prompt in both": {"prompt": ASKED, "chosen": ASKED + CHOSEN, "rejected": ASKED + REJECTED},
    "prompt text, answer messages": {"prompt": Q, "chosen": CHOSEN, "rejected": REJECTED},
    "parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": Q}]}],
        "chosen": CHOSEN,
        "rejected": REJECTED,
    },
}


PLAIN, TALK = SCHEMAS["plain strings"], SCHEMAS["implicit prompt"]


def call(name, **arguments):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def schema(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


ONE = {
    "prompt": ASKED,
    "chosen": [call("weather", city="Oslo")],
    "rejected": REJECTED,
    "tools": [schema("weather", city={"type": "string"})],
}
TWO = {
    "prompt": ASKED,
    "chosen": [call("add", x=4, y=0.1)],
    "rejected": [call("add", x="4")],
    "tools": [schema("add", x={"type": "number"})],
}
NAMED = [{**ASKED[0], "name": "Mia"}]
RAGGED = {
    "tools and arguments": [ONE, TWO],
    "arguments as a text of JSON": [ONE, {**TWO, "chosen": [call("add", x='{"city": null}')]}],
    "no tools": [ONE, {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}],
    "template arguments": [{**ONE, "chat_template_kwargs": {"enable_thinking": False}}, TWO],
    "other template arguments": [{**ONE, "chat_template_kwargs": {"a": 1}}, {**TWO, "chat_template_kwargs": {"b": 1}}],
    "message keys": [{**ONE, "prompt": NAMED}, {**TWO, "prompt": [{**ASKED[0], "weight": 1}]}],
    "metadata": [{**ONE, "meta": {"source": {"url": "a"}}}, {**TWO, "meta": {"source": {"page": 3}, "tags": []}}],
    "values that do not mix": [{**ONE, "score": 1}, {**TWO, "score": "high"}],
    "an argument of two types": [{**ONE, "chosen": [call("a", x=1)]}, {**TWO, "chosen": [call("a", x=["1", None])]}],
    "nothing in an argument": [
        {**ONE, "chosen": [call("a", x=None, y={})]},
        {**TWO, "chosen": [call("a", x={}, y={"z": []})]},
    ],
}

TEXTS = {
    "explicit": {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    "empty prompt": {"prompt": "", "chosen": GOOD, "rejected": BAD},
    "transcripts": SCHEMAS["transcripts"],
    "rendered": {"prompt": f"<|user|>{Q}<|assistant|>", "chosen": f"{GOOD}<eos>", "rejected": f"{BAD}<eos>"},
}
