"""Functions of lists of tensors."""

import torch

from . import Built, Draw, add_case

UNARY = (
    "abs asin acos atan ceil clone cos cosh erf erfc exp expm1 floor frac lgamma log log10 log1p log2 neg reciprocal "
    "round rsqrt sigmoid sign sin sinh sqrt tan tanh trunc"
)
# Each with what follows the first list: lists of tensors that take part (L), and constants.
OTHERS = {
    "add": ["L", [2.0], [[2.0, 3.0]]],
    "sub": ["L", [2.0], [[2.0, 3.0]]],
    "mul": ["L", [2.0], [[2.0, 3.0]], [torch.tensor(2.0)]],
    "div": ["L", [2.0], [[2.0, 3.0]], [torch.tensor(2.0)]],
    "pow": ["L", [3.0], [[2.0, 3.0]]],
    "addcdiv": ["LL", "LL2", "LLs"],
    "addcmul": ["LL", "LL2", "LLs"],
    "clamp_max": ["L", [0.5], [[0.4, 0.6]]],
    "clamp_min": ["L", [0.5], [[0.4, 0.6]]],
    "lerp": ["LL", "L2"],
    "maximum": ["L", [0.5], [[0.4, 0.6]]],
    "minimum": ["L", [0.5], [[0.4, 0.6]]],
}
CONSTANTS = {"2": 2.0, "s": [2.0, 3.0]}


def _add(name, function, lists):
    def build(d: Draw) -> Built:
        sizes = [d.shape(low=2), d.shape(low=2)]  # the gradient of _foreach_addcdiv fails where a first size is 1
        leaves = [d.tensor(*shape, low=0.2, high=0.8) for _ in range(lists) for shape in sizes]

        def call(*leaves):
            return function(*(list(leaves[k : k + 2]) for k in range(0, len(leaves), 2)))

        return call, leaves

    add_case(name, build, examples=3)


def _followed_by(function, rest):
    return lambda *lists: function(*lists, *rest)


for _name in UNARY.split():
    if hasattr(torch, f"_foreach_{_name}"):  # not all are in 2.11
        _add(f"foreach_{_name}", getattr(torch, f"_foreach_{_name}"), 1)
for _name, _variants in OTHERS.items():
    for _k, _variant in enumerate(_variants):
        _lists = _variant.count("L") if isinstance(_variant, str) else 0
        _rest = [CONSTANTS[c] for c in _variant if c != "L"] if isinstance(_variant, str) else _variant
        _add(f"foreach_{_name}_{_k}", _followed_by(getattr(torch, f"_foreach_{_name}"), _rest), 1 + _lists)
_add("foreach_number_pow", lambda x: torch._foreach_pow(2.0, x), 1)
