"""Declare the repositories for `custom_generate`: the method of each, and the names that its arguments have in `generate()`.

Everything else about a method (its parameters, their defaults and descriptions, its formulas and capabilities) comes from its declaration
in `decoding/methods/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from contralto.decoding.methods.base import Method, MethodParameter
from contralto.decoding.methods.reference import Reference
from contralto.decoding.methods.registry import METHODS

__all__ = ["REPOSITORIES", "Argument", "HubRepository", "check_name"]


class Argument(NamedTuple):
    """A keyword argument of the `generate` function of a repository."""

    name: str
    default: Any
    kind: str
    """Its type, as documentation writes it."""
    description: str
    parameter: str | None = None
    """The parameter of the method that it sets; None for an input."""


@dataclass(frozen=True, kw_only=True)
class HubRepository:
    """A repository that holds a decoding method.

    Args:
        name: the folder in `hub/`, and the usual last part of a repository's name.
        method: a name in `METHODS`.
        title: the heading of its README.
        purpose: a paragraph about what the method is for, Markdown.
        inputs: arguments that are not parameters of the method: other models, other prompts, seeds.
        renamed: names of arguments in transformers, by the method's names of its parameters.
        omitted: parameters of the method that the repository does not offer.
        formulas: callables whose docstrings explain the formulas; empty for the rules of the method's forms.
        example: a complete script, in which `{repo_id}` is the repository.
    """

    name: str
    method: str
    title: str
    purpose: str
    inputs: tuple[Argument, ...]
    renamed: Mapping[str, str]
    omitted: tuple[str, ...]
    formulas: tuple[Reference, ...]
    example: str

    @property
    def declaration(self) -> Method:
        """Return the declaration of the method."""
        return METHODS[self.method]

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Return the arguments of the repository's `generate`: its inputs, the form, then the parameters of all forms."""
        forms = tuple(self.declaration.forms)
        found: dict[str, Argument] = {each.name: each for each in self.inputs}
        if len(forms) > 1:
            names = " or ".join(f'"{form}"' for form in forms)
            found["form"] = Argument("form", forms[0], "str", f"the formula: {names}, see below.", "form")
        for form in forms:
            for parameter in self.declaration.parameters(form).values():
                if parameter.name not in self.omitted:
                    argument = self._argument(parameter)
                    found.setdefault(argument.name, argument)
        return tuple(found.values())

    def _argument(self, parameter: MethodParameter) -> Argument:
        """Return the argument of a parameter. One that not every form has is None, which stands for its default."""
        forms = [form for form in self.declaration.forms if parameter.name in self.declaration.parameters(form)]
        name, text = self.renamed.get(parameter.name, parameter.name), parameter.description
        kind = "int" if parameter.kind is int else "float" if parameter.kind is float else "bool"
        kind = kind if parameter.kind else "str or list[int]"
        if len(forms) == len(self.declaration.forms):
            return Argument(name, parameter.default, kind, text, parameter.name)
        text = f"{text} Only for `form={forms[0]!r}`, where its default is {parameter.default}."
        return Argument(name, None, kind, text, parameter.name)


REPOSITORIES: dict[str, HubRepository] = {}
"""Every repository by name."""


def check_name(name: str) -> HubRepository:
    """Return a repository by its name.

    Args:
        name: a name in `REPOSITORIES`.

    Raises:
        ValueError: there is no such repository.

    Examples:
        >>> check_name("dola").method
        'dola'
        >>> check_name("beam-search")
        Traceback (most recent call last):
            ...
        ValueError: there is no repository 'beam-search'; there are contrastive-decoding, contrastive-search, dola, cfg, cad, vcd
    """
    if name not in REPOSITORIES:
        raise ValueError(f"there is no repository {name!r}; there are {', '.join(REPOSITORIES)}")
    return REPOSITORIES[name]


TEXT_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = "Qwen/Qwen2.5-1.5B-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
"""


def _declare(**fields: Any) -> None:
    defaults: dict[str, Any] = {"inputs": (), "renamed": {}, "omitted": (), "formulas": ()}
    repository = HubRepository(**(defaults | fields))
    REPOSITORIES[repository.name] = repository


_declare(
    name="contrastive-decoding",
    method="cd",
    title="Contrastive decoding",
    purpose="Contrastive decoding scores the next token by the difference between a model (the expert) and a weaker model of the same "
    "tokenizer (the amateur): what only the expert knows counts more, what both prefer by habit counts less. It changes greedy search, "
    "sampling and beam search, and needs no training. A good amateur is the smallest model of the same family; where there is none, "
    '`amateur="self:layers=8"` takes the first layers of the model itself.',
    inputs=(
        Argument(
            "amateur",
            None,
            "PreTrainedModel",
            "the weaker model, loaded, on any device and in any dtype; or the model itself, weakened: `self:layers=8`, `self:dropout=0.3` "
            "or `self:int4`. Required.",
        ),
    ),
    omitted=("vocabulary",),
    example="""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-1.7B-Instruct", device_map="auto")
amateur = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-1.7B-Instruct")

chat = [{"role": "user", "content": "A train leaves at 9:40 and arrives at 11:05. How long is the ride?"}]
options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
inputs = tokenizer.apply_chat_template(chat, **options).to(model.device)
output = model.generate(
    **inputs,
    custom_generate="{repo_id}",
    amateur=amateur,
    beta=0.5,
    alpha=0.1,
    do_sample=False,
    max_new_tokens=64,
    trust_remote_code=True,
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
""",
)
_declare(
    name="contrastive-search",
    method="search",
    title="Contrastive search",
    purpose="Contrastive search chooses among the `top_k` likeliest tokens one that is likely and whose hidden state differs from those of "
    "the context, so that greedy text does not repeat itself. The arguments are those of transformers before version 4.56. All candidates "
    "are read in one forward pass per token, without copies of the cache, where a test shows that the model supports it.",
    renamed={"alpha": "penalty_alpha", "k": "top_k"},
    formulas=("contralto.decoding.rules:contrastive_search",),
    example=TEXT_MODEL
    + """
inputs = tokenizer("DeepMind Company is", return_tensors="pt").to(model.device)
output = model.generate(
    **inputs,
    custom_generate="{repo_id}",
    penalty_alpha=0.6,
    top_k=4,
    do_sample=False,
    max_new_tokens=64,
    trust_remote_code=True,
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
""",
)
_declare(
    name="dola",
    method="dola",
    title="DoLa",
    purpose="DoLa contrasts the last layer of a model with the earlier layer that differs most from it, chosen for every row and token. "
    "`dola_layers` is the argument of transformers before version 4.56. Early layers pass the final norm, which the official code "
    "leaves out (`final_norm=False`), and a row does not depend on the others of its batch.",
    renamed={"layers": "dola_layers"},
    example=TEXT_MODEL
    + """
question = "On what date was the Declaration of Independence officially signed?"
inputs = tokenizer(question, return_tensors="pt").to(model.device)
output = model.generate(
    **inputs,
    custom_generate="{repo_id}",
    dola_layers="high",
    do_sample=False,
    repetition_penalty=1.2,
    max_new_tokens=64,
    trust_remote_code=True,
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
""",
)
_declare(
    name="cfg",
    method="cfg",
    title="Classifier-free guidance",
    purpose="Classifier-free guidance moves a text towards its prompt and away from a negative prompt. The arguments are those of "
    "`generate()`, whose own implementation has no beams with negative prompts and reads the two prompts one after the other; here both "
    "are rows of one forward pass.",
    inputs=(
        Argument(
            "negative_prompt_ids",
            None,
            "torch.LongTensor",
            "`(prompts, T)` the negative prompts, padded on the left; one may serve all rows. None stands for the last token of each "
            "prompt, as in transformers.",
        ),
        Argument(
            "negative_prompt_attention_mask",
            None,
            "torch.LongTensor",
            "`(prompts, T)` their mask; None if there is no padding.",
        ),
    ),
    example=TEXT_MODEL
    + """
inputs = tokenizer("Today a dragon flew over Paris, France,", return_tensors="pt").to(model.device)
negative = tokenizer("A very happy event happened,", return_tensors="pt").to(model.device)
output = model.generate(
    **inputs,
    custom_generate="{repo_id}",
    guidance_scale=1.5,
    negative_prompt_ids=negative["input_ids"],
    negative_prompt_attention_mask=negative["attention_mask"],
    do_sample=False,
    max_new_tokens=64,
    trust_remote_code=True,
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
""",
)
_declare(
    name="cad",
    method="cad",
    title="Context-aware decoding",
    purpose="Context-aware decoding contrasts the prompt with the same prompt without its context, so that the answer follows the context "
    "where it contradicts what the model remembers. The price is measured in the package's documentation: after an unrelated context "
    "right answers become rarer.",
    inputs=(
        Argument(
            "contrast_inputs",
            None,
            "Mapping[str, Tensor]",
            "the prompts without their context, as the tokenizer returns them: `input_ids` and `attention_mask`. Required.",
        ),
    ),
    example=TEXT_MODEL
    + """
context = "Argentina won the World Cups of 1978, 1986 and 2022."
question = "How many World Cups has Argentina won? Answer with a number:"
inputs = tokenizer(f"{context} {question}", return_tensors="pt").to(model.device)
output = model.generate(
    **inputs,
    custom_generate="{repo_id}",
    contrast_inputs=tokenizer(question, return_tensors="pt").to(model.device),
    alpha=0.5,
    do_sample=False,
    max_new_tokens=16,
    trust_remote_code=True,
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
""",
)
_declare(
    name="vcd",
    method="vcd",
    title="Visual contrastive decoding",
    purpose="Visual contrastive decoding contrasts the answer about an image with the answer about the same image under noise, so that what "
    "the model says of any image counts less. The noise is added to `pixel_values` here; only the inputs of the model are needed.",
    inputs=(
        Argument(
            "seed",
            None,
            "int or list[int]",
            "of the noise: one for all images, or one per image, so that an image's noise does not depend on its batch. None draws from "
            "torch's global generator.",
        ),
    ),
    example="""from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "llava-hf/llava-1.5-7b-hf"
model = AutoModelForImageTextToText.from_pretrained(name, device_map="auto")
processor = AutoProcessor.from_pretrained(name)

prompt = "USER: <image>\\nIs there a dog in the image? Answer yes or no. ASSISTANT:"
inputs = processor(images=Image.open("photo.jpg"), text=prompt, return_tensors="pt").to(model.device)
output = model.generate(
    **inputs,
    custom_generate="{repo_id}",
    alpha=1.0,
    beta=0.1,
    seed=0,
    do_sample=False,
    max_new_tokens=16,
    trust_remote_code=True,
)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
""",
)
