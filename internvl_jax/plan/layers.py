"""One layer of each tower, compiled alone: what a plan would say, in seconds instead of minutes.

A tower's layers run in a scan, so the compiler sees one of them however many there are. Each tower
is compiled at its real depth, batch and sharding, forward and with its gradient, without what lies
around it: embeddings, heads, loss, optimizer, and with the compiler's own small fusions, which it
finds in a third of the time. Good for comparing settings and for noticing a change; a whole plan
has the last word.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from internvl_jax import compiler, objectives, rules, sharding
from internvl_jax.kernels import Causal, Full, Keys
from internvl_jax.models import ChatConfig, InternVLConfig, LanguageModelConfig, init
from internvl_jax.models import config as models
from internvl_jax.plan import chips, compiling, experiment, kernel_times, schedule
from internvl_jax.train import gradients
from internvl_jax.train import state as states

GIB = 2**30
# Objectives that compare the examples of a batch: with chunks, their features come first.
_CACHED = ("contrastive", "generative", "retrieval")
_Shapes = Callable[[int], tuple[jax.ShapeDtypeStruct, ...]]  # of x and the others, for some rows


@dataclasses.dataclass(frozen=True)
class Layers:
    """All layers of a tower over a part of the batch: bytes per device, time an estimate.

    tower: "vit", "middleware", "llama" or "llm". part: "features" (forward, before the chunks'
    gradients), "forward" (a frozen tower, which runs once) or "gradient" (forward and back). turns:
    how often a step runs it.
    """

    tower: str
    part: str
    turns: float
    temp_gib: float
    collective_gb: float
    exposed_gb: float
    estimated_s: float


class _Part(NamedTuple):
    turns: float
    inputs: tuple[jax.ShapeDtypeStruct, ...]  # x and the others


@dataclasses.dataclass(frozen=True)
class _Tower:
    name: str
    layers: str  # regex over the paths of its parameters
    run: Callable[..., jax.Array]  # (model, x, *others) → x
    parts: dict[str, _Part]


def measure(config: Any, name: str, devices: Sequence[Any]) -> list[Layers]:
    """Compile the towers of an experiment for the devices of a topology.

    Left out is the middleware of a chat model.

    Raises:
        MeshError: see `experiment.build`. OutOfMemory: a tower alone does not fit.
    """
    model_config = models.from_dict(config.model)
    mesh = sharding.make_mesh(**config.mesh, devices=list(devices))
    sharding.check_divisible(model_config, mesh, config.batch_size, config.chunks)
    with jax.set_mesh(mesh):
        shapes = states.on_mesh(init.abstract(model_config), mesh)
        towers = _towers(config, model_config, mesh)
    return [
        _compile(config, model_config, shapes, tower, part, name, mesh)
        for tower in towers
        for part in tower.parts
    ]


def _towers(config: Any, model_config: Any, mesh: jax.sharding.Mesh) -> list[_Tower]:
    length, place = config.data.text_length, sharding.batch_sharding(mesh)
    dtype = jnp.dtype(config.model.dtype)

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    towers: list[_Tower] = []

    def parts(**shapes: _Shapes) -> dict[str, _Part]:
        turns = _turns(config, len(towers))
        return {p: _Part(turns[p][0], of(turns[p][1])) for p, of in shapes.items() if p in turns}

    if isinstance(model_config, LanguageModelConfig):
        key, language = "llama", model_config.llama
    elif isinstance(model_config, ChatConfig):
        key, language = "llm", model_config.llm
    else:
        key, language = "llama", model_config.llama
    if not isinstance(model_config, LanguageModelConfig):
        vit = model_config.vit
        patches = (config.data.image_size // vit.patch_size) ** 2
        patches -= int(patches * config.objective_options.get("mask_ratio", 0.0))

        def image(rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
            return (array(rows, 1 + patches, vit.width),)

        trained = "vit" in _trained(config, model_config)
        towers.append(
            _Tower(
                "vit",
                r"vit/blocks/.*",
                lambda model, x: model.vit.run(x, None, layers=vit.depth)[0],
                parts(features=image, gradient=image) if trained else parts(forward=image),
            )
        )
    if isinstance(model_config, InternVLConfig) and model_config.num_queries:
        count = model_config.num_queries + length

        def middleware(model: Any, x: jax.Array, vision: jax.Array) -> jax.Array:
            return model.middleware(x, vision, mask=Full())[0]

        # Three text groups share an image; features need one of them.
        inputs = parts(
            features=lambda rows: (array(rows, count, language.width), *image(rows)),
            gradient=lambda rows: (array(3 * rows, count, language.width), *image(rows)),
        )
        towers.append(_Tower("middleware", r"llama/(blocks|norm)/.*|cross/.*", middleware, inputs))
    else:

        def decoder(model: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
            return getattr(model, key)(x, mask=Causal() & Keys(ids > 0))

        def texts(rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
            return array(rows, length, language.width), array(rows, length, dtype=jnp.int32)

        inputs = parts(features=texts, gradient=texts)
        towers.append(_Tower(key, rf"{key}/(blocks|norm)/.*", decoder, inputs))
    return towers


def _turns(config: Any, tower: int) -> dict[str, tuple[float, int]]:
    """Part → how many turns of it make a step, and how many examples each of them takes.

    tower: its place among those that the objective trains separately. "features" where they come
    before the gradients: of all chunks, or all but the last where the tower holds that one. The
    last chunk's own turn counts as a share of the others', as does that of a frozen tower.
    """
    chunks = config.chunks
    examples = config.batch_size // chunks
    objective = objectives.OBJECTIVES[config.objective](**config.objective_options)
    if chunks == 1 or config.objective not in _CACHED:
        return {part: (chunks, examples) for part in ("forward", "gradient")}
    ahead = chunks - (config.held_towers > 0 and not objective.mines)
    passes = gradients.forward_passes(ahead, examples // sharding.batch_pieces())
    early, whole = ahead * examples // passes, passes * chunks / ahead
    held = tower < config.held_towers or not objective.separate
    return {
        "features": (passes if held else whole, early),
        "forward": (whole, early),
        "gradient": (chunks, examples),
    }


def _trained(config: Any, model_config: Any) -> set[str]:
    """Top-level names of the parameters that move."""
    learned, _ = rules.partition(init.abstract(model_config), config.trainable)
    return set(learned)


def _compile(
    config: Any,
    model_config: Any,
    shapes: Any,
    tower: _Tower,
    part: str,
    name: str,
    mesh: jax.sharding.Mesh,
) -> Layers:
    own, others = rules.partition(shapes, tower.layers)
    try:
        learned, frozen = rules.partition(own, config.trainable)
    except rules.RuleError:  # none of them moves
        learned, frozen = {}, own
    rest = rules.merge(frozen, others)

    def forward(learned: Any, rest: Any, x: jax.Array, *more: jax.Array) -> jax.Array:
        return tower.run(init.bind(model_config, rules.merge(learned, rest)), x, *more)

    def gradient(learned: Any, rest: Any, x: jax.Array, *more: jax.Array) -> Any:
        y, pull = jax.vjp(lambda learned, x: forward(learned, rest, x, *more), learned, x)
        return y, pull(x)

    # Arguments that a tower does not use are dropped by `jit`.
    with jax.set_mesh(mesh):
        options = compiler.options(large_fusions=False)
    turns, inputs = tower.parts[part]
    step = jax.jit(gradient if part == "gradient" else forward, compiler_options=options)
    arguments = (learned, rest, *inputs)
    used = experiment.bytes_per_device((own, inputs))
    program, _ = compiling.compiled(step, arguments, mesh, used)
    chip, shape = chips.parse(name)
    places = [device.coords for device in mesh.devices.flat]
    text = program.as_text()
    known = kernel_times.cycles(text, name)
    read = schedule.read(text, chip, places, shape, known)
    kinds = read.bytes_by_kind().values()
    return Layers(
        tower=tower.name,
        part=part,
        turns=turns,
        temp_gib=program.memory_analysis().temp_size_in_bytes / GIB,
        collective_gb=sum(sent for sent, _ in kinds) / 1e9,
        exposed_gb=sum(exposed for _, exposed in kinds) / 1e9,
        estimated_s=read.seconds,
    )
