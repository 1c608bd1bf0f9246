"""Times and checks the engine: `python -m dsa_jax.engine.bench -h`."""
