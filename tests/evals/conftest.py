"""The shipped demo model, and the same model untrained: what the floors of the tests stand on."""

import jax
import pytest

import internvl_jax
from internvl_jax.evals import evaluator
from internvl_jax.models import create


@pytest.fixture(scope="session")
def demo():
    return internvl_jax.load("demo")


@pytest.fixture(scope="session")
def figures(demo):
    """Figures of an evaluator on the trained and on the untrained demo model."""
    untrained = create(demo.config, jax.random.key(0))

    def run(name, **options):
        results = []
        for params in (demo.params, untrained):
            one = evaluator.build({name: options}, demo.experiment)[name]
            results.append(dict(one.run(demo.config, params)))
        return results

    return run
