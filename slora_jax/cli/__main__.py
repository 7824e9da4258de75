# SPDX-License-Identifier: Apache-2.0
"""`python -m slora_jax.cli`, where the `slora` script is not installed."""

import sys

from slora_jax.cli import main

sys.exit(main())
