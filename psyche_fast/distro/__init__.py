"""DisTrO and DeMo: decoupled momentum, compressed to its largest DCT coefficients.

Sources: DeMo, arXiv 2411.19870; the DisTrO preliminary report.
"""

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.distro.delayed import DisTrO
from psyche_fast.distro.demo import DeMo
from psyche_fast.distro.distro import Distro
from psyche_fast.distro.optimizer import DistroStep
from psyche_fast.distro.results import DistroResult, quantize_1bit, validate_results

__all__ = [
    "DeMo",
    "DisTrO",
    "Distro",
    "DistroResult",
    "DistroStep",
    "Layout",
    "ParameterLayout",
    "quantize_1bit",
    "validate_results",
]
