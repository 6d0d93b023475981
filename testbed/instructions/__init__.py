"""Instructions whose fulfilment a program decides: length, case, format, beginnings and ends, keywords, language.

The checks are in the manner of IFEval (Zhou et al. 2023, arXiv 2311.07911), prompts and wordings are our own. A recipe of
`contralto data` names the functions: rows `contralto.testbed.instructions:prompts`, a role with `engine: function` and
`use: contralto.testbed.instructions:revise` (or `judge`), a `scorer: contralto.testbed.instructions:score`.
`examples/instructions.yaml` does. Train, dev and test have no topic in common.
"""

from contralto.testbed.instructions.kinds import KINDS, Instruction, Kind, parse_instruction
from contralto.testbed.instructions.prompts import prompts, topics
from contralto.testbed.instructions.roles import judge, revise, score

__all__ = ["KINDS", "Instruction", "Kind", "judge", "parse_instruction", "prompts", "revise", "score", "topics"]
