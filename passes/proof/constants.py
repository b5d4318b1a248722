"""The elements of a constant table as terms, where its entries have a pattern."""

from __future__ import annotations

import torch
import z3

from passes.proof.terms import INTEGERS, Index, Term, Unmodelled, literal

SHORT = 64  # entries of a constant that are told apart one by one


def constant_element(tensor: torch.Tensor, index: Index) -> Term:
    """The element of a constant at ``index``: exact, by a pattern that every entry was compared with."""
    if not tensor.numel():
        raise Unmodelled("an empty constant")
    tensor = tensor.detach().cpu()
    while tensor.dim() and tensor.shape[0] == 1:
        tensor, index = tensor[0], index[1:]
    first = tensor.flatten()[0]
    if bool((tensor == first).all()):
        return literal(first.item(), tensor.dtype)
    if tensor.dim() == 1:
        if tensor.dtype in INTEGERS:
            step = int(tensor[1]) - int(first)
            if tensor.tolist() == [int(first) + step * position for position in range(len(tensor))]:
                return int(first) + step * index[0]
        if len(tensor) > SHORT:
            raise Unmodelled("a long constant without a pattern")
        result = literal(tensor[-1].item(), tensor.dtype)
        for position in range(len(tensor) - 2, -1, -1):
            result = z3.If(index[0] == position, literal(tensor[position].item(), tensor.dtype), result)
        return result
    if tensor.dim() == 2:
        below, above = tensor[-1, 0], tensor[0, -1]  # one number up to a diagonal, another one past it
        distance = torch.arange(tensor.shape[1]) - torch.arange(tensor.shape[0])[:, None]
        matches = distance[tensor == below]
        diagonal = int(matches.max()) if len(matches) else 0
        if torch.equal(tensor, torch.where(distance <= diagonal, below, above)):
            row, column = index
            kept, dropped = (literal(value.item(), tensor.dtype) for value in (below, above))
            return z3.If(column - row <= diagonal, kept, dropped)
    raise Unmodelled("a constant without a pattern")
