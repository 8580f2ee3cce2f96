"""What these tests share: shapes, gradients, comparison with oracles."""

from __future__ import annotations

import numpy as np
import torch

# Each shape with the reason for it, for compression_chunk = 8.
SHAPES = {
    "square": (16, 24),  # several whole chunks
    "odd": (15, 21),  # divisors 5 and 7
    "prime": (13, 8),  # a prime over the target: chunks of height 1
    "primes": (11, 17),  # both prime: chunks of one element
    "small": (3, 5),  # smaller than the target in both dimensions
    "column": (16, 1),  # width 1
    "experts": (3, 8, 10),  # leading dimension is batch
    "deep": (2, 2, 6, 4),  # two leading dimensions
    "vector": (40,),  # several chunks of a vector
    "odd_vector": (9,),  # divisor 3
    "prime_vector": (11,),  # chunks of one element
    "one": (1,),
    "scalar": (),
    "empty": (0, 5),
    "empty_vector": (0,),
}


def random_arrays(seed, shapes=SHAPES):
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) for name, shape in sorted(shapes.items())}


def to_parameters(arrays, dtype=torch.float64):
    return {
        name: torch.tensor(a, dtype=torch.float64).to(dtype).requires_grad_()
        for name, a in arrays.items()
    }


def set_gradients(parameters, arrays):
    for name, p in parameters.items():
        p.grad = torch.tensor(arrays[name], dtype=torch.float64).to(p.dtype)


def assert_parameters(parameters, expected, *, atol=1e-10, doubtful=None):
    """Compare with an oracle's arrays, but for the elements that it calls doubtful."""
    for name, p in parameters.items():
        sure = ~doubtful[name] if doubtful else np.ones(p.shape, dtype=bool)
        np.testing.assert_allclose(
            p.detach().double().numpy()[sure], expected[name][sure], rtol=0, atol=atol, err_msg=name
        )


def decoded_delta(encoded, shape):
    """A delta in the encoded shape brought back to the parameter's."""
    if len(shape) < 2:
        return encoded.reshape(shape)
    return encoded.transpose(-3, -2).reshape(shape)
