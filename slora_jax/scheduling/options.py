# SPDX-License-Identifier: Apache-2.0
"""The options of the scheduling policies: every constant of theirs has a name here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

type PolicyName = Literal["fcfs", "lcfs", "abort", "cluster", "vtc", "priority"]
POLICIES: tuple[str, ...] = get_args(PolicyName.__value__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingOptions:
    """Which waiting request is admitted next, and which is turned away.

    Attributes:
        scheduling_policy: "fcfs": first come, first served. "lcfs": last come, first served.
            "abort": S-LoRA's early abort. "cluster": few distinct adapters at a time. "vtc": equal
            service for every adapter. "priority": by the requests' priorities. Nothing starves but
            under "lcfs", whose nature it is; "abort" turns away what it would let starve.
        scheduling_lookahead: requests that find no room which a step looks past for one that does.
        max_overtakes: requests that may be admitted past one that finds no room; then everybody
            waits until it does. 0: nobody overtakes.
        prefetch_lookahead: requests next in line whose adapters are fetched before their turn.
        admission_watermark: share of the pool's pages that an admission leaves free, for the
            running requests to grow into; else they preempt each other (docs/scheduling.md).
        slo_first_token_s: "abort": seconds from arrival in which a first token is due.
        slo_margin_s: "abort": seconds kept in hand beside the predicted time to the first token.
        slo_rate_window_s: "abort": seconds over which arrivals and admissions are counted.
        slo_rate_smoothing: "abort": weight of the latest window in the smoothed rates.
        cluster_adapters: "cluster": d, most distinct adapters in the batch.
        cluster_mode: "cluster": "soft" admits others where none of the batch's adapters waits,
            "hard" never.
        vtc_input_weight: "vtc": service that a token of the prompt counts for.
        vtc_output_weight: "vtc": the same of the output.
        vtc_adapter_weights: "vtc": shares by adapter's name; of others, and of the base model, 1.
        priority_ageing_s: "priority": seconds of waiting that are worth one level of priority.
    """

    scheduling_policy: PolicyName = "fcfs"
    scheduling_lookahead: int = 16
    max_overtakes: int = 64
    prefetch_lookahead: int = 32
    admission_watermark: float = 0.03
    slo_first_token_s: float = 6.0
    slo_margin_s: float = 0.5
    slo_rate_window_s: float = 1.0
    slo_rate_smoothing: float = 0.7
    cluster_adapters: int = 8
    cluster_mode: Literal["soft", "hard"] = "soft"
    vtc_input_weight: float = 1.0
    vtc_output_weight: float = 2.0
    vtc_adapter_weights: Mapping[str, float] | None = None
    priority_ageing_s: float = 30.0

    def __post_init__(self) -> None:
        weights = self.vtc_adapter_weights or {}
        checks = {
            "scheduling_policy": (self.scheduling_policy in POLICIES, f"one of {POLICIES}"),
            "scheduling_lookahead": (self.scheduling_lookahead >= 0, "at least 0"),
            "max_overtakes": (self.max_overtakes >= 0, "at least 0"),
            "prefetch_lookahead": (self.prefetch_lookahead >= 1, "at least 1"),
            "admission_watermark": (0 <= self.admission_watermark < 1, "at least 0 and below 1"),
            "slo_first_token_s": (self.slo_first_token_s > 0, "above 0"),
            "slo_margin_s": (
                0 <= self.slo_margin_s < self.slo_first_token_s,
                f"at least 0 and below slo_first_token_s ({self.slo_first_token_s})",
            ),
            "slo_rate_window_s": (self.slo_rate_window_s > 0, "above 0"),
            "slo_rate_smoothing": (0 < self.slo_rate_smoothing <= 1, "above 0 and at most 1"),
            "cluster_adapters": (self.cluster_adapters >= 1, "at least 1"),
            "cluster_mode": (self.cluster_mode in ("soft", "hard"), "'soft' or 'hard'"),
            "vtc_input_weight": (self.vtc_input_weight >= 0, "at least 0"),
            "vtc_output_weight": (self.vtc_output_weight > 0, "above 0"),
            "vtc_adapter_weights": (all(w > 0 for w in weights.values()), "all above 0"),
            "priority_ageing_s": (self.priority_ageing_s > 0, "above 0"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
