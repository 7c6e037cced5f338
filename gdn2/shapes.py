"""One check for the shapes of a call: an axis named twice must have one size."""

from collections.abc import Mapping

from torch import Tensor


def check(tensors: Mapping[str, tuple[Tensor | None, str]]) -> dict[str, int]:
    """Return the size of every named axis.

    Args:
        tensors: argument name -> (tensor or None, its axes such as "b t h k").

    Raises:
        ValueError: an axis has two sizes, or a tensor has another number of axes; the message names both.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (tensor, axes) in tensors.items():
        if tensor is None:
            continue
        letters = axes.split()
        if tensor.ndim != len(letters):
            raise ValueError(f"{name} must have axes [{axes}], got shape {list(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"axis '{letter}' is {size} in {name} but {sizes[letter]} in {owner[letter]}")
            owner.setdefault(letter, name)
    return sizes
