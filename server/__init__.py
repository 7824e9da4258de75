# SPDX-License-Identifier: Apache-2.0
"""HTTP, streaming, metrics and the web page, over `slora_jax`.

Two processes, so that Python's lock is never shared between a decode step and open streams:

    the front end, `app.py`: HTTP, tokenization, streaming, metrics. It never imports JAX.
    the engine, `engine_process.py`: owns the device. The front end starts it, notices its death,
    and is never outlived by it (`engine_client.py`).

Imports `slora_jax` only; nothing imports it but the `slora serve` command, by name.
"""
