"""Whole sequences: diverse beams, readings of decoders and encoder-decoders, and the reranker, against references in plain Python."""

import random

import pytest
import torch
import zoo
from oracles import ranking as reference
from torch.testing import assert_close

from contralto.decoding.executors.diverse import ENDED, diverse_beams
from contralto.decoding.executors.reranking import SequenceProjection, SimilarityReranker
from contralto.decoding.rules import sequences as rules
from contralto.decoding.sequences import read_sequences

FAMILIES = ["gpt2", "llama", "t5", "bart"]


def _inputs(family, batch=3, seed=0):
    rows = zoo.prompts(batch, seed=seed)
    return rows, zoo.pad(rows, side="right" if family in zoo.ENCODER_DECODERS else "left")


def _sequences(batch=3, seed=0):
    rng = random.Random(seed)
    lengths = [1 + 2 * at for at in range(batch)]
    padded = torch.full((batch, max(lengths)), ENDED)
    for at, length in enumerate(lengths):
        padded[at, :length] = torch.tensor([rng.randrange(5, 30) for _ in range(length)])
    return padded


def _plain(model, prompt, tokens):
    """Return log-probabilities and hidden states of one row without padding: per token, of its source, of its own."""
    if model.config.is_encoder_decoder:
        out = model(input_ids=prompt[None], labels=tokens[None], output_hidden_states=True)
        logits, states, source = out.logits[0], out.decoder_hidden_states[-1][0], out.encoder_last_hidden_state[0]
    else:
        out = model(input_ids=torch.cat([prompt, tokens])[None], output_hidden_states=True)
        at = slice(len(prompt) - 1, -1)
        logits, states, source = (
            out.logits[0][at],
            out.hidden_states[-1][0][at],
            out.hidden_states[-1][0][: len(prompt)],
        )
    logps = [reference.log_softmax(row)[token] for row, token in zip(logits.tolist(), tokens.tolist(), strict=True)]
    return logps, source.tolist(), states.tolist()


def _projected(projection, states):
    return reference.represent(states, projection.linear.weight.tolist(), projection.linear.bias.tolist())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_readings_of_a_padded_batch_equal_those_of_single_rows(family):
    model = zoo.build(family, seed=1).double()
    rows, inputs = _inputs(family)
    sequences = _sequences()
    read = read_sequences(model, inputs, sequences)
    projection = SequenceProjection(model.config.hidden_size).double()
    source, own = projection.source(read), projection.candidate(read)
    for at, row in enumerate(rows):
        tokens = sequences[at][sequences[at] != ENDED]
        logps, of_source, of_own = _plain(model, row, tokens)
        assert read.log_probs[at].item() == pytest.approx(sum(logps), rel=1e-9)
        assert read.lengths[at] == len(tokens)
        assert_close(own[at].tolist(), _projected(projection, of_own), rtol=1e-9, atol=1e-12)
        of_source = of_source[:-1] if len(of_source) > 1 else of_source
        assert_close(source[at].tolist(), _projected(projection, of_source), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 0.4, 3.0])
def test_diverse_tokens_equal_the_reference(penalty):
    rng = random.Random(0)
    for _ in range(5):
        logits = [[[rng.uniform(-1, 1) for _ in range(6)] for _ in range(4)] for _ in range(3)]
        ended = [[rng.random() < 0.3 for _ in range(4)] for _ in range(3)]
        found = rules.diverse_tokens(torch.tensor(logits).double(), ~torch.tensor(ended), diversity_penalty=penalty)
        assert found.tolist() == [
            reference.diverse(*row, e) for row, e in zip([(r, penalty) for r in logits], ended, strict=True)
        ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_diverse_beams_equal_a_search_without_cache(family):
    """Each group is that of a loop over whole rows; the end token is one that the first group writes, then others go on."""
    model = zoo.build(family, seed=1)
    rows, inputs = _inputs(family, batch=2)
    options = {"num_candidates": 3, "diversity_penalty": 1.5, "max_new_tokens": 8}
    ends = int(diverse_beams(model, inputs, **options)[0, 0, 1])
    model.generation_config.eos_token_id = ends
    found = diverse_beams(model, inputs, **options)
    for at, row in enumerate(rows):
        groups = [[] for _ in range(3)]
        for _ in range(8):
            ended = [bool(group) and group[-1] == ends for group in groups]
            logits = [_next(model, row, group) for group in groups]
            for group, token, over in zip(groups, reference.diverse(logits, 1.5, ended), ended, strict=True):
                if not over:
                    group.append(token)
        assert [[token for token in group if token != ENDED] for group in found[at].tolist()] == groups
    assert len({tuple(group) for group in groups}) == 3


def _next(model, prompt, tokens):
    """Return the logits of the next token of one row."""
    own = torch.tensor(tokens, dtype=torch.long)
    if model.config.is_encoder_decoder:
        start = torch.tensor([model.config.decoder_start_token_id])
        return model(input_ids=prompt[None], decoder_input_ids=torch.cat([start, own])[None]).logits[0, -1].tolist()
    return model(input_ids=torch.cat([prompt, own])[None]).logits[0, -1].tolist()


def test_candidate_scores_equal_the_reference():
    rng = random.Random(0)
    log_probs = [rng.uniform(-3, -0.1) for _ in range(5)]
    similarity = [rng.uniform(-1, 1) for _ in range(5)]
    for alpha in (0.0, 0.3, 1.0):
        found = rules.candidate_scores(torch.tensor(log_probs).double(), torch.tensor(similarity).double(), alpha=alpha)
        assert found.tolist() == pytest.approx(reference.candidate_scores(log_probs, similarity, alpha))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_similarity_the_reranker_is_beam_search(family):
    model = zoo.build(family, seed=1)
    _, inputs = _inputs(family)
    result = SimilarityReranker(model, SequenceProjection(model.config.hidden_size), alpha=0.0)(
        inputs, num_beams=4, max_new_tokens=6
    )
    plain = model.generate(**inputs, num_beams=4, max_new_tokens=6, early_stopping=True, do_sample=False)
    start = 1 if family in zoo.ENCODER_DECODERS else inputs["input_ids"].shape[1]
    kept = [[token for token in row if token != ENDED] for row in result.sequences.tolist()]
    assert kept == [row[start : start + len(own)].tolist() for row, own in zip(plain, kept, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_reranker_takes_the_candidate_of_the_largest_score(family):
    torch.manual_seed(0)
    model = zoo.build(family, seed=1).double()
    rows, inputs = _inputs(family)
    projection = SequenceProjection(model.config.hidden_size).double()
    result = SimilarityReranker(model, projection, alpha=0.97, length_penalty=0.5)(
        inputs, num_beams=3, max_new_tokens=5
    )
    changed = 0
    for at, row in enumerate(rows):
        cosines, log_probs = [], []
        for candidate in result.candidates[at]:
            tokens = candidate[candidate != ENDED]
            logps, source, own = _plain(model, row, tokens)
            source = source[:-1] if len(source) > 1 else source
            cosines.append(reference.cosine(_projected(projection, source), _projected(projection, own)))
            log_probs.append(sum(logps) / len(logps) ** 0.5)
        scores = reference.candidate_scores(log_probs, cosines, 0.97)
        assert result.scores[at].tolist() == pytest.approx(scores, rel=1e-9)
        best = scores.index(max(scores))
        assert result.sequences[at].tolist() == result.candidates[at, best].tolist()
        changed += best != log_probs.index(max(log_probs))
    assert changed


def test_projections_are_saved_and_loaded(tmp_path):
    own = SequenceProjection(6)
    own.save(tmp_path)
    states = torch.randn(2, 3, 6)
    assert torch.equal(own(states, torch.ones(2, 3)), SequenceProjection.load(tmp_path)(states, torch.ones(2, 3)))
    with pytest.raises(
        ValueError,
        match=r"has no cont_projection\.safetensors: give the folder of a model trained by contralto align cont",
    ):
        SequenceProjection.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rules.diverse_tokens(torch.zeros(1, 2, 3), diversity_penalty=-1),
            "diversity_penalty must be at least 0",
        ),
        (lambda: rules.candidate_scores(torch.zeros(2), torch.zeros(2), alpha=2), r"alpha must lie in \[0, 1\]"),
        (lambda: SimilarityReranker(zoo.build("gpt2", seed=1), SequenceProjection(32))({}, num_beams=1), "at least 2"),
    ],
)
def test_wrong_arguments_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
