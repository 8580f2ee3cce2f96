"""Hierarchies in float64 from their formulas alone: a tree, each of whose nodes is once there.

A node of gradients has `gradient(t, values)`, one that learns has `values`, what all below share,
and `step(t, rate)`. Of ranks that agree there is one copy, where the code has one each.
"""

from __future__ import annotations

import numpy as np

from tests.methods.oracle import clean_sign, dense, quantised, select


class Leaf:
    def __init__(self, number, gradient):
        self.number, self.of = number, gradient

    def gradient(self, t, values):
        return self.of(self.number, t, values)


class Means:
    def __init__(self, start, children):
        self.children = children

    def gradient(self, t, values):
        found = [child.gradient(t, values) for child in self.children]
        return {n: sum(g[n] for g in found) / len(found) for n in found[0]}


class Momentum:
    """DeMo and DisTrO with values, over gradients."""

    def __init__(self, start, children, *, beta, k=3, chunk=8, delay=0, ahead=False):
        self.children, self.values = children, {n: p.copy() for n, p in start.items()}
        zeros = {n: np.zeros(p.shape) for n, p in start.items()}
        self.d, self.own = [dict(zeros) for _ in children], [dict(zeros) for _ in children]
        self.beta, self.delay, self.ahead, self.before = beta, delay, ahead, 0.0
        self.k, self.options, self.queue = k, {"transform": True, "chunk": chunk}, []

    def step(self, t, rate):
        eta, sent = rate(t), []
        for child, d, own in zip(self.children, self.d, self.own, strict=True):
            ahead = {n: self.before * np.sign(d[n]) if self.ahead else 0 for n in d}
            g = child.gradient(t, {n: p - ahead[n] for n, p in self.values.items()})
            sent.append({})
            for n in g:
                d[n] = self.beta * (d[n] - own[n]) + eta * g[n]
                chosen = select(n, d[n], t, how="topk", k=self.k, seed=0, **self.options)
                own[n] = dense(g[n].shape, [chosen], merge="named", **self.options)
                sent[-1][n] = chosen
        self.queue.append(sent)
        if t >= self.delay:
            results = self.queue.pop(0)
            for n, p in self.values.items():
                mean = dense(p.shape, [x[n] for x in results], merge="named", **self.options)
                self.values[n] = p - eta * clean_sign(mean)
        self.before = eta

    def shifted(self, n, by):
        pass  # parameters of its own it has none


class Local:
    """SparseLoCo and DiLoCo, streamed or not, over gradients (by `inner()`) or over other nodes."""

    def __init__(
        self, start, children, *, every, inner=None, fragments=(None,), delay=0, mix=0.0,
        how="all", k=3, kind="parameter", beta=0.95, feedback=False, merge="mean", eta_o=1.0,
        mu=0.0,
    ):  # fmt: skip
        self.children, self.values = children, {n: p.copy() for n, p in start.items()}
        self.inners = None if inner is None else [inner() for _ in children]
        self.own = [dict(start) if inner else child.values for child in children]
        zeros = {n: np.zeros(p.shape) for n, p in start.items()}
        self.e, self.u = [dict(zeros) for _ in children], dict(zeros)
        self.window, self.fragments = every // len(fragments), fragments
        self.delay, self.mix, self.eta_o, self.mu = delay, mix, eta_o, mu
        self.how, self.k, self.kind, self.merge = how, k, kind, merge
        self.beta = beta if feedback else 0.0
        self.options, self.flying = {"transform": False, "chunk": 8}, {}

    def step(self, t, rate):
        for r, child in enumerate(self.children):
            if self.inners is None:
                child.step(t, rate)
            else:
                own = self.own[r]
                self.inners[r].step(own, child.gradient(t, own), rate(t))
        w, left = divmod(t + 1 + self.delay, self.window)
        if left == 0:
            self.flying[w - 1] = self.sent(w - 1)
        w, left = divmod(t + 1, self.window)
        if left == 0 and w - 1 in self.flying:
            sent, then = self.flying.pop(w - 1)
            for n in sent[0]:
                mean = dense(
                    self.values[n].shape, [x[n] for x in sent], merge=self.merge, **self.options
                )
                self.u[n] = self.mu * self.u[n] + mean
                self.values[n] = self.values[n] - self.eta_o * (mean + self.mu * self.u[n])
                for r, own in enumerate(self.own):
                    if self.mix == "rebase":
                        new = self.values[n] + own[n] - then[r][n]
                    else:
                        new = self.mix * own[n] + (1 - self.mix) * self.values[n]
                    self.put(r, n, new)

    def sent(self, turn):
        names = self.fragments[turn % len(self.fragments)] or list(self.values)
        sent = []
        for own, e in zip(self.own, self.e, strict=True):
            sent.append({})
            for n in names:
                value = self.beta * e[n] + (self.values[n] - own[n])
                chosen = select(n, value, turn, how=self.how, k=self.k, seed=0, **self.options)
                sent[-1][n] = quantised(chosen, self.kind)
                e[n] = value - dense(value.shape, [sent[-1][n]], merge="named", **self.options)
        return sent, [dict(own) for own in self.own]

    def put(self, r, n, new):
        by = new - self.own[r][n]
        self.own[r][n] = new
        if self.inners is None:
            self.children[r].shifted(n, by)

    def shifted(self, n, by):
        """What is shared has been moved from above: what is not goes with it."""
        for r in range(len(self.children)):
            self.put(r, n, self.own[r][n] + by)


def tree(start, gradient, levels):
    """Levels are `(count, kind of node, options)`, the innermost first; the outermost node."""
    ranks = int(np.prod([count for count, *_ in levels]))
    nodes = [Leaf(number, gradient) for number in range(ranks)]
    for count, kind, options in levels:
        groups = [nodes[at : at + count] for at in range(0, len(nodes), count)]
        nodes = [kind(start, group, **options) for group in groups]
    (root,) = nodes
    return root


def path(start, gradient, rate, *, levels, steps, **_):
    """The outermost values after every step."""
    root, found = tree(start, gradient, levels), []
    for t in range(steps):
        root.step(t, rate)
        found.append({n: p.copy() for n, p in root.values.items()})
    return found
