"""The plan of an experiment on a topology: compile its train step, measure, report.

Every figure says where it comes from: "compiler" (read from the compiled program or its errors),
"count" (of parameters, or of products in the traced step) or "estimate" (the compiler's cycle
counts run through the model of `schedule`, checked against published runs only as far as
docs/scale.md says).
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from internvl_jax.plan import (
    chips,
    compiling,
    experiment,
    inference,
    kernel_times,
    schedule,
    topology,
)

GIB = 2**30
# Estimated step time over the published one, less one, of each run that was compared
# (benchmarks/plan_calibration.py, benchmarks/results/plan_calibration.json).
ERRORS = (0.07, 0.13, 0.05, 0.07, 0.05, 0.05, 0.04, 0.04)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One answer; `None` is what cannot be said of a program that does not fit."""

    fits: bool
    topology: str
    chips: int
    params_trained: int
    params_frozen: int
    hbm_gib: float  # per chip, like all sizes and bytes below
    model_tflops: float  # of one step, all chips together
    batch_size: int
    samples: int
    argument_gib: float | None = None
    temp_gib: float | None = None
    peak_gib: float | None = None
    needed_gib: float | None = None
    needed_source: str = ""
    collective_gb: float | None = None
    exposed_gb: float | None = None
    collectives: dict[str, tuple[float, float]] | None = None  # kind → GB, exposed GB
    estimated_step_s: float | None = None
    estimated_mfu: float | None = None
    untimed_kernels: int = 0
    compile_s: float | None = None
    advice: str = ""

    @property
    def days(self) -> float | None:
        """Time for the recipe's sample count at the estimated speed, without any interruption."""
        if self.estimated_step_s is None or not self.params_trained:
            return None
        return self.samples / self.batch_size * self.estimated_step_s / 86_400

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them; what is not known of this plan is left out."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and v != ""}
        if self.days is not None:
            fields["estimated_days"] = self.days
        return fields

    def __str__(self) -> str:
        frozen = f", {self.params_frozen / 1e9:.2f} B frozen" if self.params_frozen else ""
        days = "" if self.days is None else f", {self.days:.1f} days for {self.samples:,} samples"
        lines = [
            f"{self.topology}: {self.chips} chips, batch {self.batch_size:,}",
            f"parameters  {self.params_trained / 1e9:.2f} B trained{frozen} (count)",
            f"model work  {self.model_tflops:,.0f} TFLOP per step over all chips (count)",
        ]
        if not self.fits:
            lines += [
                f"memory      DOES NOT FIT: needs {self.needed_gib:.2f} GiB per chip of "
                f"{self.hbm_gib:.2f} ({self.needed_source})",
                f"advice      {self.advice}",
            ]
            return "\n".join(lines)
        room = 100 * (1 - self.peak_gib / self.hbm_gib)
        lines.append(
            f"memory      {self.peak_gib:.2f} GiB of {self.hbm_gib:.2f} per chip: arguments "
            f"{self.argument_gib:.2f}, temporaries {self.temp_gib:.2f}; {room:.0f} % to spare "
            "(compiler)"
        )
        lines.append(
            f"collectives {self.collective_gb:.1f} GB per chip and step (compiler), "
            f"{self.exposed_gb:.1f} exposed (estimate)"
        )
        for kind, (sent, exposed) in self.collectives.items():
            lines.append(f"            {kind} {sent:.1f}, exposed {exposed:.1f}")
        lines.append(
            f"time        {self.estimated_step_s:.2f} s per step, MFU "
            f"{100 * self.estimated_mfu:.1f} %{days} "
            f"(estimate from the compiler's cycles; {calibration(ERRORS)})"
        )
        if self.untimed_kernels:
            lines.append(
                f"            without the time of {self.untimed_kernels} Pallas kernel calls, "
                "which the compiler does not estimate"
            )
        lines.append(f"compiled    in {self.compile_s:.0f} s")
        return "\n".join(lines)


def calibration(errors: Sequence[float]) -> str:
    """How far estimated step times lay from published ones, in words."""
    if len(errors) == 1:
        return f"off by {100 * errors[0]:+.0f} % in the one published run compared"
    low, high = 100 * min(errors), 100 * max(errors)
    middle = 100 * statistics.median(abs(error) for error in errors)
    return (
        f"off by {low:+.0f} to {high:+.0f} %, median {middle:.0f} %, in {len(errors)} published "
        "runs compared"
    )


def make(
    config: Any,
    name: str,
    dump: str | Path | None = None,
    inference_mode: str | None = None,
    weights: str | None = None,
) -> Plan:
    """Plan an experiment's train step on a topology such as "v5e:16x16".

    dump: a file for the compiled program's text.
    inference_mode: of `inference.MODES`: plan that call of the model instead.
    weights: "int8" or None, as of `inference.build`.

    Raises:
        TopologyError, LibtpuError: see `topology.opened`. MeshError: see `experiment.build`.
        InferenceError: see `inference.build`.
    """
    with topology.opened(name) as devices:
        return on(config, name, devices, dump, inference_mode, weights)


def on(
    config: Any,
    name: str,
    devices: Sequence[Any],
    dump: str | Path | None = None,
    inference_mode: str | None = None,
    weights: str | None = None,
) -> Plan:
    """`make` on the devices of an opened topology."""
    if inference_mode is None:
        built = experiment.build(config, devices)
    else:
        built = inference.build(config, devices, inference_mode, weights)
    chip, shape = chips.parse(name)
    plan = Plan(
        fits=False,
        topology=name,
        chips=len(devices) // chip.devices_per_chip,
        params_trained=built.params_trained,
        params_frozen=built.params_frozen,
        hbm_gib=chip.hbm * chip.devices_per_chip / GIB,
        model_tflops=built.model_flops / 1e12,
        batch_size=built.batch_size,
        samples=built.samples,
    )
    grain = chip.devices_per_chip / GIB  # bytes of a device → GiB of a chip
    arguments = experiment.bytes_per_device(built.arguments)
    if arguments > chip.hbm:
        return dataclasses.replace(
            plan,
            needed_gib=arguments * grain,
            needed_source="count of the arguments alone",
            advice=_more_shards(built.mesh),
        )
    try:
        compiled, seconds = compiling.compiled(
            built.step, built.arguments, built.mesh, arguments
        )
    except compiling.OutOfMemory as error:
        return dataclasses.replace(
            plan,
            argument_gib=arguments * grain,
            needed_gib=error.needed * grain,
            needed_source="compiler",
            compile_s=error.seconds,
            advice=_advice(config, built.mesh),
        )
    text = compiled.as_text()
    if dump is not None:
        Path(dump).write_text(text, encoding="utf-8")
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = (
        memory.argument_size_in_bytes
        + kept
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    places = [device.coords for device in built.mesh.devices.flat]
    known = kernel_times.cycles(text, name)
    read = schedule.read(text, chip, places, shape, known)
    per_chip = chip.devices_per_chip / 1e9
    kinds = {
        kind: (sent * per_chip, exposed * per_chip)
        for kind, (sent, exposed) in read.bytes_by_kind().items()
    }
    return dataclasses.replace(
        plan,
        fits=peak <= chip.hbm,
        argument_gib=memory.argument_size_in_bytes * grain,
        temp_gib=memory.temp_size_in_bytes * grain,
        peak_gib=peak * grain,
        needed_gib=None if peak <= chip.hbm else peak * grain,
        needed_source="" if peak <= chip.hbm else "compiler",
        collective_gb=sum(sent for sent, _ in kinds.values()),
        exposed_gb=sum(exposed for _, exposed in kinds.values()),
        collectives=kinds,
        estimated_step_s=read.seconds,
        estimated_mfu=built.model_flops / (len(devices) * chip.peak * read.seconds),
        untimed_kernels=read.kernels,
        compile_s=seconds,
        advice="" if peak <= chip.hbm else _advice(config, built.mesh),
    )


def _more_shards(mesh: jax.sharding.Mesh) -> str:
    shape = dict(mesh.shape)
    return (
        f"parameters and moments alone do not fit with the mesh {shape}: raise mesh.fsdp (and "
        "lower mesh.replica), or take a larger topology"
    )


def _advice(config: Any, mesh: jax.sharding.Mesh) -> str:
    ways = [f"raise chunks (now {config.chunks})"]
    if config.chunks > 1 and config.held_towers > 1:
        ways.append("set held_towers=1")
    if config.model.get("remat") != "full":
        ways.append("set model.remat=full")
    if mesh.shape["replica"] > 1:
        ways.append("raise mesh.fsdp and lower mesh.replica, if the model divides over it")
    ways.append(f"lower batch_size (now {config.batch_size:,}), or take a larger topology")
    return "; or ".join(ways)
