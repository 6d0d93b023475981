"""Numbered requests and their answers, for stores."""

from contralto.data_gen.store import TrackedRequest
from contralto.data_gen.types import Answer, Ask, Sampling, make_request


def asked(number, *, row=None, role="target"):
    """A request of its own for every number."""
    request = make_request(Ask(role=role, prompt=f"{number} ="), engine={"m": 1}, sampling=Sampling(), seed=0, row="r")
    return TrackedRequest(request=request, row=row or f"row {number}", strategy="s", role=role, tag="answer", model="m")


def answer(number, text=None):
    return Answer(text=text or f"it is {number}", prompt_tokens=3, completion_tokens=number, logprobs=(-0.5, -1 / 3))
