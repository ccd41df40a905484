"""A method of your own: what its terms are; counts, logs, engines and the trainer follow from them."""

from dataclasses import dataclass

from tsdkd.losses import resolve_divergence
from tsdkd.methods import Method
from tsdkd.selection import EntropyGapGate, TopEntropy
from tsdkd.types import DivergenceTerm, EntropyTerm, Objective


@dataclass(frozen=True)
class Mine(Method):
    sharpen: float = 0.1
    name = "mine"

    def objective(self, batch=None, state=None):
        match = DivergenceTerm(name="reverse_kl", divergence=resolve_divergence("reverse_kl"), gate=EntropyGapGate())
        entropy = EntropyTerm(name="sharpen", weight=self.sharpen, selection=TopEntropy(0.2))
        return Objective((match, entropy))
