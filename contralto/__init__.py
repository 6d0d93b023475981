"""contralto: align language and vision-language models by contrast, and decode from them by contrast.

`contralto.decoding` decodes, `contralto.eval` measures, `contralto.testbed` holds small models to try it all on.
"""

from importlib.metadata import version

from contralto.common.quiet import hold_missing_kernel

__version__ = version("contralto")
hold_missing_kernel()
