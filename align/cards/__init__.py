"""Model cards of what `contralto align` and `contralto amateur` save: method, paper, data, settings, figures, versions.

- `papers`: the papers of the methods, with their citations.
- `methods`: a method with its formula, read from the docstring of the function that computes it.
- `model_card`: the card of a training.
- `front_matter`: what the hub reads, by `huggingface_hub`'s own classes.
"""
