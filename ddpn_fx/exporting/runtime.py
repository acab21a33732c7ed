"""The few lines every written graph carries with it, so that it runs without `ddpn_fx`.

`python.py` copies the source of these functions into each file: they use nothing but torch and the builtins.
"""

import torch


def leaves(value: object) -> list:
    """The leaves of nested tuples, lists and dicts, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]


def same(a: object, b: object) -> bool:
    """Whether two leaves are equal bit for bit."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return type(a) is type(b) and (a == b or (a != a and b != b))
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    bits = [t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(bits[0], bits[1])


def describe(leaf: object) -> str:
    """Shape and dtype of a leaf, or the leaf itself."""
    return f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)


def differences(found: list, saved: list, what: str) -> list[str]:
    """One line for each leaf that is not what was saved."""
    if len(found) != len(saved):
        return [f"{len(found)} {what}s instead of {len(saved)}"]
    pairs = enumerate(zip(found, saved, strict=True))
    return [f"{what} {i}: {describe(a)} is not the saved {describe(b)}" for i, (a, b) in pairs if not same(a, b)]
