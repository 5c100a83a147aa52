"""saescale measures how sparse autoencoders scale. This is its face for notebooks: names, and nothing else.

    run = saescale.open_run("runs/quickstart")      # .results, .curves, .evals (Arrow), .fits
    trained = run.load(n_latents=512, k=8)          # or saescale.load("runs/quickstart/cells/CELL")
    latents = trained.encode(activations)           # raw activations [batch, d_model]

README.md has all of it. A name imports what stands behind it when it is first used, so `import saescale` is quick.
"""

import importlib
import pkgutil
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saescale.scaling.fit_sources import fit
    from saescale.scaling.laws.predict import predict
    from saescale.storage.errors import SaescaleError
    from saescale.storage.store import ActivationStore
    from saescale.trainers.architectures import ARCHITECTURES
    from saescale.trainers.exchange.native import read as load
    from saescale.trainers.exchange.run import open_run

    open_store = ActivationStore.open
    use_architecture = ARCHITECTURES.give

# In a checkout `saescale` is this file alone, and the floors are where they were installed; Python finds the checkout
# first there, and so do Ray's workers of a driver that was started in it.
__path__ = pkgutil.extend_path(__path__, __name__)

__all__ = ["SaescaleError", "fit", "load", "open_run", "open_store", "predict", "use_architecture"]

_WHERE = {
    "SaescaleError": ("storage.errors", "SaescaleError"),
    "fit": ("scaling.fit_sources", "fit"),
    "load": ("trainers.exchange.native", "read"),
    "open_run": ("trainers.exchange.run", "open_run"),
    "open_store": ("storage.store", "ActivationStore.open"),
    "predict": ("scaling.laws.predict", "predict"),
    "use_architecture": ("trainers.architectures", "ARCHITECTURES.give"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return attrgetter(attribute)(importlib.import_module(f"{__name__}.{module}"))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
