"""The streamer of batches: the order of the texts, and pieces that add up to the whole text."""

from types import SimpleNamespace

import torch

from contralto.decoding.streaming import BatchTextStreamer

END, PAD = 0, 1


class Bytes:
    """A tokenizer of bytes, token = byte + 2, that strips the space at the beginning as sentencepiece does."""

    def decode(self, tokens, **_):
        return bytes(token - 2 for token in tokens if token > PAD).decode(errors="replace").removeprefix(" ")


def _stream(texts, **how):
    """Stream texts of any length side by side, and return the pieces that are shown."""
    rows = [[byte + 2 for byte in text.encode()] + [END] for text in texts]
    steps = max(map(len, rows))
    pieces = []
    streamer = BatchTextStreamer(
        Bytes(),
        ends=[END],
        show=lambda *piece: pieces.append(SimpleNamespace(row=piece[0], text=piece[1], is_last=piece[2])),
        **how,
    )
    streamer.put(torch.tensor([[PAD, 70]] * len(rows)))
    for step in range(steps):
        streamer.put(torch.tensor([row[step] if step < len(row) else PAD for row in rows]))
    streamer.end()
    return pieces


def test_texts_come_in_order_and_add_up():
    texts = [" two words and a caf\u00e9", "", " \u4f60\u597d, \U0001f600 and more", "x"]
    pieces = _stream(texts)
    assert [piece.row for piece in pieces] == sorted(piece.row for piece in pieces)
    assert [piece.row for piece in pieces if piece.is_last] == [0, 1, 2, 3]
    shown = ["".join(piece.text for piece in pieces if piece.row == i) for i in range(4)]
    assert shown == [text.removeprefix(" ") for text in texts]
    assert all("\ufffd" not in piece.text for piece in pieces)


def test_the_first_text_is_shown_as_it_grows_and_the_next_at_once():
    pieces = _stream(["abc", "de", "fghijk"])
    assert [(piece.row, piece.text) for piece in pieces] == [
        (0, "a"), (0, "b"), (0, "c"), (0, ""), (1, "de"), (2, "fghi"), (2, "j"), (2, "k"), (2, "")
    ]  # fmt: skip


def test_an_unfinished_character_is_shown_at_the_end():
    streamer, shown = None, []
    streamer = BatchTextStreamer(
        Bytes(), ends=[END], show=lambda row, text, is_last: shown.append((row, text, is_last))
    )
    streamer.put(torch.tensor([[70]]))
    streamer.put(torch.tensor([0xC3 + 2]))
    assert shown == []
    streamer.end()
    assert shown == [(0, "\ufffd", True)]


def test_it_can_be_used_again_and_show_the_prompts(capsys):
    streamer = BatchTextStreamer(Bytes(), ends=[END], skip_prompt=False)
    for _ in range(2):
        streamer.put(torch.tensor([[97 + 2], [98 + 2]]))
        streamer.put(torch.tensor([99 + 2, 100 + 2]))
        streamer.end()
    assert capsys.readouterr().out == "ac\nbd\n" * 2
