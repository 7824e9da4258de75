# SPDX-License-Identifier: Apache-2.0
"""How fast it is, how fast the device could be, and how fast others are. Not packaged.

`kernels` times the operations, `decode` and `prefill` steps of the engine, `trace`, `adapters` and
`ablations` S-LoRA's experiments, `baselines` the same on other servers. `report` writes what was
measured into the README and `docs/benchmarks.md`, beside what was to be reached (`targets`).
"""
