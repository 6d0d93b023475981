"""Preference pairs by contrast, and never an answer lost.

`requests` is what strategies and engines say to each other. Strategies (`clair`, `popalign`, `pairs`, `vision`) make a pair of
a row by asking; `engines`, `engines_openai` and `engines_vllm` answer; `store` keeps every answer on disk before it is used;
`recipes` reads the YAML that names all this, and `pipeline` runs it. `checks` measures pairs, `rows` reads other people's pairs,
`card` writes the data set's card.
"""
