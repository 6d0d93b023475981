"""The rules of an expert and an amateur: each with its float64 reference and the values of its own parameter."""

from oracles import decoding as reference

from contralto.decoding import rules

TWO_BRANCH_RULES = {
    "contrastive_decoding": (rules.contrastive_decoding, reference.contrastive_decoding, {"beta": (0.0, 0.5, 2.0)}),
    "contrastive_decoding_li": (
        rules.contrastive_decoding_li,
        reference.contrastive_decoding_li,
        {"amateur_temperature": (0.5, 1.0, 3.0)},
    ),
}
