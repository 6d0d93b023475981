"""Guide a model towards instructions whose fulfilment a program decides, away from other prompts."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.methods import DecodingConfig, generate_kwargs
from contralto.eval.stats import holm, mcnemar_exact
from contralto.testbed.instructions import parse_instruction, prompts
from real.line import Context, Figure, Line, Section
from real.tables import against, p_text, share_cell, share_figure, table
from real.training import NEW_TOKENS, fulfilled

Row = Mapping[str, Any]


class Setting(NamedTuple):
    """A prompt that the model is guided away from, and how far."""

    away: str
    """A key of `AWAY`."""
    scale: float

    @property
    def label(self) -> str:
        """Return the words of the table."""
        return f"{self.away}, {self.scale:g}"


def _request(row: Row, rows: Sequence[Row]) -> str:
    """Return the prompt without its instruction."""
    return str(row["prompt"]).replace(parse_instruction(row["prompt"]).sentence, "").strip()


def _unrelated(row: Row, rows: Sequence[Row]) -> str:
    """Return the request of another row, without its instruction."""
    return _request(rows[(rows.index(row) + len(rows) // 2) % len(rows)], rows)


AWAY: Mapping[str, Callable[[Row, Sequence[Row]], str] | None] = {
    "the prompt's last token": None,
    "the request alone": _request,
    "another request": _unrelated,
}
"""What the model is guided away from: None is the method's default."""
SETTINGS = [Setting(away, scale) for scale in (1.5, 3.0) for away in AWAY if scale == 1.5 or AWAY[away] is not None]


@cache
def _rows(count: int) -> list[Row]:
    return list(prompts(count=count, seed=7, split="test"))


def run(context: Context) -> None:
    """Decode all prompts greedily, and by guidance in every setting.

    Args:
        context: The context of the line.
    """
    rows = _rows(context.sizes["prompts"])
    for setting in (None, *SETTINGS):
        context.units().fill(
            [_key(context, row, setting) for row in rows],
            lambda batch, setting=setting: _replies(context, [rows[i] for i in batch], setting),  # type: ignore[misc]
            title="greedy" if setting is None else setting.label,
            batch_size=10,
        )


def _key(context: Context, row: Row, setting: Setting | None) -> dict[str, Any]:
    away, scale = setting or ("", 1.0)
    return context.key("model", prompt=row["prompt"], away=away, scale=scale, tokens=NEW_TOKENS)


def _replies(context: Context, batch: Sequence[Row], setting: Setting | None) -> list[str]:
    """Return greedy replies of at most `NEW_TOKENS` tokens."""
    model, tokenizer = context.model(), context.tokenizer()
    inputs = _chats(context, [row["prompt"] for row in batch])
    how: dict[str, Any] = {}
    if setting is not None:
        other = AWAY[setting.away]
        views = (
            [] if other is None else [_chats(context, [other(row, _rows(context.sizes["prompts"])) for row in batch])]
        )
        options = {"contrast_prompt": "{prompt}"} if views else {}
        config = DecodingConfig.from_options(method="cfg", guidance_scale=setting.scale, **options)
        how = generate_kwargs(config, DecodingBatch(model, (), inputs, tuple(views)))
    output = model.generate(
        **inputs, **how, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    texts: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _chats(context: Context, texts: Sequence[str]) -> dict[str, Any]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    how: dict[str, Any] = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    return dict(context.tokenizer().apply_chat_template(chats, **how))


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    rows = _rows(context.sizes["prompts"])
    found = {each: context.units().of([_key(context, row, each) for row in rows]) for each in (None, *SETTINGS)}
    if any(texts is None for texts in found.values()):
        return None
    questions = [row["prompt"] for row in rows]
    hits = {each: fulfilled(questions, texts) for each, texts in found.items() if texts is not None}
    greedy = hits.pop(None)
    adjusted = holm([mcnemar_exact(greedy, each).p for each in hits.values()]).tolist()
    cells = [["greedy", "", share_cell(greedy), "", ""]]
    figures: dict[str, Figure] = {"greedy": share_figure(greedy)}
    for (setting, own), p in zip(hits.items(), adjusted, strict=True):
        assert setting is not None
        figures[setting.label] = share_figure(own)
        cells.append([setting.away, f"{setting.scale:g}", share_cell(own), against(greedy, own), p_text(p)])
    head = ["guided away from", "scale", "fulfilled", "against greedy", "Holm's p"]
    return Section([*_intro(len(rows)), "", *table(head, cells)], figures)


def _intro(count: int) -> list[str]:
    return [
        f"n = {count} test prompts of our own (`contralto.testbed.instructions`), a request with one instruction each, of all kinds in turn;",
        f"a program decides. Greedy, at most {NEW_TOKENS} tokens. `cfg` guides away from the prompt's last token alone (its default), from the",
        "request without the instruction, so that the instruction is all that differs, or from the request of another row (the control: a",
        "prompt that has nothing to do with the instruction).",
    ]


LINE = Line(
    name="guidance",
    title="Guidance towards an instruction",
    question="Does classifier-free guidance make a model fulfil its instruction more often?",
    order=36,
    needs=("model",),
    full={"prompts": 160},
    small={"prompts": 4},
    revision=1,
    run=run,
    render=render,
)
