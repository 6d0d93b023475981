"""The model runner of this process: `v1`, `v2`, or None in the ordinary suite."""

import os

RUNNER = os.environ.get("CONTRALTO_VLLM")
