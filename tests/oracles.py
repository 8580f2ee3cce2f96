"""DeMo and DisTrO in float64, as plain as possible: numpy and loops over chunks.

Sources: DeMo (arXiv 2411.19870, algorithm 1 and the reference `demo.py`), and the order of
    operations of Psyche's train
loop. Parameters are numpy arrays; a result is, per parameter, a list over chunks of `(indices,
values)`.
"""

from __future__ import annotations

import math

import numpy as np


def chunk_side(n, target):
    divisors = [d for d in range(1, n + 1) if n % d == 0 and d <= target]
    return max(divisors) if divisors else 1


def dct_basis(n):
    basis = np.zeros((n, n))
    for j in range(n):
        for b in range(n):
            if ((2 * j + 1) * b) % (2 * n) == n:  # an odd multiple of pi / 2
                continue
            scale = math.sqrt(1 / n) if b == 0 else math.sqrt(2 / n)
            basis[j, b] = scale * math.cos(math.pi * (2 * j + 1) * b / (2 * n))
    return basis


def chunk_windows(shape, target):
    """Index expressions of all chunks of an array, in the order in which they are sent."""
    if len(shape) == 1:
        w = chunk_side(shape[0], target)
        return [(slice(x * w, (x + 1) * w),) for x in range(shape[0] // w)]
    h, w = chunk_side(shape[-2], target), chunk_side(shape[-1], target)
    return [
        (*lead, slice(y * h, (y + 1) * h), slice(x * w, (x + 1) * w))
        for lead in np.ndindex(*shape[:-2])
        for y in range(shape[-2] // h)
        for x in range(shape[-1] // w)
    ]


def encode_chunk(x):
    if x.ndim == 1:
        return x @ dct_basis(x.shape[0])
    return dct_basis(x.shape[0]).T @ x @ dct_basis(x.shape[1])


def decode_chunk(c):
    if c.ndim == 1:
        return c @ dct_basis(c.shape[0]).T
    return dct_basis(c.shape[0]) @ c @ dct_basis(c.shape[1]).T


def top_k(coefficients, k):
    """Indices and values of the k of largest magnitude; equal ones by lowest index."""
    flat = coefficients.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    kept = sorted(order[: min(k, flat.size)])
    return kept, [float(flat[i]) for i in kept]


def compress(delta, target, k):
    array = np.atleast_1d(delta)
    return [top_k(encode_chunk(array[window]), k) for window in chunk_windows(array.shape, target)]


def decode_mean(shape, target, results):
    """Decoded results, every coefficient being the mean over the entries that name it."""
    out = np.zeros(shape if shape else (1,))
    for number, window in enumerate(chunk_windows(out.shape, target)):
        named = {}
        for result in results:
            for index, value in zip(*result[number], strict=True):
                named.setdefault(index, []).append(value)
        coefficients = np.zeros(out[window].size)
        for index, values in named.items():
            coefficients[index] = sum(values) / len(values)
        out[window] = decode_chunk(coefficients.reshape(out[window].shape))
    return out.reshape(shape)


def signs_only(result):
    return [(indices, [-1.0 if v < 0 else 1.0 for v in values]) for indices, values in result]


class DeMoPeer:
    """One peer of DeMo: `send` up to the result, `receive` from all peers' results."""

    def __init__(self, parameters, *, decay, topk, chunk, weight_decay=0.0):
        self.parameters = {name: p.astype(np.float64).copy() for name, p in parameters.items()}
        self.delta = {name: np.zeros(p.shape) for name, p in parameters.items()}
        self.decay, self.topk, self.chunk, self.weight_decay = decay, topk, chunk, weight_decay

    def send(self, gradients, lr):
        results = {}
        for name, p in self.parameters.items():
            self.parameters[name] = p * (1 - lr * self.weight_decay)
            self.delta[name] = self.decay * self.delta[name] + lr * gradients[name]
            results[name] = compress(self.delta[name], self.chunk, self.topk)
            self.delta[name] = self.delta[name] - decode_mean(p.shape, self.chunk, [results[name]])
        return results

    def receive(self, results, lr):
        for name, p in self.parameters.items():
            update = decode_mean(p.shape, self.chunk, [r[name] for r in results])
            self.parameters[name] = p - lr * np.sign(update)


class DistroPeer:
    """One peer of DisTrO, in the order of the train loop.

    `doubtful[name]` marks elements in which an update was zero but for rounding, so that its sign
    is a matter of the order of additions: signs of coefficients (a, b) and (b, a) of a square chunk
    cancel on its diagonal, for instance.
    """

    def __init__(self, parameters, *, decay, topk, chunk, weight_decay=0.0):
        self.parameters = {name: p.astype(np.float64).copy() for name, p in parameters.items()}
        self.delta = {name: np.zeros(p.shape) for name, p in parameters.items()}
        self.doubtful = {name: np.zeros(p.shape, dtype=bool) for name, p in parameters.items()}
        self.decay, self.topk, self.chunk, self.weight_decay = decay, topk, chunk, weight_decay

    def look_ahead(self, prev_lr):
        return {n: p - prev_lr * np.sign(self.delta[n]) for n, p in self.parameters.items()}

    def generate(self, previous_own, gradients, lr):
        """`previous_own`: list of own results of the previous step, possibly empty."""
        results = {}
        for name, p in self.parameters.items():
            if previous_own:
                own = decode_mean(p.shape, self.chunk, [r[name] for r in previous_own])
                self.delta[name] = self.delta[name] - own
            self.parameters[name] = p * (1 - lr * self.weight_decay)
            self.delta[name] = self.decay * self.delta[name] + lr * gradients[name]
            results[name] = compress(self.delta[name], self.chunk, self.topk)
        return results

    def apply(self, results, lr):
        for name, p in self.parameters.items():
            update = decode_mean(p.shape, self.chunk, [r[name] for r in results])
            self.doubtful[name] |= np.abs(update) < 1e-12
            self.parameters[name] = p - lr * np.sign(update)
