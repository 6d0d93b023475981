"""contralto: align language and vision-language models by contrast, and decode from them by contrast.

`contralto.decoding` decodes, `contralto.eval` measures, `contralto.testbed` holds small models to try it all on.
"""

from importlib.metadata import version

__version__ = version("contralto")
