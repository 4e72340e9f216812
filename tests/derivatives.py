"""Values with their gradients, compared with those of a loss written token by token."""

import torch


def tokens_of(mask):
    """(sequence, position) of every token that counts."""
    return [tuple(i) for i in mask.nonzero().tolist()]


def value_and_gradient(loss, *leaves, retain_graph=False):
    return [loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=retain_graph)]


def agree(ours, naive, *leaves):
    results = [value_and_gradient(loss, *leaves, retain_graph=True) for loss in (ours, naive)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def differentiate(function, x, upstream=None):
    """(value, gradient) of a function of one tensor."""
    leaf = x.detach().clone().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value, leaf, None if upstream is None else upstream.to(value))[0]
