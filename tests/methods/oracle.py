"""Every method in float64 from its formulas alone: numpy, Python integers and loops over chunks.

Sources: DeMo (arXiv 2411.19870), SparseLoCo (2508.15706), DiLoCo (2311.08105), Streaming DiLoCo
(2501.18512), MuLoCo (2505.23725); Newton-Schulz as torch.optim.Muon documents it; Philox 4x32-10
(Salmon et al., SC 2011). Parameters are dicts of numpy arrays; `gradient(replica, step, values)`
and `rate(step)` count steps from 0. Every run returns the shared parameters after each inner step.
"""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
import torch

from tests.oracles import chunk_side, dct_basis, top_k

NOISE = 1e-13  # sums that cancel, but for rounding
basis = functools.cache(dct_basis)


def encode_chunk(x):
    return x @ basis(len(x)) if x.ndim == 1 else basis(len(x)).T @ x @ basis(x.shape[1])


def decode_chunk(c):
    return c @ basis(len(c)).T if c.ndim == 1 else basis(len(c)) @ c @ basis(c.shape[1]).T


def windows(array, chunk, transform):
    """Index expressions of an array's chunks; vectors in `chunk`^2 elements without transform."""
    if array.ndim == 1:
        target = chunk if transform else chunk * chunk
        w = chunk_side(len(array), target)
        return [(slice(i, i + w),) for i in range(0, len(array), w)]
    h, w = chunk_side(array.shape[-2], chunk), chunk_side(array.shape[-1], chunk)
    return [
        (*lead, slice(i, i + h), slice(j, j + w))
        for lead in np.ndindex(*array.shape[:-2])
        for i in range(0, array.shape[-2], h)
        for j in range(0, array.shape[-1], w)
    ]


def philox(counter, key):
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            (second >> 32) ^ b ^ low, second & 0xFFFFFFFF,
            (first >> 32) ^ d ^ high, first & 0xFFFFFFFF,
        )  # fmt: skip
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return a


def random_positions(name, chunk, size, k, seed, turn):
    word = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    words = turn & 0xFFFFFFFF, turn >> 32
    keys = [philox((r, chunk, *words), (seed & 0xFFFFFFFF, word)) for r in range(6)]
    bits = (size - 1).bit_length()
    low = -(-bits // 2)

    def permuted(place):
        parts = [place % 2**low, place // 2**low]  # lower, upper
        for r, key in enumerate(keys):
            width = bits - low if r % 2 == 0 else low
            mixed = (parts[r % 2] + key) * 0x9E3779B1 % 2**32
            mixed = (mixed ^ mixed // 2**15) * 0x85EBCA6B % 2**32
            parts[1 - r % 2] ^= mixed // 2 ** (32 - width)
        return parts[0] + 2**low * parts[1]

    found = []
    for place in range(k):
        place = permuted(place)
        while place >= size:
            place = permuted(place)
        found.append(place)
    return sorted(found)


def bf16(x):
    return float(torch.tensor(x, dtype=torch.float64).to(torch.bfloat16).double())


def two_levels(values):
    sizes = [abs(v) for v in values]
    low = high = sum(sizes) / len(sizes)
    for _ in range(8):
        middle = (low + high) / 2
        upper, lower = [s for s in sizes if s > middle], [s for s in sizes if s <= middle]
        high = sum(upper) / len(upper) if upper else low
        low = sum(lower) / len(lower) if lower else high
    low, high = bf16(low), bf16(high)
    return [math.copysign(high if s > (low + high) / 2 else low, v)
            for s, v in zip(sizes, values, strict=True)]  # fmt: skip


def multiples(values, most):
    scale = float(np.float32(max(abs(v) for v in values) / most))
    if scale == 0:
        return [0.0 for _ in values]
    return [float(np.clip(np.rint(v / scale), -most, most)) * scale for v in values]


def codebook(values):
    v = np.array(values)
    m = v.mean()
    c = v - m
    sigma = math.sqrt((c**2).sum() / (len(v) - 1)) if len(v) > 1 else 0.0
    s = 6 * sigma / 4 or 1.0
    code = np.clip(np.rint(c / s + 2), 0, 3)
    table = [m + (c[code == b].mean() if (code == b).any() else 0.0) for b in range(4)]
    return [float(np.float32(table[int(b)])) for b in code]


def quantised(chunks, kind):
    """What receivers see of the values of one tensor's chunks, `[(indices, values)]`."""
    if kind == "codebook4":
        everything = iter(codebook([v for _, values in chunks for v in values]))
        return [(index, [next(everything) for _ in values]) for index, values in chunks]
    change = {
        "parameter": lambda values: values,
        "bf16": lambda values: [bf16(v) for v in values],
        "sign": lambda values: [-1.0 if v < 0 else 1.0 for v in values],
        "2bit": two_levels,
        "4bit": lambda values: multiples(values, 7),
        "8bit": lambda values: multiples(values, 127),
    }[kind]
    return [(index, change(values)) for index, values in chunks]


def select(name, array, turn, *, how, transform, chunk, k, seed):
    found = []
    for number, window in enumerate(windows(array, chunk, transform)):
        part = encode_chunk(array[window]) if transform else array[window]
        flat = part.reshape(-1)
        if how == "topk":
            found.append(top_k(part, k))
        else:
            every = range(flat.size)
            where = (
                list(every)
                if how == "all"
                else random_positions(name, number, flat.size, min(k, flat.size), seed, turn)
            )
            found.append((where, [float(flat[i]) for i in where]))
    return found


def dense(shape, results, *, transform, chunk, merge):
    """Several replicas' results of a tensor, merged and transformed back."""
    out = np.zeros(shape)
    for number, window in enumerate(windows(out, chunk, transform)):
        named = {}
        for result in results:
            for index, value in zip(*result[number], strict=True):
                named.setdefault(index, []).append(value)
        flat = np.zeros(out[window].size)
        for index, values in named.items():
            flat[index] = sum(values) / (len(values) if merge == "named" else len(results))
        part = flat.reshape(out[window].shape)
        out[window] = decode_chunk(part) if transform else part
    return out


class Owners:
    """What owners make of the mean: coded again, entries that nobody names left out."""

    def __init__(self, kind, *, chunk, beta=0.0, keeps=False):
        self.kind, self.chunk, self.beta, self.keeps = kind, chunk, beta, keeps
        self.kept = {}

    def send(self, name, mean, named):
        """The mean `[..]` as it arrives, of entries where `named`."""
        out, kept = np.zeros(mean.shape), self.kept.setdefault(name, np.zeros(mean.shape))
        if self.keeps:
            kept *= self.beta
            kept += np.where(named, mean, 0.0)
            mean = kept.copy()
        for window in windows(mean, self.chunk, False):
            where = named[window].reshape(-1).nonzero()[0]
            flat = np.zeros(out[window].size)
            if len(where):
                values = [float(v) for v in mean[window].reshape(-1)[where]]
                flat[where] = quantised([(where, values)], self.kind)[0][1]
            out[window] = flat.reshape(out[window].shape)
        if self.keeps:
            kept -= np.where(named, out, 0.0)
        return out


def clipped(results):
    norms = [math.sqrt(sum(v * v for _, values in r for v in values)) for r in results]
    median = sorted(norms)[(len(norms) - 1) // 2]
    return [
        [(index, [v * min(1.0, median / (norm + 1e-8)) for v in values]) for index, values in r]
        for r, norm in zip(results, norms, strict=True)
    ]


def newton_schulz(matrix, steps=5, coefficients=(3.4445, -4.775, 2.0315), eps=1e-7):
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / max(np.linalg.norm(x), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def orthogonal(array):
    if array.ndim == 2:
        rows, columns = array.shape
        return newton_schulz(array) * math.sqrt(max(1, rows / columns))
    return np.stack([orthogonal(part) for part in array])


def clean_sign(x):
    return np.where(np.abs(x) < NOISE, 0.0, np.sign(x))


class AdamW:
    def __init__(self, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        (self.b1, self.b2), self.eps, self.decay = betas, eps, weight_decay
        self.m, self.v, self.t = {}, {}, {}

    def step(self, values, gradients, lr):
        for n, g in gradients.items():
            self.t[n] = t = self.t.get(n, 0) + 1
            self.m[n] = self.b1 * self.m.get(n, 0) + (1 - self.b1) * g
            self.v[n] = self.b2 * self.v.get(n, 0) + (1 - self.b2) * g * g
            root = np.sqrt(self.v[n] / (1 - self.b2**t)) + self.eps
            step = self.m[n] / (1 - self.b1**t) / root
            values[n] = values[n] * (1 - lr * self.decay) - lr * step


class Muon:
    def __init__(self, mu, nesterov, weight_decay=0.1, others=None):
        self.mu, self.nesterov, self.decay = mu, nesterov, weight_decay
        self.others, self.b = others or AdamW(), {}

    def step(self, values, gradients, lr):
        self.others.step(values, {n: g for n, g in gradients.items() if g.ndim < 2}, lr)
        for n, g in gradients.items():
            if g.ndim < 2:
                continue
            self.b[n] = self.mu * self.b.get(n, 0) + (1 - self.mu) * g
            update = (1 - self.mu) * g + self.mu * self.b[n] if self.nesterov else self.b[n]
            values[n] = values[n] * (1 - lr * self.decay) - lr * orthogonal(update)


def momentum(
    start, gradient, rate, *, replicas, steps, beta, k=3, chunk=8, alpha=1.0, gain="rate",
    kind="parameter", merge="named", transform=True, how="topk", phi="sign", delay=0, ahead=False,
    feedback="exact", length=1.0, decay=0.0, seed=0, mu=0.0,
):  # fmt: skip
    """DeMo, DisTrO and random-k: `phi` sign, linear (with Nesterov's `mu`) or muon."""
    shared = {n: p.copy() for n, p in start.items()}
    d = [{n: np.zeros(p.shape) for n, p in start.items()} for _ in range(replicas)]
    own = [{n: np.zeros(p.shape) for n, p in start.items()} for _ in range(replicas)]
    u = {n: np.zeros(p.shape) for n, p in start.items()}
    options = {"transform": transform, "chunk": chunk}
    queue, path, before = [], [], 0.0
    for t in range(steps):
        eta, sent = rate(t), []
        for r in range(replicas):
            at = {n: p - before * np.sign(d[r][n]) if ahead else p for n, p in shared.items()}
            g, result = gradient(r, t, at), {}
            factor = {"rate": eta, "one": 1.0, "ema": 1 - beta}[gain]
            for n in shared:
                d[r][n] = beta * (d[r][n] - alpha * own[r][n]) + factor * g[n]
                chosen = select(n, d[r][n], t, how=how, k=k, seed=seed, **options)
                result[n] = quantised(chosen, kind)
                back = result[n] if feedback == "sent" else chosen
                own[r][n] = dense(g[n].shape, [back], merge="named", **options)
                if feedback == "none":
                    own[r][n] = np.zeros(g[n].shape)
            sent.append(result)
        queue.append(sent)
        for n in shared:
            shared[n] = shared[n] * (1 - eta * decay)
        if t >= delay:
            results = queue.pop(0)
            for n in shared:
                mean = dense(shared[n].shape, [x[n] for x in results], merge=merge, **options)
                if phi == "linear":
                    once = 1.0 if gain == "rate" and kind != "sign" else eta
                    u[n] = mu * u[n] + mean
                    step = length * once * (mean + mu * u[n])
                elif phi == "muon" and mean.ndim >= 2:
                    step = eta * orthogonal(mean)
                else:
                    step = eta * clean_sign(mean)
                shared[n] = shared[n] - step
        before = eta
        path.append({n: p.copy() for n, p in shared.items()})
    return path


def local(
    start, gradient, rate, *, replicas, steps, every, inner, fragments=(None,), delay=0, mix=0.0,
    how="all", k=3, chunk=8, kind="parameter", feedback="none", beta=0.95, alpha=1.0,
    merge="mean", clip=False, eta_o=1.0, mu=0.0, seed=0, transform=False, owners=None,
):  # fmt: skip
    """SparseLoCo, DiLoCo, streamed or not, and MuLoCo: `inner()` makes a replica's optimiser.

    Owners merge what is sent whole, or all by `owners`, as what the means travel.
    """
    shared = {n: p.copy() for n, p in start.items()}
    own = [{n: p.copy() for n, p in start.items()} for _ in range(replicas)]
    inners = [inner() for _ in range(replicas)]
    e = [{n: np.zeros(p.shape) for n, p in start.items()} for _ in range(replicas)]
    u = {n: np.zeros(p.shape) for n, p in start.items()}
    window = every // len(fragments)
    options = {"transform": transform, "chunk": chunk}
    owners = kind if how == "all" and owners is None else owners
    if owners and replicas > 1:
        owners = Owners(owners, chunk=chunk, beta=beta, keeps=feedback == "sent")
    flying, path = {}, []
    for t in range(steps):
        for r in range(replicas):
            inners[r].step(own[r], gradient(r, t, own[r]), rate(t))
        w, left = divmod(t + 1 + delay, window)
        if left == 0:
            turn = w - 1
            names = fragments[turn % len(fragments)] or list(shared)
            sent = []
            for r in range(replicas):
                result = {}
                for n in names:
                    value = beta * e[r][n] + (shared[n] - own[r][n])
                    chosen = select(n, value, turn, how=how, k=k, seed=seed, **options)
                    result[n] = quantised(chosen, kind)
                    if feedback != "none":
                        back = result[n] if feedback == "sent" else chosen
                        taken = dense(value.shape, [back], merge="named", **options)
                        e[r][n] = value - alpha * taken
                sent.append(result)
            flying[turn] = names, sent, [{n: own[r][n].copy() for n in names}
                                         for r in range(replicas)]  # fmt: skip
        w, left = divmod(t + 1, window)
        if left == 0 and w - 1 in flying:
            names, sent, then = flying.pop(w - 1)
            for n in names:
                results = [x[n] for x in sent]
                results = clipped(results) if clip else results
                mean = dense(shared[n].shape, results, merge=merge, **options)
                if isinstance(owners, Owners):
                    ones = [[(i, [1.0] * len(i)) for i, _ in result] for result in results]
                    named = dense(mean.shape, ones, merge="named", **options) > 0
                    mean = owners.send(n, mean, named)
                u[n] = mu * u[n] + mean
                shared[n] = shared[n] - eta_o * (mean + mu * u[n])
                for r in range(replicas):
                    if mix == "rebase":
                        own[r][n] = shared[n] + (own[r][n] - then[r][n])
                    else:
                        own[r][n] = mix * own[r][n] + (1 - mix) * shared[n]
        path.append({n: p.copy() for n, p in shared.items()})
    return path


def data_parallel(start, gradient, rate, *, replicas, steps, optimizer, kind="parameter", chunk=8):
    """The mean of all gradients, and one optimiser."""
    shared, path = {n: p.copy() for n, p in start.items()}, []
    owners = Owners(kind, chunk=chunk)
    for t in range(steps):
        g = [gradient(r, t, shared) for r in range(replicas)]
        mean = {}
        for n, p in shared.items():
            results = [
                quantised(
                    select(n, x[n], t, how="all", transform=False, chunk=chunk, k=0, seed=0), kind
                )
                for x in g
            ]
            mean[n] = dense(p.shape, results, transform=False, chunk=chunk, merge="mean")
            if replicas > 1:
                mean[n] = owners.send(n, mean[n], np.full(p.shape, True))
        optimizer.step(shared, mean, rate(t))
        path.append({n: p.copy() for n, p in shared.items()})
    return path
