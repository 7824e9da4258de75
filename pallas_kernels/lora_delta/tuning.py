# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_delta`, by GPU."""

from pallas_kernels.lora_gather import Tuning

TUNING = {
    "NVIDIA H200": Tuning(ctas=132, most_parts=4, stages=4),
}
