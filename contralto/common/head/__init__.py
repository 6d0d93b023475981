"""Measure how a model computes its logits from hidden states, independently of the names of its modules.

`output` measures what follows the last hidden state: the output layer with a factor or a soft cap, so that losses can compute
logits of the scored tokens alone. `layers` measures what lies between the last layer and the output layer, so that earlier
layers can take the same path to logits. Both watch a forward pass of the model itself with `hooks`, and compare the result
with the model's own logits. `stack` finds the layers, and skips some of them.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.common.head.layers import LayerPath as LayerPath
    from contralto.common.head.layers import find_path as find_path
    from contralto.common.head.layers import read_layers as read_layers
    from contralto.common.head.output import Head as Head
    from contralto.common.head.output import HeadForm as HeadForm
    from contralto.common.head.output import HeadInputs as HeadInputs
    from contralto.common.head.output import head_inputs as head_inputs
    from contralto.common.head.output import head_of as head_of
    from contralto.common.head.stack import LayerList as LayerList
    from contralto.common.head.stack import find_layers as find_layers
    from contralto.common.head.stack import running_layers as running_layers

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "layers": ["LayerPath", "find_path", "read_layers"],
        "output": ["Head", "HeadForm", "HeadInputs", "head_inputs", "head_of"],
        "stack": ["LayerList", "find_layers", "running_layers"],
    },
)
