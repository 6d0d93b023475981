"""Untrusted strings in output: pages, the card of a data set, the terminal, prompt templates.

A page or card of hostile texts has the tags of one of harmless texts, and shows them as they are.
"""

import io
import json
import time
from argparse import Namespace
from html.parser import HTMLParser

import pytest
import yaml
from helpers import comparisons
from helpers.serving import Server
from markdown_it import MarkdownIt
from rich.console import Console

from contralto import cli
from contralto.align.monitoring.record import Point, Record
from contralto.align.monitoring.report import write_report
from contralto.cli import explain_page
from contralto.cli.demo import page
from contralto.cli.demo.examples import Example, TokenCost
from contralto.cli.pairs_view import show
from contralto.common import errors, texts
from contralto.data_gen import card, escaping, templates
from contralto.data_gen.pipeline import Result
from contralto.data_gen.strategies.c_rag import parse_demonstration
from contralto.data_gen.strategies.con_j import parse_better
from contralto.data_gen.strategies.verdicts import parse_verdict
from contralto.data_gen.types import Pair, Rejected
from contralto.decoding import methods
from contralto.decoding.trace import Candidate, RuledOut, Step
from contralto.eval.comparison import report
from contralto.eval.judging.verdicts import VERDICTS
from contralto.testbed import worlds

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![](http://example.org/seen.png)",
    "a | b | c",
    "back\\| slash \\\\| bars",
    "``` `` ` code",
    "code\n```\n<b>bold</b>",
    "--- \n\n# heading\n---\nlicense: mit\n",
    "{{ 7 * 7 }} {% raw %} {{ recipe.__class__ }}",
    '" onmouseover="alert(1)',
    "$x$ and $\\frac{$ *bold* __init__ <!-- -->",
    "</code></pre></table>",
    "&lt;script&gt; &#60;b&#62;",
    "http://example.org and www.example.org <http://example.org>",
]

ALL = " ".join(HOSTILE)


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.texts).split())


def same_tags(make, text):
    """Compare a page of a hostile text with one of a harmless text, and return what the former shows."""
    plain, hostile = Tags(make("harmless text".ljust(len(text), "m"))), Tags(make(text))
    assert hostile.tags == plain.tags
    assert "harmless text" in plain.words
    return hostile.words


@pytest.fixture(scope="module")
def comparison():
    """A comparison as it is kept."""
    return json.dumps(comparisons.comparison())


@pytest.mark.slow
def test_the_page_of_a_comparison(comparison):
    def make(text):
        changed = comparison
        for word in ("one", "acc", "problems", "image", "cd beta=0.5", "testbed:one"):
            changed = changed.replace(json.dumps(word), json.dumps(text))
        for word in ("perhaps", "question", "True"):
            changed = changed.replace(word, json.dumps(text)[1:-1])
        return report.page(json.loads(changed), title=text, lead=text)

    short = '"><img src=x onerror=alert(1)>'  # a long one would leave the plots less room
    assert same_tags(make, short).count(short) >= 2


@pytest.mark.slow
def test_the_page_of_a_training(tmp_path):
    def make(text):
        pair = {
            "name": text,
            "prompt": text,
            "chosen": text,
            "rejected": text,
            "chosen_tokens": 1,
            "rejected_tokens": 1,
        }
        points = [Point(step, step / 8, [-step / 4.0] * 2, [-step / 2.0] * 2) for step in (0, 8)]
        about = {"model": text, "losses": [text], "beta": 0.1, "learning_rate": 1e-6, "batch": 4, "processes": 1}
        about |= {"device": text, "steps": 8, "seconds": 1.0, "parameters": 10, "trained": 10, "adapter": False}
        about |= {"datasets": {text: 4}, "settings": {text: text}, "versions": {text: text}}
        warning = {"step": 8, "kind": text, "text": text}
        Record("", text, [pair] * 2, [0.0] * 2, [0.0] * 2, [None] * 2, points, [], [warning], about).save(tmp_path)
        return write_report(tmp_path).read_text()

    assert same_tags(make, ALL).count(" ".join(ALL.split())) >= 2


@pytest.mark.slow
def test_the_page_of_the_demo(comparison):
    """Its problems are our own; the texts are a model's."""
    problem = next(worlds.problems(5, "dev"))
    tokenizer = type("Tokenizer", (), {"convert_ids_to_tokens": lambda self, token: f"▁{self.text}"})()

    def make(text):
        tokenizer.text = text
        step = Step(
            0,
            (Candidate(1, 0.5),),
            ((Candidate(0, 0.5),),),
            (Candidate(0, 0.5),),
            (-1.0, -2.0, -1.0),
            RuledOut(0, 0.0, ()),
        )
        example = Example(problem, text, text, [step])
        return page.render(json.loads(comparison), [example], TokenCost(1.0, 1.0, 2.0), tokenizer)

    assert same_tags(make, ALL).count(" ".join(ALL.split())) >= 2


def test_the_page_of_a_text():
    def make(text):
        config = methods.DecodingConfig(method="cad", contrast_prompt=text)
        step = Namespace(changed=True, ratio=0.5, ruled_out=Namespace(tokens=1, probability=0.1))
        candidate = Namespace(text=text, probability=0.5, is_chosen=True)
        token = Namespace(step=step, text=text, word=text, space=" ", before=text, greedy=text, strength=0.5)
        token.candidates, token.probabilities = [[candidate]] * 4, [0.1, 0.2, 0.3]
        pictures = [(text, "data:image/png;base64,")]
        return explain_page.render(config, [token], model=text, prompt=text, greedy=text, pictures=pictures)

    assert same_tags(make, ALL).count(" ".join(ALL.split())) >= 2


# ------------------------------------------------------------------------------------------------------------- Markdown


def card_of(folder, text):
    """The card of a data set in which everything that is not ours is `text`."""
    said = {"role": "assistant", "content": text}
    row = {
        "id": text,
        "prompt": [{"role": "user", "content": text}],
        "chosen": [said],
        "rejected": [said],
        "strategy": text,
    }
    cost = {"role": text, "requests": 1, "prompt_tokens": 1, "completion_tokens": 1, "money": 1, "currency": text}
    counts = {"rows": 1, "pairs": 1, "rejected": {text: 1}, "failed": {text: 1}, "dropped": {text: 1}}
    summary = {
        "name": text,
        "recipe": {"rows": text, "long": f"{'w' * 60} ``` {'w' * 90} {text}"},
        "models": {text: {"engine": text, "model": text}},
        "counts": counts,
        "costs": [cost],
        "templates": {text: 1},
    }
    return card.write(folder, [row], summary).read_text()


@pytest.mark.parametrize("text", HOSTILE)
def test_the_card_of_a_data_set(tmp_path, text, monkeypatch):
    monkeypatch.setattr(card, "_plot", lambda *_: "plots/contrast.png")
    render = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render

    def make(text):
        header, _, body = card_of(tmp_path, text).removeprefix("---\n").partition("\n---\n")
        assert yaml.safe_load(header)["pretty_name"] == text
        assert set(yaml.safe_load(header)) == {"pretty_name", "tags", "size_categories", "configs"}
        return render(body)

    shown = same_tags(make, text)
    once = " ".join(text.split())
    assert shown.count(once) >= 8  # title, headings, cells and quotations show the text as it is


@pytest.mark.slow
def test_the_plot_of_a_card_reads_no_formulas(tmp_path):
    card_of(tmp_path, "$\\frac{$ and $x$")
    assert (tmp_path / "plots/contrast.png").stat().st_size > 1000


def test_escaped_texts_are_shown_as_they_are():
    render = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render
    for text in HOSTILE:
        shown = Tags(render(f"| a |\n|---|\n| {escaping.inline(text)} |\n"))
        assert shown.tags.count(("td",)) == 1
        assert shown.words == f"a {' '.join(text.split())}"
        assert Tags(render(f"x\n\n{escaping.quoted(text, limit=500)}\n")).tags == [("p",), ("pre",), ("code",)]
        assert [tag for tag, *_ in Tags(render(escaping.fenced(text))).tags] == ["pre", "code"]


# ------------------------------------------------------------------------------------------------------------- terminal

CONTROLS = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\r[/bold] [link=http://example.org]"


def test_the_terminal_gets_no_commands():
    row = {"id": CONTROLS, "prompt": [{"role": "user", "content": CONTROLS}]}
    pair = Pair(prompt=row["prompt"], chosen=CONTROLS, rejected="no", columns={"said": CONTROLS})
    results = [
        Result(row, CONTROLS, [], outcomes=[pair, Rejected(CONTROLS)]),
        Result(row, CONTROLS, [], failed=CONTROLS),
    ]
    out = io.StringIO()
    show(Console(file=out, force_terminal=False, width=400), results)
    assert not texts.CONTROL.search(out.getvalue())
    assert "\\x1b]0;owned\\x07" in out.getvalue()
    assert "[/bold] [link=http://example.org]" in out.getvalue()


@pytest.mark.parametrize(
    "error", [ValueError(CONTROLS), OSError(2, "gone", f"a{CONTROLS}.png"), RuntimeError(CONTROLS)]
)
def test_errors_give_the_terminal_no_commands(error, capsys):
    def run():
        with errors.during(CONTROLS):
            raise error

    assert errors.guarded("test", run) == 2
    said = capsys.readouterr().err
    assert not texts.CONTROL.search(said)
    assert said.count("\\x1b]0;owned\\x07") == 2
    assert said.count("\n") == 1


def test_an_endpoint_that_refuses_gives_the_terminal_no_commands(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    with Server(status=lambda body: (401, {"error": {"message": CONTROLS}})) as server:
        role = {"engine": "openai", "base_url": server.url, "model": "m", "key_env": None}
        made = {"rows": "rows.jsonl", "strategies": ["on_policy_judge"], "roles": {"target": role, "judge": role}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**made, "output": "out"}))
        assert cli.main(["data", "run", str(tmp_path / "recipe.yaml")]) != 0
    out, err = capsys.readouterr()
    assert "owned" in out + err
    assert not texts.CONTROL.search(out + err.replace("\r", ""))  # a progress bar's own


def test_a_batch_file_gives_the_terminal_no_commands(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    role = {"engine": "openai", "base_url": "http://localhost:1/v1", "model": "m", "key_env": None}
    strategy = {"use": "best_of_n", "scorer": "contralto.testbed.questions:score"}
    made = {"rows": "rows.jsonl", "strategies": [strategy], "roles": {"target": role}, "output": "out"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    (tmp_path / "answers.jsonl").write_text(f'{CONTROLS}\n{{"custom_id": "k", "error": "e"}}\n')
    argv = [
        "data",
        "batch",
        str(tmp_path / "recipe.yaml"),
        "--role",
        "target",
        "--read",
        str(tmp_path / "answers.jsonl"),
    ]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "owned" in err
    assert not texts.CONTROL.search(out + err)


def test_status_shows_names_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "hostile_answers.py").write_text("def answer(request):\n    return str(request.seed)\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    role = {"engine": "function", "use": "hostile_answers:answer"}
    strategy = {"use": "best_of_n", "name": "[red]x[/blue]", "scorer": "contralto.testbed.questions:score"}
    made = {"rows": "rows.jsonl", "strategies": [strategy], "roles": {"target": role}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    cli.main(["data", "preview", str(tmp_path / "recipe.yaml")])
    capsys.readouterr()
    assert cli.main(["data", "status", str(tmp_path / "recipe.yaml")]) == 0
    assert "[red]x[/blue]" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ task.__class__ }}", "unsafe"),
        ("{{ task.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ task }}{{ ''.__class__.__base__ }}", "unsafe"),
        ("{{ task.format.__globals__ }}", "unsafe|no attribute"),
        ("{{ '{0.__class__}'.format(task) }}", "unsafe|no attribute"),
        ("{{ task }}{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ task }}{% include '/etc/passwd' %}", "loader"),
        ("{{ task }}{{ [1, 2]|random }}", "No filter named 'random'"),
        ("{{ task }}{{ lipsum() }}", "lipsum"),
        ("{{ task }}{{ cycler.__init__.__globals__.os.popen('id').read() }}", "cycler|unsafe"),
    ],
)
def test_templates_reach_nothing_behind_their_fields(tmp_path, text, message):
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"template .*mine\.txt,? .*({message})"):
        templates.load(str(path), "task")


@pytest.mark.parametrize("text", HOSTILE)
def test_values_are_not_templates(text):
    assert text in templates.load("prefix_good", "task").render(task=text)


PARSERS = {
    "sections": lambda text: templates.sections(text, "thought", "teacher_reasoning"),
    "demonstration": lambda text: parse_demonstration(
        f"{{contrast}}: {text}\n{{explanation}}: {text}\n{{answer}}: A", 2
    ),
    "verdict": parse_verdict,
    "better": parse_better,
    **{form: VERDICTS.get(form).read for form in ("letters", "five", "identifier")},
}
REPEATED = [" ", "\n", "\t", "a", "1", "-", "_", "*", "#", "|", "[[ ", "{ ", "1,", "m ", "- \n", "\n---", "[", "A\n"]
REPEATED += ["Verdict: A, ", "answer "]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_no_reply_takes_a_time_that_grows_with_its_square(name):
    """200,000 characters, a fifth of the smallest limit of a reply. With regular expressions that backtrack: minutes."""
    begin = time.process_time()
    for part in REPEATED:
        PARSERS[name](part * (200_000 // len(part)) + "x\0")
    assert time.process_time() - begin < 30
