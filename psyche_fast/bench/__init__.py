"""What `psyche-fast bench` measures: kernels, optimiser steps, the exchange, a step of training."""
